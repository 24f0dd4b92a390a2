"""Curves over the length, both axes logarithmic, one PNG for each kind of measure."""

from pathlib import Path

from ..curves import draw_lines
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
            section = SECTIONS[measure]
            draw_lines(curves, target, "tokens", section.unit, title=section.title, marker="o")
            drawn.append(target)
    return drawn


def curve(tables, settings, measure, text):
    """`list[tuple[int, float]]`: lengths and medians of one contender."""
    pairs = ((tokens, tables.value(Cell(measure, text, tokens))) for tokens in settings.lengths_of(measure))
    return [(tokens, value) for tokens, value in pairs if value is not None]
