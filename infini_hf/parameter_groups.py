"""Gates and projections of the memory learn at rates of their own, and are never decayed."""

from .gate import HeadProjection, MemoryGate


def parameters_of(model, kind):
    """Trained parameters that belong to the modules of `kind` themselves, in the order of the layers."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return [parameter for module in modules for parameter in module.parameters(False) if parameter.requires_grad]


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
