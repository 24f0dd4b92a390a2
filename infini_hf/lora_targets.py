"""Which layers a LoRA adapts: names that have to be those of layers, and two layers that share a weight."""

from itertools import chain


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
        raise ValueError(
            f"target_modules: the model has no layer called {', '.join(map(repr, absent))}; it has "
            f"{', '.join(sorted(names_of(model)))}, and 'all-linear' stands for the linear ones but the output layer"
        )


def names_of(model):
    """The last names of the layers with a matrix, packed ones of a quantised model and adapted ones too."""
    names = set()
    for path, part in model.named_modules():
        matrix = any(tensor.ndim == 2 for tensor in chain(part.parameters(False), part.buffers(False)))
        # PEFT keeps an adapted layer under this name, and what it adds beside it.
        place = path.removesuffix(".base_layer")
        if matrix and ".lora_" not in path:
            names.add(place.split(".")[-1])
    return names


def check_mergeable(peft_model, directory):
    """Refuse to merge an adapter of one of two layers that share a weight: it would change the other too.

    Args:
        peft_model (`peft.PeftModel`): the adapted model.
        directory (`str`): the adapter's folder, to begin the error with.

    Raises:
        ValueError: names the layer.
    """
    model = peft_model.get_base_model()
    ends = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    # What PEFT puts an adapter on keeps the layer under this name.
    adapted = [name for name, layer in ends.items() if getattr(layer, "base_layer", None) is not None]
    if adapted and model.config.tie_word_embeddings:
        raise ValueError(
            f"adapter {directory!r}: changes {' and '.join(adapted)}, and embed_tokens and lm_head of this model "
            "share their weight, so that it cannot be merged as commands do; load it with infini_hf.lora.load_adapter"
        )
