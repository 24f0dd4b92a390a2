"""What an evaluation leaves beside its samples: the tables as markdown, the heat map as PNG."""

import math

from ..outputs import beside
from .figures import heat_map
from .tables import depth_table, result_table, token_table


def write_report(samples, path, title="", about=None):
    """Write `path` with the ending `.md` and `.png`.

    Args:
        samples (`list[Sample]`): of one evaluation.
        path (`str` or `Path`): the JSONL file, or any other name to put the endings on.
        title (`str`, *optional*): the model's name.
        about (`dict`, *optional*): what the evaluation is of, as [`describe`] says it.

    Returns:
        `tuple[list[str], str]`: the lines of the tables and notes, and a sentence that says where they are.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no samples: the controls asked for need more than one stream in a batch (--batch-size)")
    lines = result_table(samples)
    for part in (depth_table(samples), token_table(samples), full_note(samples, about)):
        lines += ["", *part] if part else []
    table, figure = beside(path, ".md"), beside(path, ".png")
    table.write_text("\n".join([f"# {title}" if title else "# Needles", "", *lines]) + "\n", encoding="utf-8")
    try:
        heat_map(samples, figure, title)
    except ModuleNotFoundError as error:
        return lines, f"{table}: the tables. {error}"
    return lines, f"{table} and {figure}: the tables and the figure"


def full_note(samples, about):
    """A line that says where `full` read streams longer than the positions of the model; none where it did not."""
    positions = ((about or {}).get("model") or {}).get("max_position_embeddings", math.inf)
    # A stream that fills them has its question behind them.
    beyond = sorted({sample.tokens for sample in samples if sample.control == "full" and sample.tokens >= positions})
    if not beyond:
        return []
    lengths = ", ".join(f"{tokens:,}" for tokens in beyond)
    where = f"`full` at {lengths} tokens reads beyond the {positions:,} positions of the model"
    return [f"note: {where}; it may fail for that"]
