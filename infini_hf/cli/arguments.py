"""Arguments of the scripts: dataclasses filled from a YAML file, then from the command line, unknown keys refused."""

import argparse
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types, description, argv=None):
    """Fill dataclasses from `--config FILE.yaml` and from the command line, which wins.

    Args:
        dataclass_types (`tuple[type]`): the argument dataclasses.
        description (`str`): what `--help` says first.
        argv (`list[str]`, *optional*): the arguments; those of the process by default.

    Returns:
        `tuple`: one instance for each dataclass.

    Raises:
        ValueError: when the file has a key that no dataclass has.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=None)
    config, rest = first.parse_known_args(argv)
    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, default=None, help="a YAML file of these options; the command line wins"
    )
    if config.config is not None:
        values = read_yaml(config.config, {field.name for kind in dataclass_types for field in fields(kind)})
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    # The parser hands `--config` back in a namespace of its own, after the dataclasses.
    return parser.parse_args_into_dataclasses(args=rest)[: len(dataclass_types)]


def read_yaml(path, known):
    """A YAML file as a dict whose keys are all in `known`.

    Raises:
        ValueError: names the unknown keys and the known ones that come nearest.
    """
    import difflib

    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = {key: difflib.get_close_matches(key, known, n=2) for key in unknown}
        hints = "; ".join(
            f"{key!r} (did you mean {' or '.join(close)}?)" if close else repr(key) for key, close in near.items()
        )
        raise ValueError(f"{path}: unknown options {hints}; see --help for the list")
    return values
