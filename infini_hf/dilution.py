"""Memory dilution: short rows that look, to whatever reads the memory, like the end of a long history.

The linear write is a sum, so a segment read α times over writes α times as much. Scaling a row's writes by random α
during training shows the model how little of a needle is left among a thousand times as many distractors, at no cost.
"""

import logging
from collections import deque

import numpy as np
import torch

logger = logging.getLogger(__name__)

RAMPS = ("clock", "accuracy", "none")
# The clock: no dilution before retrieval can have been learned, the whole of it for the last part.
FIRST, LAST = 0.3, 0.7
# Answers that a running accuracy is taken over.
WINDOW = 400


class MemoryDilution:
    """How strongly writes are scaled at the moment, and the scales of a row.

    Args:
        highest (`float`): the most that a write is scaled by at the end of the ramp; 1 is off.
        probability (`float`): share of a row's segments whose write is scaled.
        ramp (`str`): `"clock"` raises the scale between 30 % and 70 % of the steps, log-linearly; `"accuracy"` doubles
            it whenever the running accuracy of the answers passes `threshold`; `"none"` begins with the whole of it,
            for a model that retrieves already.
        threshold (`float`): that accuracy, of 1.
    """

    def __init__(self, highest, probability=0.5, ramp="clock", threshold=0.9):
        self.highest, self.probability, self.ramp, self.threshold = highest, probability, ramp, threshold
        self.warned = False
        self.restore(None)

    def advance(self, progress):
        """Move the clock to `progress`, the share of the steps that is done, 0 to 1."""
        if self.ramp == "clock":
            share = min(1.0, max(0.0, (progress - FIRST) / (LAST - FIRST)))
            self.strength = self.highest**share
        elif self.ramp == "none":
            self.strength = self.highest

    def note(self, correct, asked):
        """Count the answers of a step, and double the strength when enough of the last ones were right."""
        if not asked:
            return
        self.answers.append((correct, asked))
        while sum(count for _, count in self.answers) - self.answers[0][1] >= WINDOW:
            self.answers.popleft()
        full = sum(count for _, count in self.answers) >= WINDOW
        if self.ramp == "accuracy" and full and self.accuracy >= self.threshold and self.strength < self.highest:
            self.strength = min(self.highest, 2 * self.strength)
            self.answers.clear()

    @property
    def accuracy(self):
        """Share of right answers among the last ones, or `None` before the first."""
        asked = sum(count for _, count in self.answers)
        return sum(right for right, _ in self.answers) / asked if asked else None

    def draw(self, batch, segments, *seed):
        """Scales `(batch, segments)` float32: 1, or with the given probability α, log-uniform up to the strength.

        Drawn from the whole numbers `seed` alone, so that every micro-batch of every rank has its own, and a resumed
        run the same.
        """
        if self.strength <= 1.0:
            return None
        exponents, chances = np.random.default_rng(seed).random((2, batch, segments), dtype=np.float32)
        scale = self.strength ** torch.from_numpy(exponents)
        return torch.where(torch.from_numpy(chances) < self.probability, scale, 1.0)

    @classmethod
    def from_args(cls, args):
        """As [`InfiniTrainingArguments`] say."""
        return cls(*(getattr(args, f"memory_dilution{name}") for name in ("", "_probability", "_ramp", "_threshold")))

    def metrics(self):
        """What is logged: the strength, where dilution is on, and the running accuracy of the answers."""
        if self.ramp == "accuracy" and self.highest > 1.0 and not self.answers and not self.warned:
            self.warned = True
            logger.warning(
                "memory_dilution=%g by accuracy, and no answer was counted before this log: it stays off. Give the "
                "rows loss_weights above 1 at their answers, or take memory_dilution_ramp='clock'",
                self.highest,
            )
        found = {} if self.highest <= 1.0 else {"memory_dilution": self.strength}
        return found if self.accuracy is None else {**found, "answer_accuracy": self.accuracy}

    def state(self):
        """What a checkpoint keeps."""
        return {"strength": self.strength, "answers": list(self.answers)}

    def restore(self, state):
        """Go on from what [`state`] returned, or, from `None`, begin."""
        state = {"strength": 1.0, "answers": []} if state is None else state
        # The run that goes on may ask for less than the one before, or for none.
        self.strength = min(state["strength"], self.highest)
        self.answers = deque(tuple(pair) for pair in state["answers"])
