"""The needle tasks of RULER (arXiv 2404.06654, section 3), in words of our own: keys with values, some asked for."""

import re
import uuid
from dataclasses import dataclass

from .needle_tasks import Question, Trial, check_digits, distinct
from .needles import WORDS, Fact, draw_key, is_test_key

# What is asked of the needles of a stream, and how many there are by default.
KINDS = {"single": 1, "multikey": 4, "multivalue": 4, "multiquery": 4}
KEYS = ("words", "uuids")
VALUES = ("numbers", "words", "uuids")
# Tokens of a value, at most one for each character, and of what joins it to the next.
VALUE_TOKENS = {"words": 20, "uuids": 44}


def draw_pair(rng, split):
    """Two words as one, such as `amber-castle`, from the `"train"` or the `"test"` part."""
    while True:
        pair = "-".join(rng.choice(WORDS, 2, replace=False))
        if is_test_key(pair) == (split == "test"):
            return pair


def draw_value(rng, kind, digits, split):
    """A number, a pair of words or a UUID, as text; those of the two parts never meet."""
    if kind == "numbers":
        return draw_key(rng, digits, split)
    if kind == "words":
        return draw_pair(rng, split)
    # One of 2^122: no two are alike.
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def draw_values(rng, count, kind, digits, split="test"):
    """`count` different ones, in the order drawn."""
    return distinct(lambda: draw_value(rng, kind, digits, split), count)


@dataclass(frozen=True)
class RulerTask:
    """Keys with values in a stream, and one question at its end.

    Args:
        kind (`str`, *optional*, defaults to `"single"`):
            `"single"`: one needle, asked for. `"multikey"`: several keys, one of which is asked for. `"multivalue"`:
            one key with several values, all asked for. `"multiquery"`: several keys, all asked for at once.
        needles (`int`, *optional*): needles in a stream; one, or four of a kind with several.
        keys (`str`, *optional*, defaults to `"words"`): `"words"` or `"uuids"`.
        values (`str`, *optional*, defaults to `"numbers"`): `"numbers"`, `"words"` or `"uuids"`.
        digits (`int`, *optional*, defaults to `5`): digits of a number.

    Raises:
        ValueError: when a value is out of range; the message names it and the range.
    """

    kind: str = "single"
    needles: int | None = None
    keys: str = "words"
    values: str = "numbers"
    digits: int = 5

    def __post_init__(self):
        for name, choices in (("kind", tuple(KINDS)), ("keys", KEYS), ("values", VALUES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, choices))}")
        object.__setattr__(self, "needles", KINDS[self.kind] if self.needles is None else self.needles)
        most = 1 if self.kind == "single" else 64
        if not 1 <= self.needles <= most:
            raise ValueError(f"needles={self.needles}: must be from 1 to {most} for the kind {self.kind!r}")
        check_digits(self.digits)

    @property
    def name(self):
        return f"ruler-{self.kind}"

    @property
    def header(self):
        return (
            f"There are special magic {self.values} hidden in the text below. Remember them for the question after it."
        )

    @property
    def answer_tokens(self):
        expected = 1 if self.kind in ("single", "multikey") else self.needles
        return 10 + expected * VALUE_TOKENS.get(self.values, self.digits + 6)

    def sentence(self, key, value):
        return f"One of the special magic {self.values} for {key} is: {value}."

    def draw(self, rng):
        keys = draw_values(rng, 1 if self.kind == "multivalue" else self.needles, self.keys, self.digits)
        values = draw_values(rng, self.needles, self.values, self.digits)
        owners = keys * self.needles if self.kind == "multivalue" else keys
        needles = tuple(self.sentence(key, value) for key, value in zip(owners, values, strict=True))
        asked = 1 if self.kind in ("single", "multikey") else self.needles
        prompt = self.question(owners[:1] if self.kind != "multiquery" else keys, asked)
        return Trial(needles, (Question(prompt, tuple(values[:asked]), tuple(range(asked))),))

    def question(self, keys, asked):
        """The prompt that asks for `asked` values of some keys."""
        listed = " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
        if asked == 1:
            what = self.values[:-1]
            return (
                f"What is the special magic {what} for {listed} in the text? The special magic {what} for {listed} is"
            )
        what = f"special magic {self.values} for {listed}"
        return f"What are all the {what} in the text? The {what} are"

    def distractor(self, rng):
        """A sentence like a needle, of a key and a value that no question asks for."""
        key = draw_value(rng, self.keys, self.digits, "train")
        return self.sentence(key, draw_value(rng, self.values, self.digits, "train"))

    def judge(self, text, answers):
        """The generated text on one line, and how many of the answers stand in it as a whole."""
        text = " ".join(text.split())
        # Not as a part of a word or of a longer number, 12,345 or 12345.6.
        before, after = r"(?<![\w-])(?<!\d[.,])", r"(?![\w-])(?![.,]\d)"
        found = sum(bool(re.search(f"{before}{re.escape(answer)}{after}", text)) for answer in answers)
        return text, found


def ruler_facts(rng, count, values, most_digits, split="train"):
    """`count` facts in the sentences of RULER, of distinct keys, each with a prompt of its own: for training rows.

    Args:
        rng (`numpy.random.Generator`): the source of every draw.
        count (`int`): how many.
        values (`str`): `"numbers"`, of five to `most_digits` digits, or `"words"`.
        most_digits (`int`): of the longest number.
        split (`str`, *optional*, defaults to `"train"`): the part that keys and values are drawn from.

    Returns:
        `list[Fact]`: the key is the name of each; a fact that is alone has none.
    """
    task = RulerTask("multikey", values=values)
    facts = []
    for key in draw_values(rng, count, task.keys, most_digits, split):
        value = draw_value(rng, values, int(rng.integers(5, most_digits + 1)), split)
        facts.append(Fact(task.sentence(key, value), task.question([key], 1), value, key if count > 1 else ""))
    return facts
