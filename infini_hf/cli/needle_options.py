"""Options of `infini-hf passkey` that are lists, from the text that a user gives."""

from ..data.ruler_tasks import RulerTask
from ..evaluation.needles.streams import DEPTHS, HAYSTACKS, SPREAD, STRADDLING
from ..evaluation.needles.tables import CONTROLS

UNITS = {"k": 1024, "m": 1024 * 1024}


def parse_lengths(text):
    """`"4k,32k"` as 4,096 and 32,768 tokens."""
    return [parse_length(part.strip()) for part in text.split(",")]


def parse_length(text):
    number, unit = (text[:-1], UNITS[text[-1].lower()]) if text[-1:].lower() in UNITS else (text, 1)
    try:
        length = int(float(number) * unit)
    except (ValueError, OverflowError):
        length = 0
    if length < 1:
        raise ValueError(f"--lengths {text!r}: give numbers of tokens, such as 4k,32k,1m")
    return length


def parse_depths(text, task):
    """Numbers from 0 to 1 and names; by default all that the task allows."""
    if not text:
        return [*DEPTHS, STRADDLING] if task.needles == 1 else [SPREAD]
    places = [parse_depth(part.strip()) for part in text.split(",")]
    if task.needles > 1 and places != [SPREAD]:
        raise ValueError(f"--depths {text}: {task.needles} needles in a stream lie at random; leave the option out")
    return places


def parse_depth(text):
    if text in (STRADDLING, SPREAD):
        return text
    try:
        depth = float(text)
    except ValueError as error:
        raise ValueError(f"--depths {text!r}: give numbers from 0 to 1, {STRADDLING} or {SPREAD}") from error
    if not 0 <= depth <= 1:
        raise ValueError(f"--depths {text}: must be between 0 and 1")
    return depth


def parse_fillers(text, folder, task):
    """Haystacks that there is text for, in the order of the tables."""
    if text is None:
        return HAYSTACKS[:2] if folder else HAYSTACKS[:1]
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in HAYSTACKS:
            raise ValueError(f"--fillers {name!r}: must be of {', '.join(HAYSTACKS)}")
    if "novel" in asked and not folder:
        raise ValueError("--fillers novel: name a folder of texts (--haystack)")
    if "needles" in asked and not isinstance(task, RulerTask):
        raise ValueError(f"--fillers needles: the task {task.name} has none; take one of RULER's")
    return tuple(name for name in HAYSTACKS if name in asked)


def parse_controls(text):
    """Ways to ask, in the order of the tables."""
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in CONTROLS:
            raise ValueError(f"--controls {name!r}: must be of {', '.join(CONTROLS)}")
    return tuple(name for name in CONTROLS if name in asked)
