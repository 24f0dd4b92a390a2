"""Checkpoints and adapters that come with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped():
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def shipped_adapters():
    """Names of the LoRA adapters that come with the package, each for one of its checkpoints."""
    return sorted(path.parent.name for path in FOLDER.glob("*/adapter_config.json"))


def resolve(name):
    """The folder of a shipped checkpoint or adapter, or `name` as it is when it is none, or a folder of the user's."""
    if not Path(name).exists() and name in (*shipped(), *shipped_adapters()):
        return str(FOLDER / name)
    return name
