"""What an evaluation leaves beside its samples: the tables as markdown, the heat map as PNG."""

from pathlib import Path

from .figures import heat_map
from .tables import depth_table, result_table, token_table


def write_report(samples, path, title=""):
    """Write `path` with the ending `.md` and `.png`.

    Args:
        samples (`list[Sample]`): of one evaluation.
        path (`str` or `Path`): the JSONL file, or any other name to put the endings on.
        title (`str`, *optional*): the model's name.

    Returns:
        `tuple[list[str], str]`: the lines of the tables, and a sentence that says where they are.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no samples: the controls asked for need more than one stream in a batch (--batch-size)")
    path = Path(path)
    lines = [*result_table(samples), "", *depth_table(samples)]
    if tokens := token_table(samples):
        lines += ["", *tokens]
    table, figure = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text("\n".join([f"# {title}" if title else "# Needles", "", *lines]) + "\n", encoding="utf-8")
    try:
        heat_map(samples, figure, title)
    except ModuleNotFoundError as error:
        return lines, f"{table}: the tables. {error}"
    return lines, f"{table} and {figure}: the tables and the figure"
