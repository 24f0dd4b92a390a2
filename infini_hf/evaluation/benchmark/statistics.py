"""Medians of runs, and ratios of runs that were taken one after the other."""

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """How the time of one cell stands to that of another.

    Attributes:
        value (`float`): the median of the ratios of runs of the same turn; of the medians where they share no turn.
        lowest (`float`, *optional*), highest (`float`, *optional*): of those ratios; `None` where there are none.
        turns (`int`): how many there are.
    """

    value: float
    lowest: float | None = None
    highest: float | None = None
    turns: int = 0

    def __str__(self):
        form = ".3f" if self.value < 10 else ".1f"
        if not self.turns:
            return f"{self.value:{form}} †"
        spread = f" ({self.lowest:{form}}–{self.highest:{form}})" if self.turns > 1 else ""
        return f"{self.value:{form}}{spread}"


def size_of(run):
    """What is compared of a run: its peak where it has one, else its time."""
    return run.seconds if run.mib is None else run.mib


def ratio(runs, others):
    """The [`Ratio`] of the runs of one cell to those of another; `None` when either has none.

    A slow moment of the machine meets runs of one turn alike, so that it cancels in their ratio, and not in a ratio of
    medians.

    Args:
        runs (`list[Run]`): of the cell.
        others (`list[Run]`): of what it is held against.
    """
    if not runs or not others:
        return None
    turns = {run.turn: size_of(run) for run in others}
    ratios = [size_of(run) / turns[run.turn] for run in runs if run.turn in turns]
    if not ratios:
        return Ratio(median(map(size_of, runs)) / median(map(size_of, others)))
    return Ratio(median(ratios), min(ratios), max(ratios), len(ratios))
