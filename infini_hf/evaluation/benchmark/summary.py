"""The few ratios that say how Infini-attention stands, from the runs of all measures."""

from .contenders import REFERENCE, parse_contender
from .predictions import markdown
from .results import Cell
from .statistics import ratio

# Steps that do the same work: who recomputes is held against blocks that do.
TRAINING_PAIRS = (
    ("infini", "blocks:recompute=true"),
    ("infini:recompute=false", REFERENCE),
    ("infini:order=layer", REFERENCE),
)


class Summary:
    """Ratios over all measures.

    Args:
        settings ([`BenchmarkSettings`]): what was to be measured.
        results ([`ResultFile`]): what was.
    """

    def __init__(self, settings, results):
        self.settings, self.results = settings, results

    def lines(self):
        """`list[str]`: a table, as lines of markdown; empty when there is nothing to hold against anything."""
        rows = [*self.prefill(), *self.full(), *self.training(), *self.package(), *self.far()]
        return markdown(["ratio of times, median of the turns (lowest–highest)", "", "at"], rows) if rows else []

    def runs(self, measure, text, tokens):
        return self.results.of(Cell(measure, text, tokens))

    def ratios(self, measure, one, other):
        """`dict[int, Ratio]`: at every length that both were measured at."""
        lengths = self.settings.lengths_of(measure)
        found = {n: ratio(self.runs(measure, one, n), self.runs(measure, other, n)) for n in lengths}
        return {tokens: value for tokens, value in found.items() if value is not None}

    def prefill(self):
        """Patched models over blocks, at the longest common length."""
        for text in self.settings.prefill:
            ratios = self.ratios("prefill", text, REFERENCE)
            if parse_contender(text)[0] == "infini" and ratios:
                longest = max(ratios)
                yield [f"prefill, `{text}` / `{REFERENCE}`", str(ratios[longest]), f"{longest:,}"]

    def full(self):
        """Where full attention falls behind, and by how much it has at the end."""
        for measure in ("prefill", "first_token", "decode", "training"):
            ratios = self.ratios(measure, "full", "infini")
            if not ratios:
                continue
            longest = max(ratios)
            name = measure.replace("_", " ")
            yield [f"{name}, `full` / `infini`", str(ratios[longest]), f"{longest:,}"]
            slower = [n for n in ratios if all(value.value > 1 for m, value in ratios.items() if m >= n)]
            yield [
                f"{name}, `full` is slower",
                f"from {min(slower):,}" if slower else "nowhere",
                f"{min(ratios):,} to {longest:,}",
            ]

    def training(self):
        """Steps over blocks that recompute alike."""
        for one, other in TRAINING_PAIRS:
            ratios = self.ratios("training", one, other)
            if ratios:
                longest = max(ratios)
                yield [f"training, `{one}` / `{other}`", str(ratios[longest]), f"{longest:,}"]

    def package(self):
        """Another implementation over this one."""
        for measure, ours in (("prefill", "infini"), ("training", "infini"), ("training", "infini:recompute=false")):
            ratios = self.ratios(measure, "package", ours)
            if ratios:
                longest = max(ratios)
                yield [f"{measure}, `package` / `{ours}`", str(ratios[longest]), f"{longest:,}"]

    def far(self):
        """Far from the beginning over near it."""
        for measure in ("read_on", "decode", "memory", "training_memory"):
            lengths = [n for n in self.settings.lengths_of(measure) if self.runs(measure, "infini", n)]
            if len(lengths) > 1:
                near, far = (self.runs(measure, "infini", n) for n in (lengths[0], lengths[-1]))
                kind = "peak" if far[0].mib is not None else "time"
                name = f"{measure.replace('_', ' ')}, {kind} far / near, `infini`"
                yield [name, str(ratio(far, near)), f"{lengths[-1]:,} / {lengths[0]:,}"]
