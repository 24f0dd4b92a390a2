"""`InfiniTrainingArguments`: the stock arguments, and how a step goes through the memory."""

import copy
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .dilution import RAMPS
from .retrieval_losses import LOSSES, REACHES

# What the memory is told in training, by the names of the options that say how much it counts.
SUPERVISION_WEIGHTS = ("retrieval_weight", "recall_weight")


def check_recomputation(args, name):
    """Refuse the weight of a `name` beside `recompute_segments`.

    Raises:
        ValueError: when both are set.
    """
    if getattr(args, name) and args.recompute_segments:
        raise ValueError(
            f"{name}={getattr(args, name)} with recompute_segments=True: the loss needs the keys of the segments "
            "before, which would be computed again; set recompute_segments=False"
        )


@dataclass
class InfiniTrainingArguments(TrainingArguments):
    """Arguments of [`InfiniTrainer`]: those of `TrainingArguments`, and these.

    Args:
        memory_gate_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the gates, which have a parameter group of their own without weight decay; the schedule of
            the run scales it as it scales the other.
        memory_projection_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the projections that [`infini_hf.calibration.add_memory_projections`] adds; without decay
            too.
        bptt_segments (`int`, *optional*):
            Cut the gradient through the carried state every so many segments; by default it is never cut.
        recompute_segments (`bool`, *optional*, defaults to `True`):
            Keep no activations of a segment and compute them again in the backward pass: memory of one segment,
            whatever the length, for about a third more time.
        offload_memory_states (`bool`, *optional*, defaults to `False`):
            Keep the per-segment states on the CPU until the backward pass. Needs `recompute_segments`.
        sequence_parallel_size (`int`, *optional*, defaults to 1):
            Processes that read each row together, a run of its segments each ([`infini_hf.sequence_parallel`]); their
            number divides that of all. Rows are then not padded: one in a micro-batch, or all of one length.
        carry_memory (`bool`, *optional*, defaults to `False`):
            Continue a document in the next micro-batch with the memory of the last. The dataset needs the columns
            `document` and `part`, as [`infini_hf.data.packing.pack_documents`] makes them.
        memory_dilution (`float`, *optional*, defaults to `1.0`):
            The most that the write of a segment is scaled by during training, as if as much had been read; 1 is off.
            About the longest length wanted over the length of the rows. Linear rule only.
        memory_dilution_probability (`float`, *optional*, defaults to `0.5`):
            Share of the segments whose write is scaled.
        memory_dilution_ramp (`str`, *optional*, defaults to `"clock"`):
            `"clock"` raises the scale log-linearly between 30 % and 70 % of the steps; `"accuracy"` doubles it when
            the running accuracy of emphasised targets (those with a `loss_weights` above 1) passes the threshold;
            `"none"` begins with the whole scale, for a model that retrieves already.
        memory_dilution_threshold (`float`, *optional*, defaults to `0.9`):
            That accuracy, of 1.
        distillation_weight (`float`, *optional*):
            What the divergence from the teacher of `InfiniTrainer(teacher=...)` counts in the loss; 1 by default,
            where there is one.
        distillation_temperature (`float`, *optional*, defaults to `1.0`):
            By which the logits of teacher and student are divided before they are compared.
        retrieval_weight (`float`, *optional*, defaults to `0.0`):
            Retrieval supervision ([`infini_hf.retrieval_supervision`]): what it counts, beside the loss of one token,
            that the memory returns a token of an answer from its source. The dataset needs the column `sources`.
        retrieval_layers (`list[int]`, *optional*):
            Indices of the layers that are told; all by default.
        retrieval_negatives (`float`, *optional*, defaults to `0.0`):
            How much of the memories of the other rows of the batch the sources have to stand up to as well.
        retrieval_loss (`str`, *optional*, defaults to `"share"`):
            `"share"`: every head of the layers that are told has to find the source by itself. `"votes"`: their shares
            taken together have to, which leaves each head names that it takes for one another. `"tokens"`: likewise,
            with the places of each token taken together, as what reads the memory meets them.
        retrieval_contrast (`float`, *optional*, defaults to `0.0`):
            What it counts, beside that loss, that softmax attention with the memory's queries and keys would find the
            source: it reaches the layers below, where keys at the bound of `"exp"` pass no gradient on.
        recall_weight (`float`, *optional*, defaults to `0.0`):
            Recall supervision ([`infini_hf.recall_supervision`]): what it counts, beside the loss of one
            token, that the memory returns the token that comes next, where the row held it segments before. It needs
            no column; rows with `sources` are left out.
        recall_layers (`list[int]`, *optional*):
            Indices of the layers that are told; all by default.
        retrieval_reach (`str`, *optional*, defaults to `"model"`):
            How far the gradient of all these losses goes: `"model"`, to every weight below, or `"projections"`, to the
            memory's own projections alone, which leaves the other weights to the language-model loss.
        plot_memory_gates (`bool`, *optional*, defaults to `True`):
            Draw the layer × head map of the gates into the output folder at the end (needs matplotlib).

    Raises:
        ValueError: when a value is out of range, or options exclude each other.
    """

    memory_gate_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the memory gates; they are never decayed."}
    )
    memory_projection_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the memory's own projections, where it has some."}
    )
    bptt_segments: int | None = field(
        default=None,
        metadata={"help": "Cut the gradient through the memory every so many segments; never by default."},
    )
    recompute_segments: bool = field(
        default=True,
        metadata={
            "help": "Compute a segment's activations again in the backward pass: constant memory at any length."
        },
    )
    offload_memory_states: bool = field(
        default=False, metadata={"help": "Keep the per-segment memory states on the CPU until the backward pass."}
    )
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "Processes that read each row together, a run of its segments each."}
    )
    carry_memory: bool = field(
        default=False, metadata={"help": "Continue a document in the next micro-batch with the memory of the last."}
    )
    memory_dilution: float = field(
        default=1.0, metadata={"help": "The most that a segment's write is scaled by in training; 1 is off."}
    )
    memory_dilution_probability: float = field(
        default=0.5, metadata={"help": "Share of the segments whose write is scaled."}
    )
    memory_dilution_ramp: str = field(
        default="clock", metadata={"help": "clock, accuracy (doubled whenever the answers are right), or none."}
    )
    memory_dilution_threshold: float = field(
        default=0.9, metadata={"help": "Running accuracy at which memory_dilution_ramp=accuracy doubles the scale."}
    )
    distillation_weight: float | None = field(
        default=None, metadata={"help": "What the divergence from the teacher counts in the loss; 1 with a teacher."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "By which the logits of teacher and student are divided."}
    )
    retrieval_weight: float = field(
        default=0.0,
        metadata={"help": "What it counts that answers are read from their sources, beside the loss of one token."},
    )
    retrieval_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers that are told where to read; all by default."}
    )
    retrieval_negatives: float = field(
        default=0.0, metadata={"help": "How much of the other rows' memories the sources have to stand up to."}
    )
    retrieval_loss: str = field(
        default="share",
        metadata={
            "help": "share (every head by itself has to find the source), votes (all together), or tokens (as votes, "
            "the places of each token taken together)."
        },
    )
    retrieval_contrast: float = field(
        default=0.0,
        metadata={
            "help": "What it counts that softmax attention with the memory's queries and keys finds the source."
        },
    )
    recall_weight: float = field(
        default=0.0,
        metadata={"help": "What it counts that the memory returns what comes next, where it came before."},
    )
    recall_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers that recall_weight is for; all by default."}
    )
    retrieval_reach: str = field(
        default="model",
        metadata={"help": "What learns from being told: model (every weight), or projections (the memory's own)."},
    )
    plot_memory_gates: bool = field(
        default=True, metadata={"help": "Draw the layer × head map of the gates at the end of training."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # The dispatcher joins the ranks' batches of a stream, which rows of different length forbid.
            self.accelerator_config.dispatch_batches = False
        for name in ("memory_gate_learning_rate", "memory_projection_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of at least 0")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps={self.gradient_accumulation_steps}: must be at least 1")
        if self.bptt_segments is not None and self.bptt_segments < 1:
            raise ValueError(f"bptt_segments={self.bptt_segments}: must be at least 1, or None to never cut")
        if self.sequence_parallel_size < 1 or self.world_size % self.sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size={self.sequence_parallel_size}: must be at least 1, and divide the "
                f"{self.world_size} processes of this run (torchrun --nproc_per_node, accelerate launch)"
            )
        if not 1 <= self.memory_dilution < math.inf:
            raise ValueError(f"memory_dilution={self.memory_dilution}: must be a number of at least 1, which is off")
        for name in ("distillation_weight", "distillation_temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0; to train without, pass no teacher")
        for name in ("memory_dilution_probability", "memory_dilution_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if self.memory_dilution_ramp not in RAMPS:
            ramps = ", ".join(map(repr, RAMPS))
            raise ValueError(f"memory_dilution_ramp={self.memory_dilution_ramp!r}: must be one of {ramps}")
        if self.retrieval_loss not in LOSSES:
            raise ValueError(f"retrieval_loss={self.retrieval_loss!r}: must be one of {', '.join(map(repr, LOSSES))}")
        if self.retrieval_reach not in REACHES:
            reaches = ", ".join(map(repr, REACHES))
            raise ValueError(f"retrieval_reach={self.retrieval_reach!r}: must be one of {reaches}")
        for name in (*SUPERVISION_WEIGHTS, "retrieval_negatives", "retrieval_contrast"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0, which is off")
        for name in SUPERVISION_WEIGHTS:
            check_recomputation(self, name)
        if self.carry_memory and self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} with carry_memory=True: rows are read in "
                "the order of their documents; take 'random', which shuffles these, or 'sequential'"
            )
        if self.offload_memory_states and not self.recompute_segments:
            raise ValueError(
                "offload_memory_states=True with recompute_segments=False: the activations stay on the device, so "
                "there is nothing to gain; set recompute_segments=True"
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "activation_checkpointing (gradient_checkpointing) drops the memory between the layers of a segment: "
                "leave it off, InfiniTrainer recomputes whole segments (recompute_segments=True)"
            )

    def __getstate__(self):
        # The trainer pickles its arguments beside every checkpoint, and uploads them with the model.
        return {**vars(self), "hub_token": None}

    def __copy__(self):
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    @property
    def row_groups(self):
        """`int`: groups of processes, each of which reads rows of its own."""
        return self.world_size // self.sequence_parallel_size
