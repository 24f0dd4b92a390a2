"""Checkpoints that come with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped():
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def resolve(name):
    """The folder of a shipped checkpoint, or `name` as it is when it is none of them, or a folder of the user's."""
    if not Path(name).exists() and name in shipped():
        return str(FOLDER / name)
    return name
