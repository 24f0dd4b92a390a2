"""What a user means by a name: one that is mistyped is refused at once, with those that come near."""

import difflib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants

from ..assets import resolve, shipped, shipped_adapters

# What a part of a data set is called, and no dataset of the hub.
SPLITS = ("train", "validation", "test")
# Of weights, with the short names that the options of a trainer have for them.
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_model(name):
    """What `from_pretrained` takes for a folder, a shipped checkpoint or a model of the hub.

    Args:
        name (`str` or `Path`): as the user gave it.

    Returns:
        `str`: the folder, or the name on the hub, which is not asked here.

    Raises:
        ValueError: when it can be none of them.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.exists():
        return checked_folder(path, name, "config.json", "model")
    if name in shipped():
        return resolve(name)
    if name in shipped_adapters():
        raise ValueError(
            f"model {name!r}: it is a shipped adapter, of {base_of(name)}; name that one, with --adapter {name} where "
            "a command takes it"
        )
    if not is_hub_name(name):
        near = did_you_mean(name, shipped()) or near_paths(path)
        raise ValueError(
            f"model {name!r}: there is no such folder or shipped checkpoint ({', '.join(shipped())}){near}; a model "
            "of the hub is named 'owner/name'"
        )
    return name


def find_adapter(name):
    """The folder of an adapter, a shipped one's too, or its name on the hub; `None` where none is asked for.

    Raises:
        ValueError: when it can be neither.
    """
    if name is None:
        return None
    name = str(name)
    path = Path(name).expanduser()
    if path.exists():
        return checked_folder(path, name, "adapter_config.json", "adapter")
    if name in shipped_adapters():
        return resolve(name)
    if not is_hub_name(name):
        near = did_you_mean(name, shipped_adapters()) or near_paths(path)
        near = ": it is a checkpoint, and no adapter" if name in shipped() else near
        near = near or f", and none of that name ships ({', '.join(shipped_adapters())} does)"
        raise ValueError(
            f"adapter {name!r}: there is no such folder{near}; an adapter of the hub is named 'owner/name'"
        )
    return name


def base_of(name):
    """The checkpoint that a shipped adapter is for."""
    return json.loads((Path(resolve(name)) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]


def find_dtype(name):
    """What `from_pretrained` takes for the dtype of weights.

    Raises:
        ValueError: when it is none of those that weights are kept in.
    """
    found = SHORT_DTYPES.get(name, name)
    if found not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of {', '.join(map(repr, DTYPES))}")
    return found


def find_device(name=None):
    """A device that is there; without a name, the best one.

    Raises:
        ValueError: when torch has none of the name here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: is not to be had here ({error}); leave the option out") from error
    return name


def find_source(name, option):
    """What the readers of texts and pairs take: a file, a folder, or the name of a dataset of the hub.

    Args:
        name (`str`): as the user gave it.
        option (`str`): what it was given for, to begin the error with.

    Returns:
        `str`: the name as it is.

    Raises:
        ValueError: when it is not here and is no name that the hub would have: `owner/train`, or a place in a folder
            of texts.
    """
    path = Path(name).expanduser()
    if not path.exists() and "/" in name and (path.name in SPLITS or next(text_files(path.parent), None)):
        raise ValueError(f"{option} {name!r}: there is no such file or folder{near_paths(path)}")
    return name


def find_file(path, option):
    """A file that is there, as a `Path`.

    Args:
        path (`str` or `Path`): as the user gave it.
        option (`str`): what it was given for, to begin the error with.

    Raises:
        ValueError: when it is not there, or a folder.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file")
    if not found.exists():
        raise ValueError(f"{option} {path}: there is no such file{near_paths(found)}")
    return found


def check_target(path, option):
    """Refuse a place where no folder can be written, before anything is read.

    Args:
        path (`str` or `Path`): as the user gave it.
        option (`str`): what it was given for, to begin the error with, such as `"output_dir="`.

    Raises:
        ValueError: when it is a file, or lies in one or in a folder that may not be written.
    """
    target = Path(path).absolute()
    # Below a folder that may not be looked into, pathlib's own questions raise.
    there = next(part for part in (target, *target.parents) if os.path.exists(part))
    if there == target and not os.path.isdir(target):
        raise ValueError(f"{option}{path}: is a file; name a folder, which is made if it is not there")
    if not os.path.isdir(there):
        raise ValueError(f"{option}{path}: {there} is no folder; name a folder elsewhere")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}{path}: {there} may not be written; name a folder elsewhere")


def checked_folder(path, name, marker, what):
    """A folder that holds a checkpoint or an adapter, as text."""
    if (path / marker).is_file():
        return str(path)
    inside = sorted(str(file.parent) for file in path.glob(f"*/{marker}")) if path.is_dir() else []
    hint = f"; there is one in {' and in '.join(inside[-3:])}" if inside else ""
    if what == "model" and (path / "adapter_config.json").is_file():
        hint = ": it is an adapter, which goes on top of its base model; name that one, or merge the two first"
    raise ValueError(f"{what} {name!r}: holds no {marker}{hint}")


def is_hub_name(name):
    """Whether the hub may know a name that is not here: `owner/name`, and not a place in a folder of runs."""
    return HUB_NAME.fullmatch(name) is not None and not holds_runs(Path(name).parent)


def holds_runs(folder):
    """Whether a folder is one that training wrote into, or has such folders in it."""
    return any(next(folder.glob(pattern), None) for pattern in ("checkpoint-*", "final", "*/checkpoint-*", "*/final"))


def text_files(folder):
    """The files of texts or pairs in a folder and in its folders."""
    suffixes = (".txt", ".jsonl", ".parquet")
    return (file for depth in ("*", "*/*") for suffix in suffixes for file in folder.glob(f"{depth}{suffix}"))


def did_you_mean(name, known, prefix=""):
    """`" (did you mean X or Y?)"`, each with a prefix, or nothing when no name comes near."""
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f" (did you mean {' or '.join(prefix + other for other in near)}?)" if near else ""


def near_paths(path):
    """The same for a path: names that come near to the first part of it that is not there."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    folder = str(missing.parent / "_").removesuffix("_")
    return did_you_mean(missing.name, siblings, folder.removeprefix("./"))


@contextmanager
def loading(name):
    """Puts the name that was asked for in front of what the client of the hub says when it fails.

    Raises:
        OSError: instead of the client's own.
    """
    try:
        yield
    except OSError as error:
        offline = " (HF_HUB_OFFLINE is set: the hub was not asked)" if constants.HF_HUB_OFFLINE else ""
        raise OSError(f"{name}: cannot be loaded{offline}: {error}") from error
