"""What scripts that train a memory do to a model before: calibration, projections, what is left at rest."""

from dataclasses import dataclass, field

import torch

from ..cache import infini_config_of
from ..calibration import add_memory_projections, calibrate_memory, renew_memory_projections
from ..gate import HeadProjection, MemoryGate
from ..parameter_groups import parameters_of


@dataclass
class MemoryArguments:
    """How the memory of a model is prepared, where it was not before."""

    calibration_tokens: int = field(
        default=16_384,
        metadata={
            "help": "tokens of the novels that feature maps exp and softmax are calibrated on, once; 0 for none"
        },
    )
    memory_projections: bool = field(
        default=False, metadata={"help": "give the memory an affine map of its own of its queries and keys"}
    )
    mix_heads: bool = field(
        default=False, metadata={"help": "a map of the queries and keys of all heads; with memory_projections"}
    )
    projected_layers: list[int] | None = field(
        default=None, metadata={"help": "layers that get memory_projections; by default all"}
    )
    renewed_layers: list[int] | None = field(
        default=None,
        metadata={"help": "layers whose projections begin anew, at random; needs calibration_tokens"},
    )
    resting_layers: int = field(
        default=0,
        metadata={
            "help": "so many of the lowest layers, their memory included, are left as they are in training, and so "
            "are the embeddings, with the output head where it is tied to them"
        },
    )
    memory_only: bool = field(
        default=False,
        metadata={
            "help": "only gates and memory_projections learn: what the model does without its memory stays as it is"
        },
    )
    closed_memory: bool = field(
        default=False,
        metadata={"help": "the gates are set to zero and stay there: the local-only control, on the same rows"},
    )

    def __post_init__(self):
        if not self.memory_projections and (self.mix_heads or self.projected_layers is not None):
            raise ValueError(
                f"mix_heads={self.mix_heads}, projected_layers={self.projected_layers}: say which memory_projections "
                "are added; give memory_projections too"
            )
        if self.renewed_layers and not self.calibration_tokens:
            raise ValueError(
                f"renewed_layers={self.renewed_layers} with calibration_tokens=0: the scale of what is mapped is "
                "taken from these; give some, 16384 for instance"
            )
        if self.memory_only and self.closed_memory:
            raise ValueError(
                "memory_only=True with closed_memory=True: the gates would rest with all else, and nothing learn; "
                "a control of a stage of the memory alone is the model before it, with its memory closed"
            )
        if early := [index for index in self.projected_layers or () if index < self.resting_layers]:
            raise ValueError(
                f"projected_layers={self.projected_layers} with resting_layers={self.resting_layers}: the projections "
                f"of {early} would never learn; rest fewer layers, or project those above"
            )

    def prepare(self, model, tokenizer, texts):
        """Calibrate the memory on the texts and add projections, where they are asked for and the model has none."""
        if self.calibration_tokens and infini_config_of(model.config).feature_map != "elu" and not centered(model):
            calibrate_memory(model, self.pieces(tokenizer, texts))
        if self.memory_projections:
            self.check_mixed(model)
            add_memory_projections(model, self.projected_layers, self.mix_heads)
        if self.renewed_layers:
            renew_memory_projections(model, self.renewed_layers, self.pieces(tokenizer, texts))

    def pieces(self, tokenizer, texts):
        """Some tokens of every text, `(1, tokens)` int64, `calibration_tokens` together at most.

        Raises:
            ValueError: when the texts hold less than half as many.
        """
        share, found = max(1, self.calibration_tokens // len(texts)), []
        for text in texts:
            # From inside each novel: the beginnings are titles and prefaces.
            start = min(5000, len(text) // 4)
            piece = tokenizer(text[start : start + 8 * share], add_special_tokens=False, verbose=False)["input_ids"]
            found += piece[:share]
        found = found[: self.calibration_tokens]
        if 2 * len(found) < self.calibration_tokens:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens}: {len(texts)} texts, of {share} tokens each, gave "
                f"{len(found)}; give longer texts, or ask for fewer"
            )
        return torch.tensor([found])

    def check_told(self, weight, layers, name="retrieval"):
        """Refuse layers that rest and are told where to read: `layers` by the supervision of a `name` and a `weight`.

        Raises:
            ValueError: names them; or when the memory is closed.
        """
        if weight and self.closed_memory:
            raise ValueError(
                f"{name}_weight={weight} with closed_memory=True: nothing is read that the loss could be told of; "
                f"give {name}_weight=0"
            )
        early = range(self.resting_layers) if layers is None else [i for i in layers if i < self.resting_layers]
        if weight and early:
            raise ValueError(
                f"{name}_layers={layers} with resting_layers={self.resting_layers}: {list(early)} would be told "
                "where to read and never learn it; rest fewer layers, or tell those above"
            )

    def check_adapted(self, lora_r):
        """Refuse a LoRA of rank `lora_r` beside options that say what of the model itself learns.

        Raises:
            ValueError: names the option.
        """
        for name in ("closed_memory", "memory_only", "resting_layers"):
            if lora_r and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} with lora_r={lora_r}: beside adapters all weights rest, and "
                    f"gates and projections learn; leave {name} out, or lora_r"
                )

    def check_mixed(self, model):
        """Refuse `mix_heads` for projections that the model has already, of the heads alone.

        Raises:
            ValueError: when there are some.
        """
        found = [module for module in model.modules() if isinstance(module, HeadProjection)]
        # Of one head it is the same either way.
        alone = [projection for projection in found if not projection.mixes_heads and len(projection.weight) > 1]
        if self.mix_heads and alone:
            raise ValueError(
                "mix_heads=True: the model has projections of each head alone, which stay as they are; leave the "
                "option out, or begin from a model without projections"
            )

    def rest(self, model):
        """Leave the embeddings and the lowest layers as they are, and with `memory_only` all but the memory.

        Raises:
            ValueError: when that leaves no layer, or is below 0.
        """
        decoder = model.get_decoder()
        if not 0 <= self.resting_layers < len(decoder.layers):
            raise ValueError(
                f"resting_layers={self.resting_layers}: must be from 0 to {len(decoder.layers) - 1}, one less than "
                "there are"
            )
        if self.resting_layers:
            for module in (decoder.embed_tokens, *decoder.layers[: self.resting_layers]):
                module.requires_grad_(False)
        if self.memory_only:
            memory = [*parameters_of(model, MemoryGate), *parameters_of(model, HeadProjection)]
            model.requires_grad_(False)
            for parameter in memory:
                parameter.requires_grad_(True)

    def close(self, model):
        """Set the gates to zero and leave the whole memory there, where the control is asked for.

        Raises:
            ValueError: when zero is not shut.
        """
        if not self.closed_memory:
            return
        kind = infini_config_of(model.config).gate
        if kind != "tanh":
            raise ValueError(f"closed_memory=True with gate={kind!r}: at zero it is half open; give gate='tanh'")
        for module in model.modules():
            if isinstance(module, MemoryGate):
                module.requires_grad_(False)
                module.bias.zero_()
                # Spares the retrieval; what is stored is the gates at zero.
                module.closed = True


def centered(model):
    """Whether a model was calibrated before: its weights have learned with the shifts it has."""
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    return any(gate.query_shift is not None or gate.query_projection is not None for gate in gates)
