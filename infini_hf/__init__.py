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
    "InfiniTrainer",
    "InfiniTrainingArguments",
    "__version__",
    "generate",
    "is_patched",
    "patch_model",
    "patched",
    "prefill",
    "score",
    "unpatch_model",
]


def __getattr__(name):
    # The trainer brings the whole training stack with it, seconds that a reader need not wait for.
    if name == "InfiniTrainer":
        from .trainer import InfiniTrainer

        return InfiniTrainer
    if name == "InfiniTrainingArguments":
        from .training_args import InfiniTrainingArguments

        return InfiniTrainingArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
