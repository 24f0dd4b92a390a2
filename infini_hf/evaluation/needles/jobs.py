"""What is left to do of an evaluation: which streams are read together, and how they are asked."""

from collections import Counter
from dataclasses import dataclass

from .streams import Cell


@dataclass(frozen=True)
class Job:
    """Streams that are read together: some numbers of one haystack and length, at the depths still to be asked.

    Attributes:
        haystack (`str`), tokens (`int`): what all of them have in common.
        numbers (`list[int]`): the rows.
        layouts (`dict[Cell, list[Layout]]`): for each cell, the stream of every row.
        controls (`tuple[str]`): how they are asked.
    """

    haystack: str
    tokens: int
    numbers: list[int]
    layouts: dict[Cell, list]
    controls: tuple[str, ...]


def plan_jobs(cells, numbers, haystacks, samples, controls, batch_size):
    """The [`Job`]s that are left to do, in the order of the cells.

    Args:
        cells (`list[Cell]`): all cells.
        numbers (`list[int]`): the streams of each.
        haystacks ([`Haystacks`]): where streams come from.
        samples (`list[Sample]`): what is there already.
        controls (`tuple[str]`): how streams are asked.
        batch_size (`int`): rows of a job.
    """
    asked = Counter((sample.cell, sample.number, sample.control) for sample in samples)
    groups = {}
    for cell in cells:
        groups.setdefault((cell.haystack, cell.tokens), []).append(cell)
    jobs = []
    for (haystack, tokens), group in groups.items():
        for batch in batches_of(numbers, batch_size):
            # Of a batch of one there is no other stream, nor a claim to make.
            kept = tuple(control for control in controls if control != "other" or len(batch) > 1)
            layouts = {cell: [haystacks.layout(cell, number) for number in batch] for cell in group}
            missing = {
                (cell, control)
                for cell, rows in layouts.items()
                for number, row in zip(batch, rows, strict=True)
                for control in kept
                if asked[cell, number, control] < len(row.trial.questions)
            }
            if missing:
                cells_left, ways_left = map(set, zip(*missing, strict=True))
                left = {cell: rows for cell, rows in layouts.items() if cell in cells_left}
                ways = tuple(control for control in kept if control in ways_left)
                jobs.append(Job(haystack, tokens, batch, left, ways))
    return jobs


def batches_of(numbers, batch_size):
    """Runs of `batch_size` numbers; a last one that would be alone takes one of the batch before, or joins a pair."""
    batches = [list(numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        if batch_size == 2:
            lone = batches.pop()
            batches[-1] += lone
        elif batch_size > 2:
            batches[-1].insert(0, batches[-2].pop())
    return batches
