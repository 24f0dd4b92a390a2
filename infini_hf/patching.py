"""Patch a model that you hold, and take the patch off again. Nothing outside the instance changes."""

import contextlib
import copy
import logging
from functools import partial
from itertools import chain
from types import MethodType

import torch
from transformers import PreTrainedModel

from .attention import InfiniAttention
from .cache import global_layers
from .config import InfiniConfig
from .families import family_of
from .gate import MemoryGate
from .generation_cache import prepare_cache_for_generation
from .hooks import decoder_pre_hook
from .static_attention import masks_for_generate

logger = logging.getLogger(__name__)


def patched_decoder(model):
    """The patched causal model inside `model` (itself, or what PEFT, DDP or a compiler wrapped), or `None`."""
    if not isinstance(model, torch.nn.Module):
        return None
    for module in model.modules():
        # Around a decoder that was patched alone there is a model that was not.
        named = isinstance(module, PreTrainedModel) and "infini_attention" in vars(module.config)
        if named and any(isinstance(part, InfiniAttention) for part in module.modules()):
            return module
    return None


def is_patched(model):
    """Whether a model, wrapped or not, runs Infini-attention."""
    return patched_decoder(model) is not None


def patch_model(model, config=None):
    """Swap the global self-attention of a model for Infini-attention, with gates at zero.

    Args:
        model (`PreTrainedModel`): a model of a supported family; it is changed in place.
        config ([`InfiniConfig`], *optional*): the options; the defaults otherwise.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        TypeError: when `model` is not a transformers model or `config` not an [`InfiniConfig`].
        ValueError: when the model is patched already, or `layers` names one that it does not have or that slides.
        NotImplementedError: when the family is not supported; the message lists those that are.
    """
    config = InfiniConfig() if config is None else config
    if not isinstance(config, InfiniConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: pass an InfiniConfig, as in InfiniConfig(segment_length=2048)"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}: patch the transformers model itself, before PEFT or a wrapper"
        )
    if is_patched(model):
        raise ValueError(f"this {type(model).__name__} is patched already: call unpatch_model(model) first")
    if "infini_attention" in vars(model.config):
        logger.warning(
            "the config says that this checkpoint was patched before: its gates were dropped when it was loaded as a "
            "stock model, and now start at zero; AutoInfiniModelForCausalLM.from_pretrained loads them"
        )
    layers = install_patch(model, config)
    warn_of_window(model, config)
    logger.info(
        "patched %d of %d layers of %s: segments of %d tokens, %s update, %s features, %s gate, overlap %d, sinks %d",
        len(layers),
        model.config.num_hidden_layers,
        type(model).__name__,
        config.segment_length,
        config.memory_update,
        config.feature_map,
        config.gate,
        config.overlap,
        config.sink_tokens,
    )
    return model


def install_patch(model, config):
    """What [`patch_model`] does to a stock model, without a word; the indices of the layers that it has changed."""
    family = family_of(model.config)
    layers = choose_layers(model, config)
    decoder = model.get_decoder()
    attentions = [decoder.layers[index].self_attn for index in layers]
    for attention in attentions:
        check_layer(attention, family.attention)
    for attention in attentions:
        patch_layer(attention, family.attention, config)
    own_config(model).infini_attention = config.to_dict()
    decoder.register_forward_pre_hook(decoder_pre_hook, with_kwargs=True)
    # A partial, unlike a bound method, survives pickling under another name than its function.
    model._prepare_cache_for_generation = partial(prepare_cache_for_generation, model)
    model.create_masks_for_generate = masks_for_generate
    return layers


def unpatch_model(model):
    """Undo [`patch_model`]: classes, parameters, config and hooks are what they were. The gates are dropped.

    Raises:
        ValueError: when the model is not patched.
    """
    inner = patched_decoder(model)
    if inner is None:
        raise ValueError(f"this {type(model).__name__} is not patched: there is nothing to undo")
    decoder = inner.get_decoder()
    for layer in decoder.layers:
        if isinstance(layer.self_attn, InfiniAttention):
            unpatch_layer(layer.self_attn)
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is decoder_pre_hook]:
        del decoder._forward_pre_hooks[key]
        del decoder._forward_pre_hooks_with_kwargs[key]
    del inner.config.infini_attention
    del inner._prepare_cache_for_generation, inner.create_masks_for_generate
    return model


