"""Figures of curves, drawn without a screen and without pyplot's global state."""

from pathlib import Path

NOT_INSTALLED = "a figure needs matplotlib: pip install matplotlib"


def new_figure(size, panels=1):
    """A matplotlib figure and its panels, side by side.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NOT_INSTALLED) from error
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def draw_by_position(curves, path, mark=None):
    """Draw perplexity against position, both on logarithmic axes.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): for each way to read, positions and perplexities.
        path (`str` or `Path`): the PNG file.
        mark (`int`, *optional*): a position that gets a vertical line: where the first segment ends.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    draw_lines(curves, path, "position (tokens read before)", "perplexity", mark=mark)


def draw_lines(curves, path, abscissa, ordinate, title=None, mark=None, marker=None):
    """Draw curves on logarithmic axes.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): points by name; one without points is left out.
        path (`str` or `Path`): the PNG file.
        abscissa, ordinate (`str`): what the axes show.
        title (`str`, *optional*): the title.
        mark (`float`, *optional*): an abscissa that gets a vertical line.
        marker (`str`, *optional*): matplotlib's marker of a point.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    figure, (axis,) = new_figure((6.4, 4.0))
    for index, (name, points) in enumerate(curves.items()):
        if points:
            style = ("-", "--", "-.", ":")[index // 10 % 4]
            axis.plot(*zip(*points, strict=True), style, marker=marker, markersize=3, label=name, linewidth=1.2)
    if mark:
        axis.axvline(mark, color="grey", linewidth=0.6, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}")
    axis.tick_params(which="both", labelsize=7)
    axis.set_xlabel(abscissa, fontsize=8)
    axis.set_ylabel(ordinate, fontsize=8)
    if title:
        axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    save(figure, path)


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
