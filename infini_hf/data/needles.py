"""Facts hidden in filler text and asked for at the end: passkeys, named keys, named words.

Everything is a pure function of a `numpy.random.Generator`, so a row is reproduced by its seed. Keys are split by a
checksum: a key drawn for training is never drawn for a test.
"""

import re
import zlib
from dataclasses import dataclass

import numpy as np

PASSKEY_HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
JOINERS = (" ", "\n", "\n\n")

# Of a key: numbers are drawn as 64-bit integers.
MOST_DIGITS = 18
# Draws of a key that is none of those before it.
MOST_DRAWS = 1000
NAMES = (
    "Abel Ada Agnes Albert Alice Amos Anna Arthur Barbara Basil Beatrice Bertha Caleb Cecil Charlotte Clara Conrad "
    "Cora Daniel Dora Edgar Edith Edmund Eleanor Elias Eliza Emma Ernest Esther Eugene Eva Felix Flora Frances "
    "Francis George Gerald Grace Hannah Harold Harriet Helen Henry Herbert Hilda Horace Hugh Ida Irene Isaac Jane "
    "Jasper Joseph Julia Kate Laura Leonard Lewis Lucy Luke Mabel Margaret Martha Martin Matilda Maud Miriam Morris "
    "Nathan Nelly Nora Oliver Oscar Owen Patrick Paul Percy Philip Phoebe Rachel Ralph Rebecca Robert Roger Rosa "
    "Rupert Ruth Samuel Sarah Silas Simon Sophia Stephen Susan Sybil Theodore Thomas Victor Violet Walter"
).split()
WORDS = (
    "amber anchor apple arrow autumn badge barley basket beacon bell berry blanket bottle branch bread bridge bronze "
    "butter button candle canvas carpet castle cellar chalk cherry chimney circle clover copper coral cotton cradle "
    "crown curtain dagger daisy desert diamond dragon eagle ebony elbow ember falcon feather fiddle flannel forest "
    "fountain garden garnet ginger glacier granite hammer harbour harvest hazel helmet honey hunter island ivory "
    "jacket jewel kettle kitchen ladder lantern lavender leather lemon linen lizard marble meadow mirror monkey "
    "mountain mustard needle nutmeg ocean olive orchard oyster paddle palace paper parrot pebble pepper pillow "
    "planet pocket prairie quarry rabbit raven ribbon river saddle sailor scarlet shadow shelter silver spider "
    "spindle statue summer tailor temple thistle thunder timber trumpet tunnel turnip valley velvet violin walnut "
    "willow window winter yarrow"
).split()


@dataclass(frozen=True)
class Fact:
    """One thing to remember: the sentence that states it, the prompt that asks for it, the answer that follows it.

    Attributes:
        statement (`str`), prompt (`str`), answer (`str`): as said.
        name (`str`, *optional*): whom it belongs to; empty of a fact that is alone.
    """

    statement: str
    prompt: str
    answer: str
    name: str = ""


# Each begins and ends with what is no digit: where one gives way to a part of another, no longer number comes of it.
NUMBER_PHRASES = (
    " in {},",
    " {} ",
    " No. {}.",
    " of {} ",
    " {} miles",
    " CHAPTER {}.",
    " ({})",
    "-{}-",
    " £{} ",
    " {},",
)


def is_test_key(key):
    """Whether a key belongs to the tenth that is kept for tests."""
    return zlib.crc32(key.encode()) % 10 == 0


def draw_key(rng, digits=5, split="train", kinds=None):
    """A random number of `digits` digits, as text, from the `"train"` or the `"test"` part of the keys.

    With `kinds`, at least two digits, it is made of these alone.

    Raises:
        ValueError: for `kinds` in the test part, which two digits need not reach.
    """
    if kinds is not None and split == "test":
        raise ValueError(f"kinds={list(kinds)} with split='test': few digits make few keys; draw them for training")
    while True:
        if kinds is None:
            key = str(rng.integers(10 ** (digits - 1), 10**digits))
        else:
            key = "".join(map(str, rng.choice(kinds, digits)))
        if key[0] != "0" and is_test_key(key) == (split == "test"):
            return key


