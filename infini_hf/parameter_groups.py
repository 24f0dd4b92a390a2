"""Gates and projections of the memory learn at rates of their own, and are never decayed."""

import logging

import torch
from torch.distributed.tensor import DTensor

from .gate import HeadProjection, MemoryGate

logger = logging.getLogger(__name__)


def parameters_of(model, kind):
    """Trained parameters that belong to the modules of `kind` themselves, in the order of the layers."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return [parameter for module in modules for parameter in module.parameters(False) if parameter.requires_grad]


@torch.no_grad()
def keep_float32(model):
    """Make gates and projections float32 again where somebody has cast the whole model, and say so.

    A step of 1e-3 is less than bfloat16 can tell from 1: what begins as the identity would stay it.

    Args:
        model (`torch.nn.Module`): the model, wrapped or not, before its optimizer is made.
    """
    parameters = [parameter for kind in (MemoryGate, HeadProjection) for parameter in parameters_of(model, kind)]
    # What is a part of a tensor has the dtype of the other parts.
    cast = [part for part in parameters if part.dtype != torch.float32 and not isinstance(part, DTensor)]
    if cast:
        logger.warning(
            "the gates of the memory are %s: they are trained in float32 from here on, since steps as small as theirs "
            "are lost in it",
            cast[0].dtype,
        )
    for parameter in cast:
        parameter.data = parameter.data.float()


def part_memory(optimizer, model, args):
    """Move what belongs to the memory into parameter groups of its own.

    Args:
        optimizer (`torch.optim.Optimizer`): holds all parameters.
        model (`torch.nn.Module`): the model, wrapped or not.
        args ([`InfiniTrainingArguments`]): the learning rates.
    """
    rates = {MemoryGate: args.memory_gate_learning_rate, HeadProjection: args.memory_projection_learning_rate}
    for kind, rate in rates.items():
        parameters = parameters_of(model, kind)
        ids = {id(parameter) for parameter in parameters}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        if parameters:
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0, "lr": rate})
