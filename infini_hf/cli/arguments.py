"""Arguments of the scripts: dataclasses filled from a YAML file, then from the command line, unknown keys refused."""

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .names import did_you_mean, find_file

# What YAML reads as a truth value may have been meant as the word that it was written with.
WORDS = {False: ("no", "off", "false"), True: ("yes", "on", "true")}
# A trainer takes a truth value for it too, whatever its annotation says.
NAME_OR_BOOL = "resume_from_checkpoint"
# Where the trainer knows nothing by a word alone.
NOTHING = {"report_to": "none"}
# An argument in a docstring, with the lines that go on.
DOCUMENTED = re.compile(r"^    (\w+) \(`[^\n]*?\): ?(.*(?:\n {8,}.*)*)", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """Reads a number without a point, as 1e-6, as YAML 1.2 and everybody does; YAML 1.1 takes it for a word."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, whose examples are to be copied, and shows defaults where there are any."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help or ''} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


class Refusing:
    """A parser that raises what it has to say, instead of hundreds of lines of usage."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


class ConfigParser(Refusing, argparse.ArgumentParser):
    """Finds `--config` in front of everything else."""


class ScriptParser(Refusing, HfArgumentParser):
    """The parser of a script."""


def parse_arguments(dataclass_types, description, argv=None):
    """Fill dataclasses from `--config FILE.yaml` and from the command line, which wins.

    Args:
        dataclass_types (`tuple[type]`): the argument dataclasses.
        description (`str`): what `--help` says first, its lines as they are.
        argv (`list[str]`, *optional*): the arguments; those of the process by default.

    Returns:
        `tuple`: one instance for each dataclass.

    Raises:
        ValueError: when an option is unknown, missing or has a wrong value, or the file cannot be read.
    """
    first = ConfigParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=None)
    config, rest = first.parse_known_args(argv)
    parser = ScriptParser(
        dataclass_types,
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE …]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, default=None, help="a YAML file of these options; the command line wins"
    )
    explain(parser, dataclass_types)
    known = {field.name for kind in dataclass_types for field in fields(kind) if field.init}
    if config.config is not None:
        values = read_yaml(config.config, known)
        hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in values.items():
            try:
                values[name] = as_typed(parser, name, value, hints[name])
            except (ValueError, argparse.ArgumentError) as error:
                said = getattr(error, "message", error)
                raise ValueError(f"--config {config.config}: {name}={value!r}: {said}; see --help") from error
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and values.get(action.dest) is None
    try:
        parsed = parser.parse_args_into_dataclasses(args=rest, return_remaining_strings=True)
    except (ValueError, NotImplementedError, ImportError) as error:
        # Whoever refuses a value while a dataclass is filled, it is the user's.
        raise ValueError(str(error)) from error
    refuse_unknown(parsed[-1], known)
    # The parser hands `--config` back in a namespace of its own, after the dataclasses.
    filled = parsed[: len(dataclass_types)]
    for part in filled:
        if hasattr(part, NAME_OR_BOOL):
            setattr(part, NAME_OR_BOOL, name_or_bool(getattr(part, NAME_OR_BOOL)))
    return filled


def explain(parser, dataclass_types):
    """Give options without a help text what the docstrings of their dataclasses say of them."""
    said = {}
    for kind in (base for dataclass_type in dataclass_types for base in dataclass_type.__mro__):
        for name, text in DOCUMENTED.findall(inspect.cleandoc(kind.__dict__.get("__doc__") or "")):
            said.setdefault(name, " ".join(text.split()).replace("`", "").replace("%", "%%"))
    for action in parser._actions:
        action.help = action.help or said.get(action.dest)


def name_or_bool(value):
    """A truth value that was typed as one; the name of what is there is a name, whatever it is called."""
    if value == "":
        # As of a variable of the shell that is not set: it names nothing.
        return None
    if not isinstance(value, str) or Path(value).exists():
        return value
    return next((truth for truth, words in WORDS.items() if value.lower() in words), value)


def as_typed(parser, name, value, hint):
    """A value of a YAML file as the command line would have given it.

    Args:
        parser (`ScriptParser`): knows what each option takes.
        name (`str`): the option.
        value: what YAML made of it. `None` stays where it can be a value, and so does a list or a mapping that only a
            file can give.
        hint: the annotation of the option's field.

    Raises:
        ValueError: when it is of a kind that cannot be written as one word.
        argparse.ArgumentError: when the option refuses it.
    """
    action = parser._option_string_actions[f"--{name}"]
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    several = action.nargs == "+"
    if value is None and name in NOTHING:
        return NOTHING[name]
    if value is None and parser.get_default(name) is not None and type(None) not in kinds:
        raise ValueError("null is no value of it; leave the option out for its default")
    if value is None or (isinstance(value, bool) and name == NAME_OR_BOOL):
        return value
    if type(value) in kinds & {bool, list, dict} and not several:
        return value
    # Alone on the command line, as --fsdp is, it is true; a list of what it once took is left to the trainer.
    if action.nargs == "?" and isinstance(value, (bool, list)):
        return value
    parts = value if several and isinstance(value, list) else [value]
    parts = [parser._get_value(action, as_word(action, part)) for part in parts]
    for part in parts:
        parser._check_value(action, part)
    return parts if several else parts[0]


def as_word(action, value):
    """What one would have typed for a value of YAML.

    Raises:
        ValueError: when there is no such word.
    """
    if value is None or isinstance(value, (list, dict)):
        raise ValueError("must be a word or a number")
    if not isinstance(value, bool):
        return str(value)
    word = next((word for word in WORDS[value] if word in (action.choices or ())), None)
    if word is None and action.type is str:
        raise ValueError("is how YAML reads a bare yes, no, on or off; put the word in quotes")
    return word or str(value).lower()


def refuse_unknown(words, known):
    """Raise on words of the command line that no option took."""
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    if options:
        names = [option.strip("-").replace("-", "_") for option in options]
        hints = [f"{option}{did_you_mean(name, known, '--')}" for option, name in zip(options, names, strict=True)]
        raise ValueError(f"unknown option {', '.join(hints)}; see --help for the list")
    if words:
        raise ValueError(f"{' '.join(words)!r}: belongs to no option; a value follows its option, as --OPTION VALUE")


def read_yaml(path, known):
    """A YAML file as a dict whose keys are all in `known`.

    Raises:
        ValueError: when it is not there or cannot be read, or names the unknown keys and those that come nearest.
    """
    try:
        text = find_file(path, "--config").read_text(encoding="utf-8-sig")
        values, mapped = (yaml.load(text, loader) or {} for loader in (yaml.SafeLoader, Loader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"--config {path}: is not YAML: {error.problem} in line {line}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: is not YAML ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: holds {type(values).__name__}; write options, one 'name: value' a line")
    # Elsewhere the option says what its word is: 12e4567 may be a name.
    values = {key: mapped[key] if isinstance(value, dict) else value for key, value in values.items()}
    unknown = sorted(str(key) for key in set(values) - set(known))
    if unknown:
        hints = ", ".join(f"{key!r}{did_you_mean(key, known)}" for key in unknown)
        raise ValueError(f"--config {path}: unknown options {hints}; see --help for the list")
    return values
