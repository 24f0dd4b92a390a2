"""A benchmark from its settings to its runs: contenders in turns, projected times, contexts read once."""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from tqdm.auto import tqdm

from .contender import Missing, build_model
from .contenders import make_contender
from .costs import context_bytes, projected_seconds
from .machine import speed_probes, time_of
from .peaks import peak_of
from .results import Cell
from .settings import PEAKS

AFTER_CONTEXT = ("read_on", "decode")
PROBES = "machine"


@dataclass
class Job:
    """Runs of a cell that are still to be taken: who, what is read or gone on from, and how often."""

    cell: Cell
    contender: Any
    count: int
    state: Any = None


class Benchmark:
    """The contenders and the contexts that they have read, through all measures.

    Args:
        settings ([`BenchmarkSettings`]): what is measured.
        results ([`ResultFile`]): what has been; it grows run by run.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
    """

    def __init__(self, settings, results, progress=True):
        self.settings, self.results = settings, results
        self.device = torch.device(settings.device)
        self.weights, self.contenders, self.contexts = None, {}, {}
        total = settings.repeats * sum(len(group) for measure in settings.measures for group in self.groups(measure))
        self.bar = tqdm(total=total, unit="run", desc="benchmark", disable=not progress)

    def run(self):
        """Measure every cell that is not yet in the results."""
        if self.settings.device == "cpu":
            torch.set_num_threads(self.settings.threads)
        with self.bar:
            for measure in self.settings.measures:
                for cells in self.groups(measure):
                    self.take_turns([job for cell in cells if (job := self.attempt(cell, self.plan, cell))])
                if measure == "decode":
                    # The longest contexts are gigabytes under full attention.
                    self.contexts.clear()

    def groups(self, measure):
        """`list[list[Cell]]`: the cells of a measure that are taken in turns."""
        settings = self.settings
        rows = [
            [Cell(measure, text, tokens) for text in settings.contenders_of(measure)]
            for tokens in settings.lengths_of(measure)
        ]
        # After a context it is the lengths that are held against each other.
        return [list(chain(*rows))] if measure in AFTER_CONTEXT else rows

    def attempt(self, cell, function, *args):
        """What a function returns, or `None` with a note where something is missing, memory too."""
        self.bar.set_postfix_str(f"{cell.measure} {cell.contender} {cell.tokens:,}", refresh=False)
        try:
            return function(*args)
        except Missing as missing:
            return self.skip(cell, str(missing))
        except torch.OutOfMemoryError:
            return self.skip(cell, "out of memory")
        except BrokenProcessPool:
            return self.skip(cell, "its process was ended, as when there is no memory left")

    def skip(self, cell, note):
        """Say why a cell has no runs."""
        self.results.add(cell, note=note)
        self.bar.update(self.settings.repeats)

    # Before the runs.

    def plan(self, cell):
        """The [`Job`] of a cell; `None` when nothing is left to do, or can be done, of which there is a note."""
        done, projected = len(self.results.of(cell)), self.results.seconds(cell)
        wanted = 1 if cell.measure in PEAKS else self.settings.repeats
        if done and done >= min(wanted, self.fitting(projected)):
            self.bar.update(self.settings.repeats)
            return None
        shorter = self.results.below(cell)
        if projected is None and shorter is not None:
            projected = projected_seconds(self.results.seconds(shorter), shorter, cell, self.settings)
        if projected is not None and not self.fitting(projected):
            return self.too_long(cell, projected)
        if cell.measure in PEAKS:
            return self.counted(Job(cell, None, wanted), done)
        job = Job(cell, self.contender_of(cell), wanted)
        if cell.measure in AFTER_CONTEXT and not self.prepare(job):
            return None
        projected = self.warm_up(job, projected)
        job.count = min(wanted, self.fitting(projected))
        return self.counted(job, done) if job.count else self.too_long(cell, projected)

    def counted(self, job, done):
        """A job without the runs that it has behind it."""
        job.count = max(0, job.count - done)
        self.bar.update(self.settings.repeats - job.count)
        return job

    def prepare(self, job):
        """Give a job the context that it goes on from; false with a note when that is too much."""
        cell, settings = job.cell, self.settings
        gib = context_bytes(cell.contender, settings, cell.tokens) / 2**30
        if gib > settings.most_gib:
            self.skip(cell, f"{gib:.1f} GiB of keys and values, most_gib={settings.most_gib:g}")
            return False
        seconds = self.reading_seconds(job.contender, cell.tokens)
        if seconds > settings.most_seconds:
            self.too_long(cell, seconds)
            return False
        job.state = self.state_of(job.contender, cell)
        return True

    def fitting(self, seconds):
        """How many runs of so many seconds a cell has the time for; 0 if one is too long."""
        if seconds > self.settings.most_seconds:
            return 0
        return max(1, int(self.settings.cell_seconds // max(seconds, 1e-9)))

    def too_long(self, cell, seconds):
        return self.skip(cell, f"would take about {seconds:,.3g} s, most_seconds={self.settings.most_seconds:g}")

    def contender_of(self, cell):
        """The contender of a cell, built when it is first asked for."""
        if cell.contender not in self.contenders:
            if self.weights is None:
                self.weights = build_model(self.settings).state_dict()
            made = make_contender(cell.contender, self.settings, self.weights)
            for other in self.contenders.values():
                if other.context_key == made.context_key:
                    # A patched model refuses a context that another one has read.
                    made.model = other.model
            self.contenders[cell.contender] = made
        return self.contenders[cell.contender]

    def warm_up(self, job, projected):
        """Run once, over at most `warmup_tokens`; the projected seconds of a run, from a second one if need be."""
        cell = job.cell
        short = replace(cell, tokens=min(cell.tokens, self.settings.warmup_tokens))
        self.timed(job, short.tokens)
        if projected is not None:
            return projected
        # The first run may have compiled and allocated what no later one does.
        seconds = self.timed(job, short.tokens)["seconds"]
        return seconds if cell.measure in AFTER_CONTEXT else projected_seconds(seconds, short, cell, self.settings)

    def start_of(self, contender, tokens):
        """The longest context of at most so many tokens that was read, and what is left of it."""
        read = self.contexts.get(contender.context_key, {})
        start = max((length for length in read if length <= tokens), default=0)
        return start, read.get(start)

    def reading_seconds(self, contender, tokens):
        """What reading the context of a cell will take."""
        left = tokens - self.start_of(contender, tokens)[0]
        if not contender.READS_CONTEXT or not left:
            return 0.0
        sample = min(self.settings.warmup_tokens, left)
        with torch.no_grad():
            contender.read(contender.ids(sample))
            took = time_of(lambda: contender.read(contender.ids(sample)), self.device)
        return took["seconds"] * left / sample

    def state_of(self, contender, cell):
        """What is left of the context of a cell, half a segment more for decoding."""
        start, state = self.start_of(contender, cell.tokens)
        with torch.no_grad():
            if start < cell.tokens:
                state = contender.after(cell.tokens - start, state)
                self.contexts.setdefault(contender.context_key, {})[cell.tokens] = state
            half = self.settings.segment_length // 2
            return contender.after(half, state) if cell.measure == "decode" else state

    # The runs.

    def take_turns(self, jobs):
        """Run all jobs once, then once again …; every other time backwards, so that a drift meets both alike."""
        probes = speed_probes(self.settings) if jobs and jobs[0].cell.measure == "prefill" else {}
        for repeat in range(max((job.count for job in jobs), default=0)):
            for name, probe in probes.items():
                probe()
                self.results.add(Cell(PROBES, name, 0), repeat=repeat, **time_of(probe, self.device))
            for job in jobs if repeat % 2 == 0 else reversed(jobs):
                if repeat < job.count:
                    self.attempt(job.cell, self.take, job, repeat)

    def take(self, job, repeat):
        """One run, into the results."""
        peak = job.cell.measure in PEAKS
        found = peak_of(self.settings, job.cell) if peak else self.timed(job, job.cell.tokens)
        self.results.add(job.cell, repeat=repeat, **found)
        self.bar.update()

    def timed(self, job, tokens):
        """The times of one run over so many tokens, or after the context of the job."""
        contender, measure, settings = job.contender, job.cell.measure, self.settings
        ids = contender.ids(settings.piece_tokens if measure == "read_on" else tokens)
        run = {
            "prefill": lambda: contender.read(ids),
            "first_token": lambda: contender.answer(ids),
            "read_on": lambda: contender.read_on(job.state, ids),
            "decode": lambda: contender.decode(job.state, settings.new_tokens),
            "training": lambda: contender.train(ids),
        }[measure]
        try:
            with torch.set_grad_enabled(measure == "training"):
                return time_of(run, self.device)
        finally:
            if measure == "training":
                contender.clear()
