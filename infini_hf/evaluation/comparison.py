"""Ways to read held against each other on the same tokens, with intervals over documents."""

import math
from dataclasses import dataclass

from .intervals import jackknife_interval


@dataclass(frozen=True)
class Comparison:
    """A way to read beside the closed memory, on the tokens beyond the first segment.

    Attributes:
        way (`str`): the way.
        tokens (`int`): tokens counted.
        documents (`int`): documents that reach beyond the first segment.
        perplexity (`float`): of the way, every token counted once.
        ratio (`float`, *optional*): its perplexity over that of the closed memory on the same tokens; below 1 is
            better.
        ratio_interval (`tuple[float, float]`, *optional*): 95 %, paired over documents; `None` for fewer than two.
        share (`float`, *optional*): of the loss in nats by which full attention is better than the closed memory, the
            part that the way wins; `None` where full attention is not surely better, so that there is no gap to share.
        share_interval (`tuple[float, float]`, *optional*): 95 %, paired over documents.
    """

    way: str
    tokens: int
    documents: int
    perplexity: float
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    share: float | None = None
    share_interval: tuple[float, float] | None = None

    def to_dict(self):
        """The numbers as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def document_sums(losses, start):
    """What each document that reaches beyond `start` contributes: `(tokens, loss of each of several ways in nats)`.

    Args:
        losses (`list[list[torch.Tensor]]`): for each way `(tokens,)` of each document; the shortest way counts.
        start (`int`): first position that counts.

    Returns:
        `list[tuple]`: an `int` and a `float` for each way.
    """
    sums = []
    for parts in zip(*losses, strict=True):
        stop = min(map(len, parts))
        if stop > start:
            sums.append((stop - start, *(part[start:stop].double().sum().item() for part in parts)))
    return sums


def gain(sums):
    """Nats a token by which the second way is better than the first."""
    return sum(entry[1] - entry[2] for entry in sums) / sum(entry[0] for entry in sums)


def gap_share(sums):
    """The second way's gain over the first, as a share of the third way's."""
    return sum(entry[1] - entry[2] for entry in sums) / sum(entry[1] - entry[3] for entry in sums)


def compare(losses, start, base="closed", best="full"):
    """Every way beside the closed memory.

    The interval of a ratio of perplexities is that of the difference of losses, of which it is the exponential.

    Args:
        losses (`dict[str, list[torch.Tensor]]`): for each way `(tokens,)` of each document, in the same order.
        start (`int`): first position that counts: the length of the first segment.
        base (`str`, *optional*, defaults to `"closed"`): what ways are held against, where it is there.
        best (`str`, *optional*, defaults to `"full"`): what stands for all the text there is, where it is there.

    Returns:
        `list[Comparison]`: without the ways that do not reach beyond `start`.
    """
    rows = []
    for way, parts in losses.items():
        alone = document_sums([parts], start)
        if not alone:
            continue
        tokens = sum(entry[0] for entry in alone)
        values = [way, tokens, len(alone), math.exp(sum(entry[1] for entry in alone) / tokens)]
        if base in losses and way != base:
            values += ratio_to(document_sums([losses[base], parts], start))
            if best in losses and way != best:
                values += share_of(document_sums([losses[base], parts, losses[best]], start))
        rows.append(Comparison(*values))
    return rows


def ratio_to(sums):
    """How the second way's perplexity stands to the first's.

    Args:
        sums (`list[tuple[int, float, float]]`): from [`document_sums`] of two ways.

    Returns:
        `list`: the ratio (`float`) and its interval of 95 % (`tuple[float, float]`, `None` for fewer than two
        documents); two `None` without a document.
    """
    if not sums:
        return [None, None]
    interval = jackknife_interval(gain, sums)
    return [math.exp(-gain(sums)), interval and (math.exp(-interval[1]), math.exp(-interval[0]))]


def share_of(sums):
    """What the second way wins of the gap from the first to the third, where the third is better for sure.

    Args:
        sums (`list[tuple[int, float, float, float]]`): from [`document_sums`] of three ways.

    Returns:
        `list`: the share (`float`, of 1) and its interval of 95 % (`tuple[float, float]`, `None` for fewer than two
        documents); two `None` without a gap.
    """
    if not sums:
        return [None, None]
    gap = [(tokens, base, best) for tokens, base, _, best in sums]
    interval = jackknife_interval(gain, gap)
    if (gain(gap) if interval is None else interval[0]) <= 0:
        return [None, None]
    return [gap_share(sums), jackknife_interval(gap_share, sums)]


def comparison_lines(rows, start, base="closed", first="segment"):
    """A markdown table, and below it what the memory does in one sentence, where it and its control were measured.

    `first` says in words what is left out at the beginning of each text.
    """
    by_way = {row.way: row for row in rows}
    if not rows:
        return [f"No text reaches beyond the first {first} (position {start:,})."]
    texts = max(row.documents for row in rows)
    lines = [
        f"Beyond the first {first} (position {start:,} on, {texts} texts), with 95 % intervals over the texts:",
        "",
        f"| read with | perplexity | ratio to {base} | tokens |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ratio = "1" if row.way == base else number(row.ratio, row.ratio_interval, ".4f")
        lines.append(f"| {row.way} | {row.perplexity:.2f} | {ratio} | {row.tokens:,} |")
    if "memory" in by_way and base in by_way:
        lines += ["", verdict(by_way["memory"], by_way[base], by_way.get("other"), first)]
    return lines


def verdict(memory, closed, other, first):
    """The claim and what it rests on, in one line; what another text's memory does too is not of the text."""
    ratio = number(memory.ratio, memory.ratio_interval, ".4f")
    said = f"Beyond the first {first}: memory {memory.perplexity:.2f}, closed {closed.perplexity:.2f}, ratio {ratio}"
    if other is not None:
        said += f"; memory of another text {other.perplexity:.2f}"
    if memory.share is None:
        return said
    ends = memory.share_interval and tuple(100 * end for end in memory.share_interval)
    share = number(100 * memory.share, ends, ".1f")
    return f"{said}; of the gap from closed to full attention, the memory closes {share} %"


def beside_control(documents, control):
    """How the ways of one model stand to the closed memory of another on the same texts: the mean over the texts.

    Args:
        documents (`dict[str, list[float | None]]`): for each way the mean loss of each text beyond the first segment,
            in nats, `None` of a text that ends before.
        control (`list[float | None]`): those of the other model, in the same order.

    Returns:
        `dict[str, tuple]`: for each way the ratio of perplexities (`float`), below 1 where the way is better, and its
        interval of 95 %, paired over the texts (`tuple[float, float]`, `None` for fewer than two).

    Raises:
        ValueError: when the texts are not the same in number and length.
    """
    found = {}
    for way, losses in documents.items():
        if [loss is None for loss in losses] != [loss is None for loss in control]:
            raise ValueError(
                f"control: has {len(control)} texts, {control.count(None)} of them no longer than the first segment, "
                f"and {way} {len(losses)} and {losses.count(None)}: measure both on the same texts"
            )
        pairs = [(loss, other) for loss, other in zip(losses, control, strict=True) if loss is not None]
        if pairs:
            interval = jackknife_interval(mean_difference, pairs)
            found[way] = math.exp(mean_difference(pairs)), interval and tuple(map(math.exp, interval))
    return found


def mean_difference(pairs):
    """The mean of the first of each pair less the second."""
    return sum(first - second for first, second in pairs) / len(pairs)


def number(value, interval, form):
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})")
