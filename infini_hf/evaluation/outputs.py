"""Files that an evaluation writes under one name: which endings it takes, and what is looked at before it reads."""

import os
from pathlib import Path

# Endings that give way to that of a file beside; what follows any other dot belongs to the name (llama-3.2).
OWN_ENDINGS = (".jsonl", ".md")


def beside(path, ending):
    """The name of a file beside an output, with an ending of its own, such as `".png"`."""
    path = Path(path)
    return path.with_suffix(ending) if path.suffix in OWN_ENDINGS else path.with_name(path.name + ending)


def check_output(path, taken=()):
    """Look at an output before any work is done for it.

    Args:
        path (`str` or `Path`): a file, there or not.
        taken (`tuple[str]`, *optional*): endings of the files that are written beside it.

    Raises:
        ValueError: when it is a folder, lies in what is none or may not be written, or would be overwritten by what
            is written beside it.
    """
    path = Path(path)
    # Below a folder that may not be looked into, pathlib's own questions raise.
    if os.path.isdir(path):
        raise ValueError(f"output={str(path)!r}: is a folder; name a file in it")
    above = next(part for part in path.absolute().parents if os.path.exists(part))
    if not os.path.isdir(above):
        raise ValueError(f"output={str(path)!r}: {str(above)!r} is no folder; name a file elsewhere")
    # A file that is there may be written where no other can be made beside it.
    alone = not taken and os.path.exists(path)
    if not (os.access(path, os.W_OK) if alone else os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"output={str(path)!r}: {str(above)!r} may not be written; name a file elsewhere")
    if path.suffix in taken:
        raise ValueError(
            f"output={str(path)!r}: a {path.suffix} file is written beside the output, and would take its place; "
            "give it another ending"
        )
