"""Figures of curves, drawn without a screen and without pyplot's global state."""

from pathlib import Path

NOT_INSTALLED = "a figure needs matplotlib: pip install matplotlib"
POSITION = "position (tokens read before)"
# From the lowest to the highest value of a logarithmic ordinate.
LEAST_RANGE = 4


def new_figure(size, panels=1, shared=True):
    """A matplotlib figure and its panels, side by side, with one ordinate for all if `shared`.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NOT_INSTALLED) from error
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=shared)[0]


def draw_by_position(curves, path, mark=None, ratios=None, base="closed"):
    """Draw perplexity against position, and beside it how it compares.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): for each way to read, positions and perplexities.
        path (`str` or `Path`): the PNG file.
        mark (`int`, *optional*): a position that gets a vertical line: where the first segment ends.
        ratios (`dict[str, list[tuple[float, float]]]`, *optional*): for each way, positions and its perplexity over
            that of `base`, for a second panel. Perplexities that differ by one per cent are one line in the first.
        base (`str`, *optional*, defaults to `"closed"`): what the ratios are to.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    figure, axes = new_figure((6.4 if not ratios else 9.6, 4.0), 2 if ratios else 1, shared=False)
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys([*curves, *(ratios or ())]))}
    draw_curves(axes[0], curves, mark=mark, colours=colours)
    label(axes[0], POSITION, "perplexity")
    axes[0].legend(fontsize=7, frameon=False)
    if ratios:
        axes[1].axhline(1, color="grey", linewidth=0.8)
        draw_curves(axes[1], ratios, mark=mark, marker="o", colours=colours, ratio=True)
        label(axes[1], POSITION, f"ratio to {base}")
        axes[1].legend(fontsize=7, frameon=False)
    save(figure, path)


def draw_lines(curves, path, abscissa, ordinate, title=None, marker=None):
    """Draw curves on logarithmic axes.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): points by name; one without points is left out.
        path (`str` or `Path`): the PNG file.
        abscissa, ordinate (`str`): what the axes show.
        title (`str`, *optional*): the title.
        marker (`str`, *optional*): matplotlib's marker of a point.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    figure, (axis,) = new_figure((6.4, 4.0))
    draw_curves(axis, curves, marker=marker)
    label(axis, abscissa, ordinate)
    if title:
        axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    save(figure, path)


def draw_curves(axis, curves, mark=None, marker=None, colours=None, ratio=False):
    """Curves by name on an axis, the abscissa logarithmic, the ordinate too if it is no ratio."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for index, (name, points) in enumerate(curves.items()):
        if points:
            style = ("-", "--", "-.", ":")[index // 10 % 4]
            colour = colours[name] if colours else None
            line = {"marker": marker, "markersize": 3, "linewidth": 1.2, "color": colour}
            axis.plot(*zip(*points, strict=True), style, label=name, **line)
    if mark:
        axis.axvline(mark, color="grey", linewidth=0.6, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if ratio:
        return
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < LEAST_RANGE * low:
        # What differs by a few per cent shall not look like a multiple.
        middle, half = (low * high) ** 0.5, LEAST_RANGE**0.5
        axis.set_ylim(middle / half, middle * half)
    spread = high / low
    axis.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if spread < 8 else (1, 2, 5) if spread < 300 else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def label(axis, abscissa, ordinate):
    """What the axes show."""
    axis.tick_params(which="both", labelsize=7)
    axis.set_xlabel(abscissa, fontsize=8)
    axis.set_ylabel(ordinate, fontsize=8)


def draw_recall(rows, path):
    """Draw recall against facts for each feature dimension, a panel for each size.

    Args:
        rows (`list[dict]`): with `dim`, `rule`, `map`, `facts`, `recall` and `interval`.
        path (`str` or `Path`): the PNG file.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    dims = sorted({row["dim"] for row in rows})
    figure, axes = new_figure((1.2 + 2.6 * len(dims), 3.0), len(dims))
    colours = {"linear": "tab:blue", "delta": "tab:red", "best": "tab:grey"}
    for axis, dim in zip(axes, dims, strict=True):
        for rule, colour in colours.items():
            for feature_map, style in (("elu", "--"), ("exp", "-")):
                own = [row for row in rows if (row["dim"], row["rule"], row["map"]) == (dim, rule, feature_map)]
                loads = [row["facts"] / dim for row in own]
                axis.plot(loads, [row["recall"] for row in own], style, color=colour, label=f"{rule}, {feature_map}")
                if all(row["interval"] for row in own):
                    low, high = zip(*(row["interval"] for row in own), strict=True)
                    low, high = [max(0.0, end) for end in low], [min(1.0, end) for end in high]
                    axis.fill_between(loads, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.axvline(1, color="grey", linewidth=0.6, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([2.0**power for power in range(-4, 3, 2)], ["1/16", "1/4", "1", "4"])
        axis.tick_params(labelsize=7)
        axis.set_title(f"d = {dim}", fontsize=8)
        axis.set_xlabel("facts for each feature dimension", fontsize=8)
    axes[0].set_ylabel("recall", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def save(figure, path):
    """Write a PNG, with its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Nothing in the file tells the version or the day: the same numbers give the same picture.
    figure.savefig(path, metadata={"Software": None})
