"""What is hidden in a stream and asked at its end: a task draws the needles, the questions and the answers.

A task knows nothing of streams, models or memories: [`infini_hf.evaluation.needles`] places what it draws, reads, asks
and lets the task judge what was generated.
"""

from dataclasses import dataclass

from .needles import (
    MOST_DIGITS,
    MOST_DRAWS,
    NAMES,
    PASSKEY_HEADER,
    draw_key,
    first_answer,
    named_key_fact,
    passkey_fact,
)


@dataclass(frozen=True)
class Question:
    """A question at the end of a stream.

    Attributes:
        prompt (`str`): what the model continues.
        answers (`tuple[str]`): every value that the continuation should hold.
        needles (`tuple[int]`): for each answer, the needle that states it, counted from 0.
    """

    prompt: str
    answers: tuple[str, ...]
    needles: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """What one stream hides and is asked."""

    needles: tuple[str, ...]
    questions: tuple[Question, ...]


def check_digits(digits):
    # Shorter ones have too few in the test part.
    if not 3 <= digits <= MOST_DIGITS:
        raise ValueError(f"digits={digits}: must be from 3 to {MOST_DIGITS}")


def distinct(draw, count):
    """`count` different values of a function without arguments, in the order drawn.

    Raises:
        ValueError: when so many were not found.
    """
    values = []
    for _ in range(MOST_DRAWS * count):
        if (value := draw()) not in values:
            values.append(value)
        if len(values) == count:
            return values
    raise ValueError(
        f"{count} different values were asked for, and there are but {len(values)} such as {values[0]!r}; ask for "
        "fewer, or for more digits"
    )


def distinct_keys(rng, count, digits):
    """`count` different numbers from the test part of the keys, in the order drawn."""
    return distinct(lambda: draw_key(rng, digits, "test"), count)


def first_number(text, answers):
    """The first run of digits of a generated text, and whether it is the answer: `(answered, found)`."""
    answered = first_answer(text, "key")
    return answered, int(answered == answers[0])


@dataclass(frozen=True)
class PasskeyTask:
    """The benchmark's passkey (landmark attention; appendix B of arXiv 2404.07143).

    Args:
        digits (`int`, *optional*, defaults to `5`): digits of a key, which is of the test part.

    Raises:
        ValueError: for fewer than three digits, or more than a number that is drawn can have.
    """

    digits: int = 5
    name = "passkey"
    header = PASSKEY_HEADER
    needles = 1

    def __post_init__(self):
        check_digits(self.digits)

    @property
    def answer_tokens(self):
        # The digits, and what may stand before them.
        return self.digits + 5

    def draw(self, rng):
        fact = passkey_fact(draw_key(rng, self.digits, "test"))
        return Trial((fact.statement,), (Question(fact.prompt, (fact.answer,), (0,)),))

    def judge(self, text, answers):
        return first_number(text, answers)


@dataclass(frozen=True)
class NamedTask:
    """Passkeys that belong to somebody, several in a stream, each asked for from a copy of the same memory.

    Args:
        needles (`int`, *optional*, defaults to `8`): keys in a stream, each of another name.
        digits (`int`, *optional*, defaults to `5`): digits of a key, which is of the test part.

    Raises:
        ValueError: for more keys than there are names, or digits that are too few or too many.
    """

    needles: int = 8
    digits: int = 5
    name = "named"
    header = PASSKEY_HEADER

    def __post_init__(self):
        if not 1 <= self.needles <= len(NAMES):
            raise ValueError(f"needles={self.needles}: must be from 1 to {len(NAMES)}, the names there are")
        check_digits(self.digits)

    @property
    def answer_tokens(self):
        return self.digits + 5

    def draw(self, rng):
        names = rng.choice(NAMES, self.needles, replace=False)
        keys = distinct_keys(rng, self.needles, self.digits)
        facts = [named_key_fact(name, key) for name, key in zip(names, keys, strict=True)]
        return Trial(
            tuple(fact.statement for fact in facts),
            tuple(Question(fact.prompt, (fact.answer,), (place,)) for place, fact in enumerate(facts)),
        )

    def judge(self, text, answers):
        return first_number(text, answers)
