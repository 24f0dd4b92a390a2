"""The contenders by name, and how one is written: `infini:memory_update=delta:overlap=256`."""

from .package import Package
from .patched import Infini
from .settings import MEASURES
from .stock import Blocks, Full, Quantized, Window

LOOP = {"loop": str}
PATCH = {"memory_update": str, "feature_map": str, "gate": str, "overlap": int, "sink_tokens": int}
# By name, with the options of each and their kinds.
KINDS = {
    "blocks": (Blocks, {**LOOP, "recompute": bool}),
    "infini": (Infini, {**LOOP, **PATCH, "order": str, "recompute": bool, "kv_heads": int}),
    "full": (Full, LOOP),
    "quantized": (Quantized, {**LOOP, "backend": str}),
    "window": (Window, {**LOOP, "width": int}),
    "package": (Package, {"detach": int, "delta": bool}),
}
# Whose time others are held against, where it takes part.
REFERENCE = "blocks"


def parse_contender(text):
    """The name and the options of a contender.

    Args:
        text (`str`): `NAME:OPTION=VALUE:…`.

    Returns:
        `tuple[str, dict]`

    Raises:
        ValueError: when there is no such name, option or value.
    """
    name, *words = text.split(":")
    if name not in KINDS:
        raise ValueError(f"{text!r}: {name!r} is no contender; there are {', '.join(KINDS)}")
    known, options = KINDS[name][1], {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or key not in known:
            raise ValueError(f"{text!r}: {word!r} is no option; {name} takes {', '.join(known)}, as NAME=VALUE")
        options[key] = read_value(value, known[key], f"{text!r}: {key}")
    return name, options


def read_value(text, kind, where):
    """A value of a contender's option.

    Raises:
        ValueError: when it is not of its kind.
    """
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is int and text.isdigit():
        return int(text)
    if kind is str and text:
        return text
    expected = {bool: "true or false", int: "a whole number", str: "a word"}[kind]
    raise ValueError(f"{where}={text!r}: must be {expected}")


def check_contenders(settings):
    """Look through the contenders of every measure before anything is built.

    Raises:
        ValueError: when one is none, is named twice, or cannot be asked for a measure.
    """
    for measure in MEASURES:
        texts = settings.contenders_of(measure)
        for text in texts:
            kind = KINDS[parse_contender(text)[0]][0]
            if measure not in kind.MEASURES:
                raise ValueError(f"{measure}: {text!r} takes no part in it, but in {', '.join(kind.MEASURES)}")
            if texts.count(text) > 1:
                raise ValueError(f"{measure}: {text!r} is named twice")


def make_contender(text, settings, weights=None):
    """A contender, built; see [`Contender`]."""
    name, options = parse_contender(text)
    return KINDS[name][0](text, settings, options, weights)
