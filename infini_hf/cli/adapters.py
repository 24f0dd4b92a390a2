"""A LoRA adapter beside the model of a command: it brings its own patch."""

import warnings

from ..config import InfiniConfig


def adapter_patch(folder, asked):
    """The patch of an adapter, held to what is asked for.

    Args:
        folder (`str`): what `find_adapter` returns.
        asked (`dict`): values of [`InfiniConfig`], by name.

    Returns:
        [`InfiniConfig`]

    Raises:
        ValueError: when there is no adapter with a patch, or names an option that it was not trained with.
    """
    from ..lora import read_config

    patch = InfiniConfig.from_dict(read_config(folder, {}).infini_attention)
    for name, value in asked.items():
        if value != getattr(patch, name):
            raise ValueError(
                f"{name}={value!r}: {folder!r} was trained with {getattr(patch, name)!r}, and an adapter brings its "
                f"own patch; leave {name} out"
            )
    return patch


def load_adapted(name, folder, merge=False, **options):
    """A base with an adapter, or, merged, the patched model that the two make.

    Args:
        name, folder (`str`): what `find_model` and `find_adapter` return.
        merge (`bool`, *optional*, defaults to `False`): work the adapter into the weights.
        options: how the base is loaded.

    Raises:
        ValueError: when it is to be merged and changes one of two layers that share a weight.
    """
    from ..lora import load_adapter
    from ..lora_targets import check_mergeable

    with warnings.catch_warnings():
        # PEFT asks for a name that transformers has changed, which is nothing to a user.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = load_adapter(name, folder, **options)
    if not merge:
        return model
    check_mergeable(model, folder)
    return model.merge_and_unload()
