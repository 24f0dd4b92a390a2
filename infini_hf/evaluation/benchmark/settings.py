"""What a benchmark measures: the shape of the model, the contenders and lengths of each measure, and its limits."""

from dataclasses import dataclass, field, fields

import torch

from .arithmetic import Shape

# In the order in which they are taken, and what each is.
MEASURES = {
    "prefill": "reading an input, tokens a second",
    "first_token": "from an input to the first token said, seconds",
    "read_on": "reading on after a context, milliseconds a token",
    "decode": "a decoded token after a context, milliseconds",
    "training": "forward and backward pass of one step, tokens a second",
    "memory": "peak memory of reading an input, MiB",
    "training_memory": "peak memory of one training step, MiB",
}
# Measured in a process of their own.
PEAKS = ("memory", "training_memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchmarkSettings:
    """The model, the machine, the measures and the limits; every length is in tokens."""

    layers: int = field(default=4, metadata={"help": "decoder layers of the random model"})
    width: int = field(default=512, metadata={"help": "size of a hidden state"})
    heads: int = field(default=8, metadata={"help": "query heads"})
    kv_heads: int = field(default=4, metadata={"help": "KV heads"})
    head_dim: int = field(default=64, metadata={"help": "size of a head"})
    intermediate: int = field(default=1536, metadata={"help": "inner size of the MLP"})
    vocab_size: int = field(default=4096, metadata={"help": "tokens of the vocabulary"})
    segment_length: int = field(
        default=2048, metadata={"help": "tokens of a segment, of a block, and of a sliding window"}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "tokens of one forward of blocks and patched models; default: a segment"}
    )
    attention: str = field(default="sdpa", metadata={"help": "attn_implementation of all models of transformers"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda …; the best one by default"})
    dtype: str | None = field(default=None, metadata={"help": "default: float32 on a CPU, bfloat16 elsewhere"})
    threads: int = field(default=1, metadata={"help": "threads of a CPU"})
    seed: int = field(default=0, metadata={"help": "of weights and token ids"})
    clock: str = field(
        default="wall", metadata={"help": "wall, or processor: the time of the process alone, on a CPU that is shared"}
    )
    repeats: int = field(
        default=5, metadata={"help": "timed runs of a cell, taken in turns with the other contenders"}
    )
    warmup_tokens: int = field(default=4096, metadata={"help": "longest run before the first timed one"})
    most_seconds: float = field(
        default=600.0, metadata={"help": "what one run may take; a cell whose runs would take longer is left out"}
    )
    cell_seconds: float = field(
        default=60.0,
        metadata={"help": "what all runs of a cell may take; there are fewer, but one, if they would not"},
    )
    most_gib: float = field(default=4.0, metadata={"help": "keys and values that a context may take"})
    new_tokens: int = field(default=64, metadata={"help": "tokens of one decoding"})
    piece_tokens: int = field(default=8192, metadata={"help": "tokens that are read on after a context"})
    prefill: list[str] = field(default_factory=list, metadata={"help": "contenders, as NAME:OPTION=VALUE:…"})
    prefill_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of an input"})
    first_token: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    first_token_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of an input"})
    read_on: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    read_on_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of the context"})
    decode: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    decode_tokens: list[int] = field(
        default_factory=list, metadata={"help": "lengths of the context; half a segment is added"}
    )
    training: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    training_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of a row"})
    memory: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    memory_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of an input"})
    training_memory: list[str] = field(default_factory=list, metadata={"help": "contenders"})
    training_memory_tokens: list[int] = field(default_factory=list, metadata={"help": "lengths of a row"})
    only: list[str] = field(
        default_factory=list,
        metadata={"help": f"measures to take: {', '.join(MEASURES)}; all that have contenders by default"},
    )
    output: str | None = field(
        default=None, metadata={"help": "markdown file; a CSV of all runs and the figures are put beside it"}
    )
    arithmetic: bool = field(
        default=False, metadata={"help": "print FLOPs and bytes of this shape and of Llama-3-8B, measure nothing"}
    )

    def __post_init__(self):
        for name in ("layers", "heads", "kv_heads", "repeats", "threads", "new_tokens", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        unknown = [name for name in self.only if name not in MEASURES]
        if unknown:
            raise ValueError(f"only: {unknown} are no measures; there are {', '.join(MEASURES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
        if self.clock not in ("wall", "processor") or (self.clock == "processor" and self.device != "cpu"):
            raise ValueError(f"clock={self.clock!r}: must be wall, or processor where device is cpu")
        self.chunk_size = self.chunk_size or self.segment_length
        for name in ("chunk_size", "piece_tokens", *(f"{measure}_tokens" for measure in MEASURES)):
            self._check_segments(name)

    def _check_segments(self, name):
        values = getattr(self, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1 or value % self.segment_length:
                raise ValueError(f"{name}: {value} is not a multiple of segment_length={self.segment_length}")

    @property
    def shape(self):
        """The [`Shape`] of the model."""
        return Shape(**{item.name: getattr(self, item.name) for item in fields(Shape)})

    @property
    def number_bytes(self):
        """`int`: bytes of a weight or an activation."""
        return DTYPES[self.dtype].itemsize

    @property
    def measures(self):
        """`list[str]`: what is measured, in order."""
        return [name for name in MEASURES if getattr(self, name) and (not self.only or name in self.only)]

    def contenders_of(self, measure):
        """`list[str]`: the contenders of a measure."""
        return getattr(self, measure)

    def lengths_of(self, measure):
        """`list[int]`: its lengths, ascending."""
        return sorted(set(getattr(self, f"{measure}_tokens")))

    @property
    def longest(self):
        """`int`: positions that a model needs."""
        lengths = [tokens for measure in MEASURES for tokens in self.lengths_of(measure)]
        return max([2 * self.segment_length, *lengths]) + self.piece_tokens + self.segment_length + self.new_tokens

    def conditions(self):
        """What a number depends on besides its cell, as a dict that JSON can hold."""
        names = ("segment_length", "chunk_size", "attention", "dtype", "seed", "new_tokens", "piece_tokens")
        held = {item.name: getattr(self, item.name) for item in fields(Shape)}
        held |= {name: getattr(self, name) for name in names}
        return held | ({"threads": self.threads} if self.device == "cpu" else {})
