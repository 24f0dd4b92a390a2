"""A needle evaluation from cells to samples: a batch of streams that the file holds is not read again."""

import json
from dataclasses import asdict

import numpy as np
from tqdm.auto import tqdm

from ...cache import InfiniCache
from ..reader import reader_of
from .baselines import BASELINES, baseline
from .forks import read, read_forked, tokens_to_read
from .jobs import plan_jobs
from .questions import ASKED_ALIKE, ask_with
from .samples import Sample


def describe(model, haystacks):
    """What an evaluation is of, as a dict that JSON can hold: samples of two that differ never share a file.

    Args:
        model (`PreTrainedModel`): a patched model.
        haystacks ([`Haystacks`]): where its streams come from.
    """
    task, read_by = haystacks.task, reader_of(model)
    start = haystacks.start.tolist()
    return {
        **{**read_by, "model": json.loads(read_by["model"]), "patch": json.loads(read_by["patch"])},
        **({"start": start} if start else {}),
        "task": {"name": task.name, **asdict(task)},
        "seed": haystacks.seed,
        "texts": haystacks.texts_digest,
    }


class NeedleRun:
    """A model, its streams and the file of its samples, through an evaluation.

    Args:
        model (`PreTrainedModel`): a patched model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        haystacks ([`Haystacks`]): where streams come from.
        file ([`SampleFile`]): of all samples; it grows after every batch of every cell.
        chunk_size (`int`, *optional*, defaults to `2048`): columns in a forward; speed and peak memory only.
    """

    def __init__(self, model, tokenizer, haystacks, file, chunk_size=2048):
        self.model, self.tokenizer, self.haystacks = model, tokenizer, haystacks
        self.file, self.chunk_size = file, chunk_size

    def forked(self, job, bar):
        """Read the streams of a job, what they share once, and ask them."""
        for cell, cache in read_forked(self.model, self.trunk(job), job.layouts, bar, self.chunk_size):
            self.ask(job, cell, cache)

    def alone(self, job, bar):
        """Read the streams of a job as a baseline reads them, from where they can matter to it, and ask them."""
        trunk = self.trunk(job)
        for cell, layouts in job.layouts.items():
            with self.baseline(job, cell) as start:
                cache = InfiniCache(self.model.config)
                ids = [layout.fill(row)[start:] for layout, row in zip(layouts, trunk, strict=True)]
                read(self.model, np.stack(ids), cache, bar, self.chunk_size)
                self.ask(job, cell, cache)

    def tokens_alone(self, job):
        """`int`: tokens that [`alone`] reads, all rows counted."""
        total = 0
        for cell in job.layouts:
            with self.baseline(job, cell) as start:
                total += len(job.numbers) * (cell.tokens - start)
        return total

    def baseline(self, job, cell):
        """The context in which a job of one baseline reads and asks the streams of a cell."""
        questions = [question for layout in job.layouts[cell] for question in layout.trial.questions]
        longest = max(len(self.prompt(question)) for question in questions)
        return baseline(self.model, job.controls[0], cell.tokens, longest + self.haystacks.task.answer_tokens)

    def trunk(self, job):
        return np.stack([self.haystacks.trunk(job.haystack, job.tokens, number) for number in job.numbers])

    def prompt(self, question):
        return self.haystacks.encode("\n" + question.prompt)

    def ask(self, job, cell, cache):
        """Ask everything of the streams that a cache has read, and put it on the disk."""
        task, layouts, new = self.haystacks.task, job.layouts[cell], []
        known = {sample.identity for sample in self.file.samples}
        for control in job.controls:
            for index in range(len(layouts[0].trial.questions)):
                questions = [layout.trial.questions[index] for layout in layouts]
                prompts = [self.prompt(question) for question in questions]
                texts = ask_with(control, self.model, self.tokenizer, cache, prompts, task.answer_tokens)
                for number, layout, question, text in zip(job.numbers, layouts, questions, texts, strict=True):
                    answered, found = task.judge(text, question.answers)
                    new.append(
                        Sample(
                            **asdict(cell),
                            number=number,
                            question=index,
                            place=layout.place(question.needles[0]),
                            control=control,
                            expected=question.answers,
                            answered=answered,
                            found=found,
                        )
                    )
        self.file.append([sample for sample in new if sample.identity not in known])


def run_needles(
    model,
    tokenizer,
    cells,
    numbers,
    haystacks,
    file,
    controls=ASKED_ALIKE,
    batch_size=8,
    chunk_size=2048,
    full_up_to=8192,
    progress=True,
):
    """Read the streams of every cell and ask their questions under every control.

    Args:
        model (`PreTrainedModel`): a patched model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        cells (`list[Cell]`): the cells of the table.
        numbers (`list[int]`): the streams of each cell.
        haystacks ([`Haystacks`]): where streams come from.
        file ([`SampleFile`]): of all samples; it grows after every batch of every cell.
        controls (`tuple[str]`, *optional*): of one reading, `"memory"`, `"closed"` (gates shut while asking) and
            `"other"` (the memory of another stream of the batch while asking; a batch of one has none); of readings
            with the gates shut throughout, `"window"` (the model's own), `"local"` (blocks), `"txl"` (a segment of
            overlap) and `"full"` (full attention).
        batch_size (`int`, *optional*, defaults to `8`): streams read at once.
        chunk_size (`int`, *optional*, defaults to `2048`): columns in a forward; speed and peak memory only.
        full_up_to (`int`, *optional*, defaults to `8192`): the longest stream, in tokens, that `"full"` reads.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
    """
    run = NeedleRun(model, tokenizer, haystacks, file, chunk_size)
    shared = tuple(control for control in controls if control in ASKED_ALIKE)

    def plan(ways, cells=cells):
        return plan_jobs(cells, list(numbers), haystacks, file.samples, ways, batch_size)

    forked, alone = plan(shared), []
    for name in BASELINES:
        if name in controls:
            alone += plan((name,), [cell for cell in cells if name != "full" or cell.tokens <= full_up_to])
    total = sum(tokens_to_read(job.layouts) for job in forked) + sum(map(run.tokens_alone, alone))
    with tqdm(total=total, unit="tok", unit_scale=True, desc="needles", disable=not progress) as bar:
        for reading, jobs in ((run.alone, alone), (run.forked, forked)):
            for job in jobs:
                bar.set_postfix_str(f"{job.haystack} {job.tokens}")
                reading(job, bar)
