"""The heat map of an evaluation: needles found by depth and length, a panel for each haystack."""

from pathlib import Path

from .tables import counts_by, haystack_order, length_name, row_of_depth, sort_depths

# The controls that are shown, and what stands above their panels.
NAMES = {"memory": "with the memory", "closed": "memory closed while asking"}
NOT_INSTALLED = "a figure needs matplotlib: pip install matplotlib"


def heat_map(samples, path, title=""):
    """Draw the share of values found with the memory, and smaller below it the same with the memory closed.

    Args:
        samples (`list[Sample]`): of one evaluation.
        path (`str` or `Path`): the PNG file.
        title (`str`, *optional*): what stands above.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NOT_INSTALLED) from error
    haystacks = sorted({sample.haystack for sample in samples}, key=haystack_order)
    lengths = sorted({sample.tokens for sample in samples})
    depths = sort_depths({row_of_depth(sample) for sample in samples})
    asked = {sample.control for sample in samples}
    shown = [control for control in NAMES if control in asked] or [min(asked)]
    # Without a screen and without pyplot's global state.
    size = (
        1.6 + len(haystacks) * max(2.4, 0.75 * len(lengths)),
        (1 + 0.28 * len(depths)) * (1 + 0.5 * (len(shown) - 1)),
    )
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=9)
    ratios = [1.0, 0.5][: len(shown)]
    axes = figure.subplots(len(shown), len(haystacks), squeeze=False, height_ratios=ratios)
    for row, control in zip(axes, shown, strict=True):
        for axis, haystack in zip(row, haystacks, strict=True):
            part = [s for s in samples if (s.control, s.haystack) == (control, haystack)]
            image = draw_panel(axis, part, lengths, depths, small=control != shown[0])
            axis.set_title(f"{haystack}, {NAMES.get(control, control)}", fontsize=8)
    figure.colorbar(image, ax=axes, label="values found", shrink=0.6)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_panel(axis, samples, lengths, depths, small):
    """One panel: shares as colours, from 0 to 1, and as numbers where there is room."""
    counts = counts_by(samples, lambda s: (row_of_depth(s), s.tokens))
    shares = [[share(counts.get((depth, tokens))) for tokens in lengths] for depth in depths]
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(lengths)), [length_name(tokens) for tokens in lengths], fontsize=7)
    step = 5 if small else 1
    axis.set_yticks(range(0, len(depths), step), depths[::step], fontsize=7)
    axis.set_ylabel("depth", fontsize=7)
    if not small:
        axis.set_xlabel("tokens", fontsize=7)
        for y, line in enumerate(shares):
            for x, value in enumerate(line):
                if value == value:
                    axis.text(
                        x,
                        y,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="black" if value > 0.6 else "white",
                    )
    return image


def share(count):
    """Found of asked, not a number where nothing was asked."""
    return float("nan") if count is None else count[0] / count[1]
