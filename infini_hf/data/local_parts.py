"""The parts of a local folder: what is to be trained on and what is held out, by the names that `datasets` has."""

from pathlib import Path

# What may be measured on, the better one first.
HELD_OUT = ("validation", "test")
# What may stand around the name of a part in that of a file.
NUMBERING = "-._ 0123456789"


def held_out_split(source):
    """What a source calls the texts to measure on: `validation`, or `test` where a local one has no such part.

    The parts of a local folder are those that `datasets` finds: files or folders that are named after `train`,
    `validation` (or `valid`, `val`, `dev`) or `test` (or `eval`, …). A file, and a folder that names no part, is all
    `train`: that is then what is measured on.

    Raises:
        ValueError: when a local folder names its parts, and none of them is held out.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return "validation"
    if not path.is_dir():
        return "train"
    texts = {part: texts_of_part(path, part) for part in HELD_OUT}
    parts = texts if any(path.glob("*.txt")) else {**files_of_parts(path), **{k: v for k, v in texts.items() if v}}
    for part in HELD_OUT:
        if parts.get(part):
            return part
    if parts is texts or not parts or not names_parts(path):
        return "train"
    raise ValueError(
        f"source={str(source)!r}: has {', '.join(map(repr, parts))}, and nothing that is held out; name a file or "
        "folder in it 'validation', name another source to measure on, or give the split"
    )


def read_utf8(file):
    """The text of a file, without the mark that editors of some systems put before it.

    Raises:
        ValueError: when it is not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text ({error}); convert it first") from error


def text_files(path, split, name=None):
    """The `.txt` files that a path stands for, in name order; none when it is another kind of source.

    Args:
        path (`Path`): a file or a folder.
        split (`str`): the part of it.
        name (`str`, *optional*): the configuration of a folder that has several.

    Raises:
        ValueError: when they are of one split and another one is asked for.
    """
    if path.is_dir():
        files, found = sorted(path.glob("*.txt")), texts_of_part(path, split)
        whole = files and files == texts_of_part(path, "train")
    else:
        whole = path.suffix == ".txt"
        found = [path] * (whole and split == "train")
    if whole and not found:
        raise ValueError(
            f"split={split!r}: the text of {str(path)!r} is all 'train'; name the file or folder of the other "
            "split, or leave the split out"
        )
    if found or not path.is_dir():
        return found
    return sorted(file for file in files_of_parts(path, name).get(split, ()) if file.suffix == ".txt")


def texts_of_part(folder, split):
    """The `.txt` files of a part in a folder or in a folder of it; those beside each other are one part, `train`.

    Unless there is one to train on and one held out among them: then only those named after the part are it. Any
    other name is that of a book, whatever words are in it.
    """
    files, names = sorted(folder.glob("*.txt")), names_of(split)
    by_name = {file: file.stem.strip(NUMBERING) for file in files}
    stems = set(by_name.values())
    if stems & set(names_of("train")) and any(stems & set(names_of(part)) for part in HELD_OUT):
        files = [file for file, stem in by_name.items() if stem in names]
    elif split != "train":
        files = []
    own = files or sorted((folder / split).glob("*.txt"))
    return own or sorted(file for name in names for file in (folder / name).glob("*.txt"))


def names_of(split):
    """The names that a part goes by."""
    from datasets.data_files import SPLIT_KEYWORDS

    return {str(part): names for part, names in SPLIT_KEYWORDS.items()}.get(split, [split])


def files_of_parts(folder, name=None):
    """The files of each part of a folder, as `datasets` sorts them; nothing where it finds none that it can read.

    Raises:
        ValueError: when it cannot sort them, as where they are of several kinds.
    """
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(folder.resolve()), name).config.data_files
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"source={str(folder)!r}: cannot be read as one dataset ({error}); name the file or folder of one part"
        ) from error
    return {str(part): [Path(file) for file in files] for part, files in found.items() if files}


def names_parts(folder):
    """Whether the parts are named; `datasets` takes all files of a folder for `train` where they are not."""
    from datasets.data_files import get_data_patterns

    return [*get_data_patterns(str(folder.resolve())).values()] != [["**"]]
