"""Infini-attention for pretrained Llama and Gemma checkpoints: a memory of fixed size for inputs without end."""

from .auto import AutoInfiniModelForCausalLM
from .cache import InfiniCache
from .config import InfiniConfig
from .patching import is_patched, patch_model, patched, unpatch_model
from .streaming import generate, prefill, score
from .version import __version__

__all__ = [
    "AutoInfiniModelForCausalLM",
    "InfiniCache",
    "InfiniConfig",
    "__version__",
    "generate",
    "is_patched",
    "patch_model",
    "patched",
    "prefill",
    "score",
    "unpatch_model",
]
