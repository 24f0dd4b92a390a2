"""The CSV of all runs and of the conditions they were taken under; it grows run by run, and can be gone on with."""

import csv
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Args:
        measure (`str`): what is measured.
        contender (`str`): of what.
        tokens (`int`): length of the input, the row or the context.
    """

    measure: str
    contender: str
    tokens: int


@dataclass(frozen=True)
class Run:
    """One run of a cell, or a note that says why there is none.

    Args:
        measure (`str`), contender (`str`), tokens (`int`): the cell.
        session (`int`): which call of the program; runs of one session were taken in turns.
        repeat (`int`): which turn.
        seconds (`float`, *optional*): the time by the wall clock.
        processor (`float`, *optional*): the time that the process had a processor, of all its threads.
        mib (`float`, *optional*): the peak, where that is what is measured.
        note (`str`): why the cell was not measured.
    """

    measure: str
    contender: str
    tokens: int
    session: int
    repeat: int = 0
    seconds: float | None = None
    processor: float | None = None
    mib: float | None = None
    note: str = ""

    @property
    def cell(self):
        """The [`Cell`]."""
        return Cell(self.measure, self.contender, self.tokens)

    @property
    def turn(self):
        """`tuple[int, int]`: what two runs share that were taken one after the other."""
        return self.session, self.repeat

    @classmethod
    def read(cls, row):
        """A run from a row of the CSV."""
        optional = {name: float(row[name]) if row[name] else None for name in ("seconds", "processor", "mib")}
        numbers = {name: int(row[name]) for name in ("tokens", "session", "repeat")}
        return cls(**{**row, **numbers, **optional})


COLUMNS = [item.name for item in fields(Run)]


class ResultFile:
    """All runs of a benchmark, in a file that is only added to, or in memory alone.

    Args:
        path (`str` or `Path`, *optional*): the CSV file; its first lines hold the conditions.
        conditions (`dict`): what the numbers depend on besides their cells.
        clock (`str`, *optional*, defaults to `"wall"`): `"processor"` takes the processor's time for the time.

    Raises:
        ValueError: when the file holds runs under other conditions, which it names.
    """

    def __init__(self, path, conditions, clock="wall"):
        self.path, self.conditions, self.clock = None if path is None else Path(path), conditions, clock
        self.runs, self.mended = [], None
        if self.path is not None and self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            # A line that was cut off when the program died is no run; the next one takes its place.
            whole = text[: text.rfind("\n") + 1]
            self.mended = None if whole == text else whole
            lines = whole.splitlines()
            self.check_conditions([line[2:] for line in lines if line.startswith("# ")])
            rows = csv.DictReader(line for line in lines if not line.startswith("# "))
            # As little as one of too few columns, or too many.
            self.runs = [Run.read(row) for row in rows if None not in row and None not in row.values()]
        self.session = 1 + max((run.session for run in self.runs), default=0)

    def check_conditions(self, lines):
        """Raise unless the head of a file says what `conditions` say."""
        pairs = (line.partition(": ") for line in lines)
        found = {name: json.loads(value) for name, _, value in pairs}
        # Tuples and lists are one to JSON.
        asked = json.loads(json.dumps(self.conditions))
        differing = [name for name in sorted({*found, *asked}) if found.get(name) != asked.get(name)]
        if differing:
            first = ", ".join(f"{name} {found.get(name)!r} there, {asked.get(name)!r} here" for name in differing)
            raise ValueError(
                f"{self.path}: holds measurements under other conditions ({first}); name another output, or move "
                "the file away"
            )

    def add(self, cell, **values):
        """Add a [`Run`] of a cell, and append it to the file."""
        run = Run(cell.measure, cell.contender, cell.tokens, self.session, **values)
        if run.note and self.note(cell) == run.note:
            return
        self.runs.append(run)
        if self.path is None:
            return
        new = not self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.mended is not None:
            self.path.write_text(self.mended, encoding="utf-8", newline="")
            self.mended = None
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                file.writelines(f"# {name}: {json.dumps(value)}\n" for name, value in self.conditions.items())
                writer.writerow(COLUMNS)
            row = [getattr(run, name) for name in COLUMNS]
            writer.writerow(["" if value is None else value for value in row])

    def of(self, cell):
        """`list[Run]`: the measured runs of a cell, with the time of the chosen clock."""
        runs = [run for run in self.runs if run.cell == cell and not run.note]
        return runs if self.clock == "wall" else [replace(run, seconds=run.processor) for run in runs]

    @property
    def share_of_processor(self):
        """The share of all measured time in which the process had a processor; `None` without runs."""
        wall = sum(run.seconds for run in self.runs if not run.note)
        return sum(run.processor for run in self.runs if not run.note) / wall if wall else None

    def note(self, cell):
        """`str`: why a cell has no runs, or nothing."""
        notes = [run.note for run in self.runs if run.cell == cell and run.note]
        return notes[-1] if notes and not self.of(cell) else ""

    def seconds(self, cell):
        """The median time of a cell, `None` without runs."""
        runs = self.of(cell)
        return median(run.seconds for run in runs) if runs else None

    def below(self, cell):
        """The longest measured cell that is shorter, of the same measure and contender; `None` without one."""
        shorter = {
            run.cell
            for run in self.runs
            if (run.measure, run.contender) == (cell.measure, cell.contender) and run.tokens < cell.tokens
        }
        return max((other for other in shorter if self.of(other)), key=lambda other: other.tokens, default=None)
