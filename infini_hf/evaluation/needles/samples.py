"""The samples of an evaluation in a JSONL file: a first line that says what was asked, then one line each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .streams import Cell


@dataclass(frozen=True)
class Sample:
    """One question with what was expected and answered.

    Attributes:
        haystack (`str`), tokens (`int`), depth (`float` or `str`): its [`Cell`].
        number (`int`): the stream's number in the cell.
        question (`int`): the question's number in the stream.
        place (`float`): where the needle that answers it lies, from 0 to 1; the first one of several.
        control (`str`): how the stream was read and the memory treated.
        expected (`tuple[str]`): the values asked for.
        answered (`str`): what counts of the generated text.
        found (`int`): how many of the values expected it holds.
    """

    haystack: str
    tokens: int
    depth: float | str
    number: int
    question: int
    place: float
    control: str
    expected: tuple[str, ...]
    answered: str
    found: int

    @property
    def cell(self):
        return Cell(self.haystack, self.tokens, self.depth)

    @property
    def identity(self):
        """What no other sample of the same evaluation shares."""
        return self.cell, self.number, self.question, self.control


class SampleFile:
    """A JSONL file of samples that belongs to one evaluation.

    Args:
        path (`str` or `Path`): the file; a new one is begun with the first samples.
        about (`dict`, *optional*): what was evaluated (model, patch, task, seed); it must be what the file says. Left
            out, the file is only read.

    Raises:
        ValueError: when the file is of another evaluation, or no text, or has no first line; names the difference.
    """

    def __init__(self, path, about=None):
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is no text ({error}); name another file") from error
        rows = [row for row in map(parse, text.splitlines()) if row is not None]
        if rows:
            self.about = rows[0].get("about")
            if self.about is None:
                raise ValueError(f"{path}: does not begin with what it is about; name another file, or remove it")
            if about is not None:
                check_same(path, self.about, json.loads(json.dumps(about)))
        else:
            self.about = about
        self.samples = [Sample(**{**row, "expected": tuple(row["expected"])}) for row in rows[1:]]
        self.begun = bool(rows)
        # A kill may have cut the last line short: the next one begins a line of its own.
        self.cut_short = bool(text) and not text.endswith("\n")

    def append(self, samples):
        """Add samples, on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if self.cut_short:
                file.write("\n")
            if not self.begun:
                file.write(json.dumps({"about": self.about}) + "\n")
            file.writelines(json.dumps(asdict(sample)) + "\n" for sample in samples)
        self.begun, self.cut_short = True, False
        self.samples += samples


def parse(line):
    """A line as a dict, `None` when it was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def check_same(path, theirs, ours):
    """Raise a sentence that names every difference of two evaluations."""
    theirs, ours = flat(theirs), flat(ours)
    changed = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if changed:
        differences = ", ".join(f"{key} {theirs.get(key)} there and {ours.get(key)} here" for key in changed)
        raise ValueError(f"{path}: holds another evaluation ({differences}); name another file")


def flat(about, prefix=""):
    """Nested values by dotted names."""
    values = {}
    for key, value in about.items():
        values.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return values


def merge(paths):
    """The samples of several files of one evaluation, each once, and what they are about.

    Returns:
        `tuple[dict, list[Sample]]`

    Raises:
        ValueError: when a file is not there, holds no samples, or is of another evaluation than the first.
    """
    about, merged = None, {}
    for path in paths:
        file = SampleFile(path)
        if not file.samples:
            raise ValueError(f"{path}: holds no samples")
        if about is not None:
            # Without a novel there are no texts to differ in.
            loose = None in (file.about.get("texts"), about.get("texts"))
            check_same(path, *({**each, "texts": None} if loose else each for each in (file.about, about)))
        # Of two that differ in the texts, which only novels are made of, the one that has some.
        about = file.about if (about or {}).get("texts") is None else about
        for sample in file.samples:
            merged.setdefault(sample.identity, sample)
    return about, list(merged.values())
