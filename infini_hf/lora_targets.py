"""Which layers a LoRA adapts: every name that is asked for has to be that of one."""

import torch


def check_targets(model, names):
    """Hold the names of layers to adapt to those that a model has; PEFT says nothing of one among several.

    Args:
        model (`PreTrainedModel`): the model to adapt.
        names (`list[str]` or `set[str]`, *optional*): `target_modules` of [`peft.LoraConfig`]. A text, which is a
            pattern or `"all-linear"`, and `None`, where PEFT chooses by the architecture, are left to PEFT.

    Raises:
        ValueError: names what is no layer, and what there is.
    """
    if names is None or isinstance(names, str):
        return
    paths = [path for path, _ in model.named_modules()]
    absent = sorted(name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths))
    if absent:
        linear = {path.split(".")[-1] for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        raise ValueError(
            f"target_modules: the model has no layer called {', '.join(map(repr, absent))}; it has "
            f"{', '.join(sorted(linear))}, and 'all-linear' stands for all of them but the output layer"
        )
