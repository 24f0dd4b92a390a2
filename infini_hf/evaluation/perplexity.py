"""Perplexity, whole and by distance from the start of the text."""

import math
from dataclasses import dataclass
from itertools import pairwise


def doubling_edges(total, first=1024):
    """Positions 0, `first`, 2·`first`, 4·`first` … and `total`."""
    edges = [0]
    edge = first
    while edge < total:
        edges.append(edge)
        edge *= 2
    return [*edges, total]


@dataclass(frozen=True)
class SpanTable:
    """Mean losses by position, one row for each way to read.

    Attributes:
        edges (`list[int]`): positions between which tokens are counted.
        rows (`dict[str, list[float | None]]`): for each way to read, the mean loss in nats of every span, `None` where
            that way does not reach.
        counts (`list[int]`): tokens of every span, over all texts.
    """

    edges: list[int]
    rows: dict[str, list[float | None]]
    counts: list[int]

    def markdown(self):
        """The perplexities as lines of a markdown table."""
        heads = [f"{start:,}–{stop:,}" for start, stop in pairwise(self.edges)]
        lines = ["| read with | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for name, losses in self.rows.items():
            cells = ["–" if loss is None else f"{math.exp(loss):.2f}" for loss in losses]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return [*lines, "| tokens | " + " | ".join(f"{count:,}" for count in self.counts) + " |"]


def mean_by_span(losses, edges):
    """Mean losses between edges over several texts.

    Args:
        losses (`list[torch.Tensor]`): `(tokens,)` for each text, in nats, as a row of [`infini_hf.score`].
        edges (`list[int]`): ascending positions.

    Returns:
        `tuple[list[float | None], list[int]]`: the means, `None` where no text reaches, and the numbers of tokens.
    """
    means, counts = [], []
    for start, stop in pairwise(edges):
        parts = [text[start:stop].double() for text in losses]
        count = sum(part.numel() for part in parts)
        means.append(sum(part.sum().item() for part in parts) / count if count else None)
        counts.append(count)
    return means, counts


def curve_of(losses, first=32, per_doubling=2):
    """Perplexity by position in fine steps, for a figure.

    Args:
        losses (`list[torch.Tensor]`): `(tokens,)` for each text.
        first (`int`, *optional*, defaults to `32`): where the first step ends.
        per_doubling (`int`, *optional*, defaults to `2`): steps from a position to twice that.

    Returns:
        `list[tuple[float, float]]`: the geometric middle of every step, and the perplexity of its tokens.
    """
    longest, edges = max(map(len, losses)), [0]
    while edges[-1] < longest:
        edges.append(min(longest, round(first * 2 ** ((len(edges) - 1) / per_doubling))))
    # The first few may round to the same position.
    edges = sorted(set(edges))
    means, _ = mean_by_span(losses, edges)
    middles = [math.sqrt(max(start, 1) * stop) for start, stop in pairwise(edges)]
    return [(middle, math.exp(mean)) for middle, mean in zip(middles, means, strict=True)]


def curves_of_spans(edges, rows):
    """Perplexity by span, for a figure.

    Args:
        edges (`list[int]`): as those of [`SpanTable`].
        rows (`dict[str, list[float | None]]`): mean losses in nats, as its rows.

    Returns:
        `dict[str, list[tuple[float, float]]]`: for each row, the geometric middle of every span that it reaches, and
        the perplexity there.
    """
    middles = [math.sqrt(max(start, 1) * stop) for start, stop in pairwise(edges)]
    return {
        name: [(middle, math.exp(loss)) for middle, loss in zip(middles, losses, strict=True) if loss is not None]
        for name, losses in rows.items()
    }


def ratios_of_spans(edges, rows, base):
    """Perplexities by span over those of another way to read, for a figure.

    Args:
        edges (`list[int]`): as those of [`SpanTable`].
        rows (`dict[str, list[float | None]]`): mean losses in nats, as its rows; ways that end early, and
            `base` itself, are left out.
        base (`list[float]`): losses of the way that they are compared with.

    Returns:
        `dict[str, list[tuple[float, float]]]`: for each row, the geometric middle of every span, and the ratio there.
    """
    over = {
        name: [loss - other for loss, other in zip(losses, base, strict=True)]
        for name, losses in rows.items()
        if None not in losses and losses is not base
    }
    return curves_of_spans(edges, over)