@contextlib.contextmanager
def patched(model, config=None):
    """A context in which `model` is patched; it leaves the model as it was, whatever happens inside.

    Example:

    ```python
    with patched(model, InfiniConfig(segment_length=2048)):
        model.generate(ids)
    ```
    """
    patch_model(model, config)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch_model(model)


def own_config(model):
    """Give the model a config of its own: models built from one config object share it, and would share the patch."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def choose_layers(model, config):
    """The indices to patch.

    Raises:
        ValueError: when `layers` names a layer that is not there or that has a sliding window, or none is left.
    """
    candidates = global_layers(model.config)
    count = model.config.num_hidden_layers
    if not candidates:
        raise ValueError(
            f"all {count} layers of this {model.config.model_type!r} model have a sliding window "
            f"({model.config.sliding_window} tokens), and only layers with global attention can be patched: set "
            "config.sliding_window=None before loading to make them global"
        )
    for index in config.layers or ():
        if index >= count:
            raise ValueError(
                f"layers={config.layers}: the model has {count} layers, so {index} is not one; count from 0"
            )
        if index not in candidates:
            raise ValueError(
                f"layers={config.layers}: layer {index} has a sliding window; layers with "
                f"global attention are {candidates}"
            )
    return candidates if config.layers is None else config.layers


def check_layer(attention, infini_class):
    """Refuse a layer that cannot be patched, before any is.

    Raises:
        NotImplementedError: when it runs another class than the family's, or is not causal.
    """
    if type(attention) is not infini_class.stock_class:
        raise NotImplementedError(
            f"layer {attention.layer_idx} runs {type(attention).__name__}, not {infini_class.stock_class.__name__}: "
            "another patch or wrapper is in the way; patch before it"
        )
    if not attention.is_causal:
        raise NotImplementedError("use_bidirectional_attention: Infini-attention is causal; load the model without it")


def patch_layer(attention, infini_class, config):
    """Give one attention module its new class and its gate."""
    # Packed weights of a quantised layer may have another name, and be buffers.
    weight = next(chain(attention.q_proj.parameters(), attention.q_proj.buffers()))
    # Weights that accelerate keeps elsewhere are on the meta device between calls; the gate is no burden on the CPU.
    offloaded = weight.device.type == "meta" and "_hf_hook" in vars(attention.q_proj)
    heads = attention.config.num_attention_heads
    attention.__class__ = infini_class
    attention.memory_gate = MemoryGate(heads, config.gate, "cpu" if offloaded else weight.device)
    rebind_hooked_forward(attention)


def unpatch_layer(attention):
    """Give one attention module its own class back."""
    del attention.memory_gate
    attention.__class__ = type(attention).stock_class
    rebind_hooked_forward(attention)


def rebind_hooked_forward(attention):
    """Accelerate keeps the bound forward it found; without this its hooks would go on calling the old class."""
    if "_old_forward" in vars(attention):
        attention._old_forward = MethodType(type(attention).forward, attention)


def warn_of_window(model, config):
    """Positions beyond those the base model was trained on are rarely good ones."""
    trained = model.config.max_position_embeddings
    if config.longest_window > trained:
        logger.warning(
            "the local window of %d tokens (segment_length + overlap + sink_tokens) is longer than the %d positions "
            "that %s was trained on: choose a shorter segment, or expect worse text near its end",
            config.longest_window,
            trained,
            type(model).__name__,
        )
    rope = model.config.rope_parameters or {}
    # Of a family with several the window has that of its global layers.
    rope = rope.get("full_attention", rope)
    first = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": trained}.get(rope.get("rope_type"))
    if first is not None and config.longest_window > first:
        logger.warning(
            "rope_type=%s has other frequencies for inputs of more than %d tokens, and the local window of %d is "
            "always read with those: shorter inputs are not the base model's; choose a window within %d tokens",
            rope["rope_type"],
            first,
            config.longest_window,
            first,
        )
