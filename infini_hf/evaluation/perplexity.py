"""Perplexity, whole and by distance from the start of the text."""

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """Mean loss of the tokens at positions `start` to `stop`."""

    start: int
    stop: int
    loss: float

    @property
    def perplexity(self):
        return math.exp(self.loss)


def doubling_edges(total, first=1024):
    """Positions 0, `first`, 2·`first`, 4·`first` … and `total`."""
    edges = [0]
    edge = first
    while edge < total:
        edges.append(edge)
        edge *= 2
    return [*edges, total]


def spans_of(losses, edges):
    """Mean losses between edges.

    Args:
        losses (`torch.Tensor`): `(batch, tokens)` negative log-likelihoods in nats, as from [`infini_hf.score`].
        edges (`list[int]`): ascending positions; empty spans are left out.

    Returns:
        `list[Span]`
    """
    spans = []
    for start, stop in pairwise(edges):
        part = losses[:, start:stop]
        if part.numel():
            spans.append(Span(start, stop, part.double().mean().item()))
    return spans
