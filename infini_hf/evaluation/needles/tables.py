"""Tables of needles found, as lines of markdown."""

from itertools import zip_longest

from ...data.needles import first_answer
from ..recall import wilson_interval
from .streams import DEPTHS, HAYSTACKS, SPREAD

# The order of rows, and every way that a question can be asked.
CONTROLS = ("memory", "closed", "other", "window", "local", "txl", "full")


def counts_by(samples, key):
    """`{key(sample): (values found, values asked for)}`."""
    counts = {}
    for sample in samples:
        found, asked = counts.get(key(sample), (0, 0))
        counts[key(sample)] = found + sample.found, asked + len(sample.expected)
    return counts


def haystack_order(name):
    return HAYSTACKS.index(name)


def row_of_depth(sample):
    """The row of the depth table that a sample counts in; a needle that lies at random counts in the nearest tenth."""
    return round(sample.place, 1) if sample.depth == SPREAD else sample.depth


def length_name(tokens):
    """`"32k"` for 32,768 tokens."""
    for size, unit in ((1024 * 1024, "M"), (1024, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def result_table(samples):
    """Values found of those asked for, with Wilson intervals, pooled over the depths.

    Args:
        samples (`list[Sample]`): of one evaluation.

    Returns:
        `list[str]`
    """
    lines = ["| haystack | tokens | read with | exact | share | 95 % interval |", "|---|---|---|---|---|---|"]
    counts = counts_by(samples, lambda s: (haystack_order(s.haystack), s.tokens, CONTROLS.index(s.control)))
    for (haystack, tokens, control), (found, asked) in sorted(counts.items()):
        low, high = wilson_interval(found, asked)
        lines.append(
            f"| {HAYSTACKS[haystack]} | {tokens:,} | {CONTROLS[control]} | {found} of {asked} "
            f"| **{found / asked:.2f}** | {low:.2f}–{high:.2f} |"
        )
    return lines


def depth_table(samples, control="memory"):
    """Values found of those asked for at every depth and length, a table for each haystack.

    Args:
        samples (`list[Sample]`): of one evaluation.
        control (`str`, *optional*, defaults to `"memory"`): the way of asking that is shown.

    Returns:
        `list[str]`
    """
    shown = [sample for sample in samples if sample.control == control]
    counts = counts_by(shown, lambda s: (s.haystack, s.tokens, row_of_depth(s)))
    lines = []
    for haystack in sorted({sample.haystack for sample in shown}, key=haystack_order):
        lengths = sorted({tokens for name, tokens, _ in counts if name == haystack})
        depths = sort_depths({depth for name, _, depth in counts if name == haystack})
        heads = " | ".join(map(length_name, lengths))
        lines += ["", f"| {haystack}, {control}: depth | {heads} |", "|---" * (len(lengths) + 1) + "|"]
        for depth in depths:
            cells = [counts.get((haystack, tokens, depth)) for tokens in lengths]
            texts = ["–" if cell is None else f"{cell[0]} of {cell[1]}" for cell in cells]
            lines.append(f"| {depth} | " + " | ".join(texts) + " |")
    return lines[1:]


# Start, middle and end of the paper's table of passkeys.
PAPER_DEPTHS = (0.0, 0.5, 1.0)


def token_table(samples):
    """Token accuracy at start, middle and end, as in table 3 of arXiv 2404.07143: digits in their right place.

    Args:
        samples (`list[Sample]`): of an evaluation; those whose one answer is no number are left out.

    Returns:
        `list[str]`: no line when a depth of the three was not asked for.
    """
    shown = [s for s in samples if s.depth in PAPER_DEPTHS and len(s.expected) == 1 and s.expected[0].isdigit()]
    if {sample.depth for sample in shown} != set(PAPER_DEPTHS):
        return []
    lengths = sorted({sample.tokens for sample in shown})
    lines = ["| start/middle/end, token accuracy in % | " + " | ".join(map(length_name, lengths)) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    groups = {(haystack_order(s.haystack), CONTROLS.index(s.control)) for s in shown}
    for haystack, control in sorted(groups):
        cells = []
        for tokens in lengths:
            key = HAYSTACKS[haystack], CONTROLS[control], tokens
            rows = [s for s in shown if (s.haystack, s.control, s.tokens) == key]
            shares = [digits_in_place([s for s in rows if s.depth == depth]) for depth in PAPER_DEPTHS]
            cells.append("/".join("–" if share is None else f"{100 * share:.0f}" for share in shares))
        lines.append(f"| {HAYSTACKS[haystack]}, {CONTROLS[control]} | " + " | ".join(cells) + " |")
    return lines


def digits_in_place(samples):
    """Share of the expected digits that were answered in their place, or `None` of no samples."""
    # Of a task whose answers may be words, what was answered is the text around the number too.
    pairs = [(sample.expected[0], first_answer(sample.answered, "key")) for sample in samples]
    asked = sum(len(expected) for expected, _ in pairs)
    right = sum(a == b for expected, answered in pairs for a, b in zip_longest(expected, answered[: len(expected)]))
    return right / asked if asked else None


def sort_depths(depths):
    """Numbers first, in order, then names."""
    return sorted(depths, key=lambda depth: (isinstance(depth, str), DEPTHS[-1] if isinstance(depth, str) else depth))
