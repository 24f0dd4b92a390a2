"""The results as markdown: a table of medians for each measure, the ratios below it, and why cells are empty."""

from dataclasses import dataclass
from statistics import median

from .contenders import REFERENCE
from .costs import token_flops
from .machine import product_flops
from .predictions import markdown
from .results import Cell
from .settings import PEAKS
from .statistics import ratio, size_of

NOTHING = "–"


@dataclass(frozen=True)
class Section:
    """How a measure is shown: its heading, the unit of its medians, and what its ratios are to.

    `over_reference` holds cells against the reference at the same length, `over_first` against the same contender at
    its first length.
    """

    title: str
    unit: str
    over_reference: bool = False
    over_first: bool = False


SECTIONS = {
    "prefill": Section("Prefill", "tokens/s", over_reference=True),
    "first_token": Section("Time to the first token", "seconds", over_reference=True),
    "read_on": Section("Reading on after a context", "ms a token", over_first=True),
    "decode": Section("Decoding after a context", "ms a token", over_reference=True, over_first=True),
    "training": Section("A training step", "tokens/s", over_reference=True),
    "memory": Section("Peak memory of reading", "MiB", over_first=True),
    "training_memory": Section("Peak memory of a training step", "MiB", over_first=True),
}


class Tables:
    """The tables of a benchmark, from its runs alone.

    Args:
        settings ([`BenchmarkSettings`]): what was to be measured.
        results ([`ResultFile`]): what was.
    """

    def __init__(self, settings, results):
        self.settings, self.results = settings, results

    def lines(self):
        """`list[str]`: all sections, as lines of markdown."""
        lines = []
        for measure in self.settings.measures:
            lines += ["", f"## {SECTIONS[measure].title}", "", *self.section(measure)]
            if measure == "prefill":
                lines += self.arithmetic()
        return lines

    def section(self, measure):
        """The tables and notes of a measure."""
        section = SECTIONS[measure]
        lines = self.table(measure, section.unit, self.shown)
        reference = self.reference(measure)
        kind = "peak" if measure in PEAKS else "time"
        if section.over_reference:
            lines += ["", *self.table(measure, f"{kind} over `{reference}`", self.over_reference)]
        first = self.settings.lengths_of(measure)[0]
        if section.over_first and len(self.settings.lengths_of(measure)) > 1:
            lines += ["", *self.table(measure, f"{kind} over that at {first:,}", self.over_first)]
        notes = self.notes(measure)
        return [*lines, "", *notes] if notes else lines

    def table(self, measure, head, entry):
        """A line for each contender, a column for each length."""
        lengths = self.settings.lengths_of(measure)
        rows = [
            [f"`{text}`", *(entry(Cell(measure, text, tokens)) for tokens in lengths)]
            for text in self.settings.contenders_of(measure)
        ]
        return markdown([head, *(f"{tokens:,}" for tokens in lengths)], rows)

    def reference(self, measure):
        """The contender that others are held against."""
        texts = self.settings.contenders_of(measure)
        return REFERENCE if REFERENCE in texts else texts[0]

    def value(self, cell):
        """The median of a cell in its unit, `None` without runs."""
        runs = self.results.of(cell)
        if not runs:
            return None
        size = median(map(size_of, runs))
        if SECTIONS[cell.measure].unit == "tokens/s":
            return cell.tokens / size
        tokens = {"read_on": self.settings.piece_tokens, "decode": self.settings.new_tokens}.get(cell.measure)
        return 1000 * size / tokens if tokens else size

    def shown(self, cell):
        value = self.value(cell)
        if value is None:
            return NOTHING
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def over_reference(self, cell):
        return self.ratio(cell, Cell(cell.measure, self.reference(cell.measure), cell.tokens))

    def over_first(self, cell):
        return self.ratio(cell, Cell(cell.measure, cell.contender, self.settings.lengths_of(cell.measure)[0]))

    def ratio(self, cell, other):
        found = ratio(self.results.of(cell), self.results.of(other))
        return NOTHING if found is None else "1" if cell == other else str(found)

    def notes(self, measure):
        """What is missing and why, and what was run less often than asked."""
        lines, fewer, apart = [], [], False
        wanted = 1 if measure in PEAKS else self.settings.repeats
        for text in self.settings.contenders_of(measure):
            for tokens in self.settings.lengths_of(measure):
                cell = Cell(measure, text, tokens)
                runs = self.results.of(cell)
                if not runs:
                    lines.append(f"- `{text}` at {tokens:,}: {self.results.note(cell) or 'not measured yet'}")
                elif len(runs) < wanted:
                    fewer.append(f"`{text}` at {tokens:,} ({len(runs)})")
                apart = apart or "†" in self.over_reference(cell) + self.over_first(cell)
        lines += [f"- fewer runs than {wanted}: {', '.join(fewer)}"] if fewer else []
        return lines + (
            ["- †: not taken in turns; the ratio of two medians"] if apart and measure not in PEAKS else []
        )

    def arithmetic(self):
        """How measured ratios stand to those of the FLOPs, and what share of a bare product's speed was reached."""
        if self.reference("prefill") != REFERENCE:
            return []
        lines = ["", *self.table("prefill", "measured / FLOPs, both over `blocks`", self.measured_and_counted)]
        products = self.results.of(Cell("machine", "product", 0))
        if not products:
            return lines
        rate = product_flops(self.settings) / median(run.seconds for run in products)

        def share(cell):
            speed = self.value(cell)
            flops = token_flops(cell.contender, self.settings, cell.tokens)
            return NOTHING if speed is None else f"{100 * speed * flops / rate:.0f} %"

        head = f"share of the {rate / 1e9:,.0f} GFLOP/s of a bare product"
        return [*lines, "", *self.table("prefill", head, share)]

    def measured_and_counted(self, cell):
        other = Cell(cell.measure, REFERENCE, cell.tokens)
        found = ratio(self.results.of(cell), self.results.of(other))
        if found is None:
            return NOTHING
        counted = [token_flops(part.contender, self.settings, cell.tokens) for part in (cell, other)]
        return f"{found.value:.3f} / {counted[0] / counted[1]:.3f}"
