"""How the segments of a training step are chained, and who is told of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepOptions:
    """How the segments of a step are chained.

    Args:
        bptt_segments (`int`, *optional*): cut the whole carried state every so many segments; `None` never cuts.
        recompute (`bool`): keep no activations of a segment and compute them again in the backward pass.
        offload (`bool`): keep the per-segment states on the CPU until the backward pass; with `recompute` alone.
        label_smoothing (`float`): share of the target that is spread over the vocabulary.
        distillation ([`infini_hf.distillation.Distillation`], *optional*): what the segments' `teacher` is held to.
        wrapper (`torch.nn.Module`, *optional*): the model as data parallelism wraps it; one segment goes through.
        filling (`int`): calls more that add nothing, for ranks that share parameters.
        write_scale (`torch.Tensor`, *optional*): `(batch, n)` float32, how many times each segment that a row closes
            is written; linear rule only.
    """

    bptt_segments: int | None = None
    recompute: bool = True
    offload: bool = False
    label_smoothing: float = 0.0
    distillation: Any = None
    wrapper: torch.nn.Module | None = None
    filling: int = 0
    write_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class StepObserver:
    """Who is told of a step while it runs.

    Args:
        watch (`Callable`, *optional*): called with the index of a segment and the cache that enters it.
        tally (`Callable`, *optional*): called for each segment with weights, with `(2,)` int64: emphasised targets (of
            a weight above 1) that the model would have said, and all of them.
        divergence (`Callable`, *optional*): called for each segment that a teacher has read, with its share of the
            divergence, a float32 scalar.
    """

    watch: Callable | None = None
    tally: Callable | None = None
    divergence: Callable | None = None