def passkey_fact(key):
    """The passkey of the benchmark (landmark attention; appendix B of arXiv 2404.07143)."""
    return Fact(
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
        key,
    )


def named_key_fact(name, key):
    """A passkey that belongs to somebody, so that one stream can hold many."""
    return Fact(
        f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.",
        f"What is the pass key of {name}? The pass key of {name} is",
        key,
        name,
    )


def named_word_fact(name, word):
    """A word that belongs to somebody."""
    return Fact(
        f"The secret word of {name} is {word}.",
        f"What is the secret word of {name}? The secret word of {name} is",
        word,
        name,
    )


def brief_fact(fact):
    """What a named fact comes down to: `Ada is 12345.`

    Raises:
        ValueError: when it belongs to nobody.
    """
    if not fact.name:
        raise ValueError(f"fact {fact.statement!r}: belongs to nobody; only a named fact has a brief form")
    return Fact(f"{fact.name} is {fact.answer}.", f"{fact.name} is", fact.answer, fact.name)


def first_answer(text, kind):
    """The first run of digits, or of a fact of the kind `"word"` the first word, of a generated text."""
    match = re.search(r"\d+" if kind != "word" else r"[A-Za-z]+", text)
    return match.group() if match else ""


def grass_filler(characters, offset=0):
    """`characters` characters of the benchmark's repeated sentence, from `offset` on (it may begin mid-sentence)."""
    unit = GRASS + " "
    offset %= len(unit)
    return (unit * ((characters + offset) // len(unit) + 1))[offset : offset + characters]


def draw_numbers(rng, most=6):
    """One to `most` phrases with a number as novels have them: years, amounts, chapters; four digits at most."""
    phrases = []
    for _ in range(int(rng.integers(1, most + 1))):
        if rng.random() < 0.5:
            number = int(rng.integers(1500, 2000))
        else:
            digits = int(rng.integers(1, 5))
            number = int(rng.integers(10 ** (digits - 1), 10**digits))
        phrases.append(str(rng.choice(NUMBER_PHRASES)).format(number))
    return phrases


def text_slice(rng, text, characters):
    """A random run of `characters` characters of `text`."""
    start = int(rng.integers(0, max(1, len(text) - characters)))
    return text[start : start + characters]


def hide(facts, filler, depths, joiner=" "):
    """`filler` with each fact's statement put in at its depth (0 = start, 1 = end), cut where the depth falls."""
    pieces, last = [], 0
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0]):
        cut = max(last, round(depth * len(filler)))
        pieces += [filler[last:cut].strip(), fact.statement]
        last = cut
    pieces.append(filler[last:].strip())
    return joiner.join(piece for piece in pieces if piece)


def draw_facts(rng, count, split="train", most_digits=7):
    """`count` facts of one random kind; several facts carry distinct names, and words that differ."""
    kind = "passkey" if count == 1 and rng.random() < 0.5 else str(rng.choice(["key", "word"]))
    return facts_of_kind(rng, kind, count, split, most_digits)


def facts_of_kind(rng, kind, count, split, most_digits, kinds=None, distinct=False):
    """`count` facts of the kind `"passkey"`, `"key"` or `"word"`; the latter two of distinct names.

    With `kinds` the keys are made of these digits alone; with `distinct` no two are the same.

    Raises:
        ValueError: when there are not so many different keys.
    """
    drawn = set()

    def key():
        for _ in range(MOST_DRAWS):
            found = draw_key(rng, int(rng.integers(5, most_digits + 1)), split, kinds)
            if not distinct or found not in drawn:
                drawn.add(found)
                return found
        raise ValueError(
            f"{count} different keys of 5 to {most_digits} digits, of {'all' if kinds is None else len(kinds)} kinds: "
            "there are not so many; fewer facts, or more digits"
        )

    if kind == "passkey":
        return [passkey_fact(key()) for _ in range(count)]
    names = [str(name) for name in rng.choice(NAMES, count, replace=False)]
    if kind == "key":
        return [named_key_fact(name, key()) for name in names]
    words = [str(word) for word in rng.choice(WORDS, count, replace=False)]
    return [named_word_fact(name, word) for name, word in zip(names, words, strict=True)]


