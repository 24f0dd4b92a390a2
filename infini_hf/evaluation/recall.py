"""In-context recall: facts hidden in a text, asked for at its end, judged by what the model generates."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..data.needles import facts_of_kind, first_answer, grass_filler, hide

KINDS = ("passkey", "key", "word")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class RecallSample:
    """One question with what was asked, expected and answered."""

    kind: str
    haystack: str
    tokens: int
    depth: float
    expected: str
    answered: str

    @property
    def correct(self):
        return self.expected == self.answered

    def to_dict(self):
        return {**asdict(self), "correct": self.correct}


def wilson_interval(successes, trials, z=1.96):
    """The Wilson score interval of a proportion, `(low, high)`."""
    if not trials:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (centre - spread) / (1 + z * z / trials)), min(1.0, (centre + spread) / (1 + z * z / trials))


def build_prompt(rng, kind, haystack, text, characters, depth, facts=1, state=True):
    """A prompt of about `characters` characters that asks for one fact at `depth` (or, as a control, nowhere).

    Other facts of the same kind lie at random depths. Returns the prompt and the fact asked for.
    """
    asked, *others = facts_of_kind(rng, kind, facts, "test", most_digits=5)
    hidden = [(depth, asked)] * state + [(rng.random(), fact) for fact in others]
    room = max(0, characters - sum(len(fact.statement) + 2 for _, fact in hidden) - len(asked.prompt))
    if haystack == "grass":
        filler = grass_filler(room, int(rng.integers(0, 90)))
    else:
        start = int(rng.integers(0, max(1, len(text) - room)))
        filler = text[start : start + room]
    body = hide([fact for _, fact in hidden], filler, [place for place, _ in hidden], "\n")
    return f"{body}\n{asked.prompt}", asked


@torch.no_grad()
def context_recall(model, tokenizer, text, tokens, samples, kinds=KINDS, depths=DEPTHS, seed=0, facts=1, state=True):
    """Ask a model for facts inside its context, in novel text and in grass filler.

    Args:
        model: a causal model, patched or not.
        tokenizer: its tokenizer.
        text (`str`): where novel filler is cut from.
        tokens (`int`): length of a prompt, about.
        samples (`int`): questions for each kind, haystack and depth.
        kinds (`tuple[str]`, *optional*): `"passkey"`, `"key"` (named keys), `"word"` (named words).
        depths (`tuple[float]`, *optional*): where the fact lies, 0 at the start.
        seed (`int`, *optional*, defaults to `0`): of every draw.
        facts (`int`, *optional*, defaults to `1`): facts of the kind in a prompt, of which one is asked for.
        state (`bool`, *optional*, defaults to `True`): whether the fact asked for is stated; if not, chance is left.

    Returns:
        `list[RecallSample]`
    """
    rng = np.random.default_rng(seed)
    results = []
    for kind in kinds:
        for haystack in ("novel", "grass"):
            # Grass is cheaper: about 4.3 characters a token against 3.3 in novels with needles.
            characters = int(tokens * (4.0 if haystack == "grass" else 3.2))
            for depth in depths:
                for _ in range(samples):
                    prompt, fact = build_prompt(rng, kind, haystack, text, characters, depth, facts, state)
                    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                    out = model.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
                    answer = first_answer(tokenizer.decode(out[0, ids.shape[1] :]), kind)
                    results.append(RecallSample(kind, haystack, ids.shape[1], depth, fact.answer, answer))
    return results
