"""`InfiniConfig`: what a patch changes in a model."""

import dataclasses
from dataclasses import dataclass

from .version import __version__

MEMORY_UPDATES = ("linear", "delta")
FEATURE_MAPS = ("elu", "exp", "softmax")
GATES = ("tanh", "sigmoid")


@dataclass(frozen=True)
class InfiniConfig:
    """Options of Infini-attention (arXiv 2404.07143); they travel in `config.infini_attention`.

    Args:
        segment_length (`int`, *optional*, defaults to `2048`):
            Tokens in a segment: local attention sees the open segment, the memory holds the closed ones.
        memory_update (`str`, *optional*, defaults to `"linear"`):
            `"linear"` adds what is written; `"delta"` first subtracts what the memory already returns for the key.
        feature_map (`str`, *optional*, defaults to `"elu"`):
            `"elu"` is the paper's ELU(x) + 1; `"exp"` is exp(min(x, 8)) for keys and exp(x - max x) for queries;
            `"softmax"` is exp(x) for keys, scaled to a sum of e⁸ at most, and queries as for `"exp"`.
        gate (`str`, *optional*, defaults to `"tanh"`):
            `"tanh"` is an exact no-op at zero; `"sigmoid"` is the paper's form, 0.5 at zero.
        overlap (`int`, *optional*, defaults to `0`):
            Tokens of the previous segment that local attention still sees.
        sink_tokens (`int`, *optional*, defaults to `0`):
            First tokens of a row that local attention always sees.
        layers (`list[int]`, *optional*):
            Layers to patch; all layers with global attention by default.

    Raises:
        ValueError: when a value is out of range; the message names it and the range.
    """

    segment_length: int = 2048
    memory_update: str = "linear"
    feature_map: str = "elu"
    gate: str = "tanh"
    overlap: int = 0
    sink_tokens: int = 0
    layers: list[int] | None = None

    def __post_init__(self):
        self._check_int("segment_length", 1)
        self._check_choice("memory_update", MEMORY_UPDATES)
        self._check_choice("feature_map", FEATURE_MAPS)
        self._check_choice("gate", GATES)
        self._check_int("overlap", 0, self.segment_length)
        self._check_int("sink_tokens", 0, self.segment_length)
        if self.layers is not None:
            self._check_layers()

    def _check_int(self, name, lowest, highest=None):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r}: must be a whole number, not a {type(value).__name__}")
        if value < lowest:
            raise ValueError(f"{name}={value}: must be at least {lowest}")
        if highest is not None and value > highest:
            raise ValueError(f"{name}={value}: must be at most segment_length={highest}")

    def _check_choice(self, name, choices):
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")

    def _check_layers(self):
        if not isinstance(self.layers, (list, tuple)):
            raise ValueError(f"layers={self.layers!r}: must be a list of layer indices, or None for all")
        layers = list(self.layers)
        for index in layers:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise ValueError(f"layers={layers!r}: {index!r} is not a layer index; count from 0")
        if not layers:
            raise ValueError("layers=[]: names no layer; give at least one index, or None for all")
        if len(set(layers)) != len(layers):
            raise ValueError(f"layers={layers!r}: names a layer twice")
        # A tuple in a caller's hands stays theirs; what is stored compares equal after a JSON round trip.
        object.__setattr__(self, "layers", sorted(layers))

    def to_dict(self):
        """The dict that is stored as `config.infini_attention`, with the version of this library."""
        return {**dataclasses.asdict(self), "version": __version__}

    @classmethod
    def from_dict(cls, values):
        """The inverse of [`to_dict`].

        Raises:
            ValueError: on an unknown key, as a checkpoint of a newer version may have.
        """
        values = dict(values)
        version = values.pop("version", "unknown")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"infini_attention has unknown keys {unknown}: it was written by version {version}, "
                f"this is {__version__}; install that version, or remove the keys"
            )
        return cls(**values)

    # Window geometry, which the cache, the segment plan and the layer all need.

    def carried_length(self, segment):
        """Tokens of earlier segments in the local window of segment `segment` (sinks and overlap, each once)."""
        return min(self.sink_tokens + self.overlap, segment * self.segment_length)

    def window_length(self, seen):
        """Tokens that the local window holds after `seen` tokens of a row."""
        segment, open_tokens = divmod(seen, self.segment_length)
        return self.carried_length(segment) + open_tokens

    @property
    def longest_window(self):
        """The longest local window a query can meet, in tokens."""
        return self.carried_length(2) + self.segment_length
