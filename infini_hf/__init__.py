"""Infini-attention for pretrained Llama and Gemma checkpoints."""

from .cache import InfiniCache
from .config import InfiniConfig
from .patching import is_patched, patch_model, patched, unpatch_model
from .version import __version__

__all__ = [
    "InfiniCache",
    "InfiniConfig",
    "__version__",
    "is_patched",
    "patch_model",
    "patched",
    "unpatch_model",
]
