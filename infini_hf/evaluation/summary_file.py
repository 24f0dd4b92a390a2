"""A file of summaries that a later run goes on with, and never with those of another reader."""

import hashlib
import json
from pathlib import Path


def read_summaries(path):
    """The lines of a [`SummaryFile`] as dicts.

    Raises:
        ValueError: names a line that is broken.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} was not written to its end ({error}): remove it") from error
    return rows


class SummaryFile:
    """JSON lines of `id`, `summary`, `reference`, `digest` (of text and reference) and `reader`.

    Args:
        path (`str` or `Path`): the file; made when the first summary is added.
        reader (`dict`): everything beside the text that a summary depends on, as JSON has it.

    Raises:
        ValueError: when the file has a line that is broken, or by another reader, whose summaries would pass for
            those of this one.
    """

    def __init__(self, path, reader):
        self.path, self.reader = Path(path), {}
        self.rows = read_summaries(self.path) if self.path.is_file() else []
        self.require(**reader)
        self.digests = {(row["id"], row["digest"]) for row in self.rows}

    def require(self, **reader):
        """Add to what is known of the reader.

        Raises:
            ValueError: names what is another in the file.
        """
        for number, row in enumerate(self.rows, 1):
            theirs = row.get("reader", {})
            others = [name for name, value in reader.items() if name not in theirs or theirs[name] != value]
            changes = [f"{name} {theirs.get(name, 'not noted')!r} there and {reader[name]!r} here" for name in others]
            if changes:
                raise ValueError(
                    f"{self.path}: line {number} is by another reader ({', '.join(changes)}): name another output"
                )
        self.reader |= reader

    def missing(self, texts):
        """Those of `(id, text, reference)` that no line is about yet.

        Raises:
            ValueError: when a line is about another text, or has another reference, under the same id.
        """
        keys = [(name, digest(text, reference)) for name, text, reference in texts]
        names = {name for name, _ in keys}
        for name, _ in sorted(self.digests - set(keys)):
            if name in names:
                raise ValueError(
                    f"{self.path}: its summary of {name!r} is of another text, or has another reference: name another "
                    "output"
                )
        return [text for text, key in zip(texts, keys, strict=True) if key not in self.digests]

    def add(self, name, text, reference, summary):
        """Append a summary; what is written is on the disk when this returns."""
        row = {"id": name, "summary": summary, "reference": reference, "digest": digest(text, reference)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "reader": self.reader}, ensure_ascii=False) + "\n")
        self.digests.add((name, row["digest"]))


def read_lines(path):
    """The lines of a JSONL file. `splitlines` would break one where a text in it holds U+2028, U+2029 or U+0085."""
    with Path(path).open(encoding="utf-8") as file:
        return list(file)


def digest(text, reference):
    """What tells a text and its reference from any other."""
    return hashlib.sha256(f"{text}\0{reference}".encode()).hexdigest()[:16]
