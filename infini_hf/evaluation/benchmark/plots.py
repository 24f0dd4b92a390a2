"""Curves over the length, both axes logarithmic, one PNG for each kind of measure."""

from pathlib import Path

from ..curves import new_figure, save
from .results import Cell
from .tables import SECTIONS, Tables


def draw_measures(settings, results, path):
    """Draw every measure that has runs at two lengths or more.

    Args:
        settings ([`BenchmarkSettings`]): what was to be measured.
        results ([`ResultFile`]): what was.
        path (`str` or `Path`): the markdown file; the measure's name is put behind its stem.

    Returns:
        `list[Path]`: the PNG files.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    tables, drawn = Tables(settings, results), []
    for measure in settings.measures:
        curves = {text: curve(tables, settings, measure, text) for text in settings.contenders_of(measure)}
        if max(map(len, curves.values())) > 1:
            target = Path(path).with_name(f"{Path(path).stem}_{measure}.png")
            draw(curves, SECTIONS[measure], target)
            drawn.append(target)
    return drawn


def curve(tables, settings, measure, text):
    """`list[tuple[int, float]]`: lengths and medians of one contender."""
    pairs = ((tokens, tables.value(Cell(measure, text, tokens))) for tokens in settings.lengths_of(measure))
    return [(tokens, value) for tokens, value in pairs if value is not None]


def draw(curves, section, path):
    """One figure."""
    figure, (axis,) = new_figure((6.4, 4.0))
    for index, (name, points) in enumerate(curves.items()):
        if points:
            style = ("-", "--", "-.", ":")[index // 10 % 4]
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}")
    axis.tick_params(which="both", labelsize=7)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel(section.unit, fontsize=8)
    axis.set_title(section.title, fontsize=9)
    axis.legend(fontsize=6, frameon=False)
    save(figure, path)
