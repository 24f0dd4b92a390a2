"""The pairs of a text and a summary that rows hold, in any of the forms that BookSum and its copies come in."""

import json
from dataclasses import dataclass, field

from .source_digest import source_digest

# What tells a text from others, in the order of an id; the source of the summary follows.
ID_FIELDS = ("bid", "book_id", "title", "book_title", "chapter_id")
PAIR_COLUMNS = ["id", "text", "summary"]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch of rows, whichever of the two schemas they have."""

    text_column: str
    summaries: str
    source: str = field(default_factory=source_digest)

    def __call__(self, batch, indices):
        pairs = {name: [] for name in PAIR_COLUMNS}
        for index, *values in zip(indices, *batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            found = summaries_of(row, index)
            if self.summaries == "longest":
                found = [max(found, key=lambda pair: len(pair[1]))]
            try:
                text = as_text(row[self.text_column])
            except ValueError as error:
                raise ValueError(f"{pair_id(row, index, row.get('source'))}: {error}") from error
            for source, summary in found:
                pairs["id"].append(pair_id(row, index, source))
                pairs["text"].append(text)
                pairs["summary"].append(summary)
        return pairs


def summaries_of(row, index):
    """`(source, summary)` of every summary of a row, at least one."""
    if as_text(row.get("summary_text")).strip():
        return [(row.get("source"), as_text(row["summary_text"]))]
    stored = row.get("summary")
    if isinstance(stored, str) and stored.lstrip().startswith("{"):
        try:
            stored = json.loads(stored).get("summary")
        except json.JSONDecodeError as error:
            raise ValueError(f"{pair_id(row, index, row.get('source'))}: its summary is not JSON ({error})") from error
    elif isinstance(stored, str) and stored.lstrip().startswith("["):
        stored = stored_list(stored)
    elif isinstance(stored, dict):
        stored = stored.get("summary")
    if isinstance(stored, list) and stored and isinstance(stored[0], dict):
        return [(item.get("source"), as_text(item.get("text"))) for item in stored]
    return [(row.get("source"), as_text(stored))]


def stored_list(stored):
    """The strings or dicts that a JSON list holds; a text that is none as it is, whatever it begins with."""
    try:
        found = json.loads(stored)
    except json.JSONDecodeError:
        return stored
    kinds = {type(item) for item in found} if isinstance(found, list) else {None}
    return found if kinds in ({str}, {dict}) else stored


def as_text(value):
    """A string as it is, a list of paragraphs as one, and what is missing as an empty string.

    Raises:
        ValueError: for anything else.
    """
    value = "" if value is None else "\n".join(map(as_text, value)) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise ValueError(
            f"{str(value)[:40]!r}: a text or a summary is a string or a list of strings, not {type(value).__name__}"
        )
    return value


def pair_id(row, index, source):
    known = [str(row[name]) for name in ID_FIELDS if row.get(name) is not None] or [f"row {index}"]
    return ":".join([*known, *([str(source)] if source else [])])
