"""All that the memory is told in training, beside the loss of the language model."""

from contextlib import contextmanager
from dataclasses import dataclass

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
    """

    retrieval: RetrievalSupervision
    recall: RecallSupervision

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
        """`torch.Tensor`: `(4,)` float32, of each part the sum of the shares and their number since `note`."""
        return torch.cat([part.shares for part in self.parts])

    def note(self, shares):
        """Count the shares of a step, of all ranks together, `(4,)`."""
        for part, own in zip(self.parts, shares.split(2), strict=True):
            part.note(own)

    def metrics(self):
        """What is logged: the mean shares since this was last asked."""
        return {name: share for part in self.parts for name, share in part.metrics().items()}


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
