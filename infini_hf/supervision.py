"""All that the memory is told in training, beside the loss of the language model."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .recall_supervision import RecallSupervision
from .retrieval_supervision import RetrievalSupervision
from .told_layers import ToldReading


@dataclass(frozen=True)
class MemorySupervision:
    """Where answers were stated, and where what comes next came before.

    Args:
        retrieval ([`RetrievalSupervision`]): of rows whose answers have known sources.
        recall ([`RecallSupervision`]): of the other rows.
        costs (`list[torch.Tensor]`): what both have added to the loss of each micro-batch of the step, on this rank.
        noted (`list[float]`): what they have added to the loss of each step since a log.
    """

    retrieval: RetrievalSupervision
    recall: RecallSupervision
    costs: list = field(default_factory=list)
    noted: list = field(default_factory=list)

    @classmethod
    def from_args(cls, args):
        """As [`InfiniTrainingArguments`] say."""
        return cls(RetrievalSupervision.from_args(args), RecallSupervision.from_args(args))

    @property
    def parts(self):
        """`tuple`: both."""
        return self.retrieval, self.recall

    def check(self, model):
        """Refuse layers that nothing can be told; see [`ToldLayers.layers_of`]."""
        for part in self.parts:
            if part.weight:
                part.layers_of(model)

    @contextmanager
    def reading(self, model, ids, labels, sources, attention_mask, seen, write_scale=None, watch=None):
        """Watch a micro-batch being read; arguments as [`RetrievalSupervision.reading`], and the `labels`.

        Rows that have sources are left out of what comes again, and so are rows whose writes are scaled: of the former
        it is known better where to read, of the latter the memory stands for a longer text than was read.

        Yields:
            [`MemoryReading`]
        """
        left_out = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if sources is not None:
            left_out |= (sources >= 0).any(1)
        if write_scale is not None:
            left_out |= (write_scale != 1).any(1).to(ids.device)
        with (
            self.retrieval.reading(model, ids, sources, attention_mask, seen, write_scale, watch) as sourced,
            self.recall.reading(model, ids, labels, attention_mask, seen, left_out, sourced.begin) as recurring,
        ):
            yield MemoryReading(self, sourced, recurring)

    @property
    def shares(self):
        """`torch.Tensor`: `(5,)` float32 since `note`: for each part the sum of shares and their number; the cost."""
        cost = sum(self.costs, torch.zeros(())).float().cpu()
        return torch.cat([*(part.shares for part in self.parts), cost[None]])

    def note(self, shares, ranks=1):
        """Count what a step has shown, the sum over all ranks, `(5,)`, whose losses count as those of `ranks`."""
        *parts, cost = shares.split(2)
        for part, own in zip(self.parts, parts, strict=True):
            part.note(own)
        self.noted.append(cost.item() / ranks)
        self.costs.clear()

    def metrics(self):
        """What is logged since this was last asked: the mean shares, and what being told has added to the loss."""
        found = {name: share for part in self.parts for name, share in part.metrics().items()}
        if self.noted and any(part.weight for part in self.parts):
            found["told_loss"] = sum(self.noted) / len(self.noted)
        self.noted.clear()
        return found


@dataclass(frozen=True)
class MemoryReading:
    """One micro-batch: its `begin` is to be told of each segment."""

    supervision: MemorySupervision
    sourced: ToldReading
    recurring: ToldReading

    @property
    def begin(self):
        """`Callable`: takes the index of a segment and the cache that enters it."""
        return self.recurring.begin

    @property
    def loss(self):
        """`torch.Tensor` or `float`: the sum over the told tokens, with the weights."""
        parts = zip(self.supervision.parts, (self.sourced, self.recurring), strict=True)
        return sum(part.weight * reading.loss for part, reading in parts)