@dataclass(frozen=True)
class RecallStyle:
    """What a recall document is made of.

    Args:
        least_facts (`int`, *optional*, defaults to `1`): the fewest facts.
        most_facts (`int`, *optional*, defaults to `6`): the most facts.
        fact_room (`int`, *optional*, defaults to `250`): characters of the document for each fact beyond the fewest.
        most_digits (`int`, *optional*, defaults to `7`): digits of the longest key; the shortest has five.
        ask_all (`bool`, *optional*, defaults to `False`): ask for every fact, not for a random part.
        grass_fraction (`float`, *optional*, defaults to `0.3`): share of documents in the benchmark's filler.
        repeat_fraction (`float`, *optional*, defaults to `0.1`): share of documents that quote a passage twice.
    """

    least_facts: int = 1
    most_facts: int = 6
    fact_room: int = 250
    most_digits: int = 7
    ask_all: bool = False
    grass_fraction: float = 0.3
    repeat_fraction: float = 0.1


# A small model learns to copy from the simplest documents first, then to tell facts apart by their names.
STYLES = {
    "simple": RecallStyle(most_facts=1, most_digits=5, repeat_fraction=0.0),
    "named": RecallStyle(least_facts=2, most_facts=4, fact_room=150, most_digits=5, ask_all=True, repeat_fraction=0.0),
    "mixed": RecallStyle(),
}


def recall_document(rng, text, characters, style=STYLES["mixed"], split="train"):
    """A document of about `characters` characters that can only be predicted by recalling its own beginning.

    Args:
        rng (`numpy.random.Generator`): the source of every draw.
        text (`str`): where novel filler is cut from.
        characters (`int`): the length aimed at.
        style ([`RecallStyle`], *optional*): what it is made of; `STYLES["mixed"]` by default.
        split (`str`, *optional*, defaults to `"train"`): the part of the keys to draw from.
    """
    if rng.random() < style.repeat_fraction:
        passage = text_slice(rng, text, max(40, int(characters * rng.uniform(0.2, 0.45))))
        filler = text_slice(rng, text, max(0, characters - 2 * len(passage)))
        return "\n\n".join(part for part in (passage, filler, passage) if part)
    most = max(style.least_facts, min(style.most_facts, characters // style.fact_room))
    facts = draw_facts(rng, int(rng.integers(style.least_facts, most + 1)), split, style.most_digits)
    order = rng.permutation(len(facts))
    count = len(facts) if style.ask_all else int(rng.integers(1, len(facts) + 1))
    asked = [facts[i] for i in order[:count]]
    fixed = sum(len(fact.statement) + 2 for fact in facts) + sum(len(f.prompt) + len(f.answer) + 3 for f in asked)
    room = max(0, characters - fixed)
    filler = (
        grass_filler(room, int(rng.integers(0, len(GRASS))))
        if rng.random() < style.grass_fraction
        else text_slice(rng, text, room)
    )
    joiner = str(rng.choice(JOINERS))
    body = hide(facts, filler, np.sort(rng.random(len(facts))), joiner)
    header = [PASSKEY_HEADER] if rng.random() < 0.3 and room > 2 * len(PASSKEY_HEADER) else []
    questions = [f"{fact.prompt} {fact.answer}." for fact in asked]
    return joiner.join([*header, body, *questions])
