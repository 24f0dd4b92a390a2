"""What a result is held against: the same model with its memory closed."""

import math
from contextlib import contextmanager

import torch

from ..gate import MemoryGate
from ..streaming import require_patched

# The logit at which a gate of each kind lets nothing through.
CLOSED = {"tanh": 0.0, "sigmoid": -math.inf}


@contextmanager
def closed_memory(model):
    """Every gate at exactly nothing inside the `with`: block-local attention of the same weights.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.

    Raises:
        ValueError: when the model is not patched.
    """
    require_patched(model)
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    before = [gate.bias.detach().clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate in gates:
                gate.bias.fill_(CLOSED[gate.kind])
        yield model
    finally:
        with torch.no_grad():
            for gate, bias in zip(gates, before, strict=True):
                gate.bias.copy_(bias)
