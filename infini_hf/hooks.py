"""Before a patched decoder runs: the cache is checked or made, padding is read, the segment plan drawn up."""

import logging
import weakref

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import sliding_window_causal_mask_function

from .attention import PLAN, InfiniAttention, build_mask
from .cache import InfiniCache, infini_config_of
from .call_arguments import check_packing, check_positions, check_reader, read_padding, read_scale
from .families import family_of
from .inner_padding import warn_of_inner_padding
from .rope import window_tables
from .segments import SegmentPlan
from .static_attention import check_inference, is_step, step_arguments
from .static_cache import StaticInfiniCache

logger = logging.getLogger(__name__)

# The order in which every supported decoder takes its arguments.
POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
# Float32 angles of stock sliding layers are good to about a token in a hundred up to here.
LONGEST_GLOBAL_POSITION = 2_000_000


def decoder_pre_hook(decoder, args, kwargs):
    """The forward pre-hook of a patched decoder (`LlamaModel` and its like): returns the changed arguments."""
    kwargs = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
    if tokens is None:
        # The stock forward has its own message for a call without tokens.
        return (), kwargs
    batch, columns = tokens.shape[:2]
    if isinstance(kwargs.get("past_key_values"), StaticInfiniCache):
        check_inference(decoder)
        if is_step(kwargs["past_key_values"], columns):
            return (), step_arguments(decoder, kwargs, tokens)
        kwargs["past_key_values"].unload_padding()
    cache = kwargs["past_key_values"] = resolve_cache(decoder, kwargs, batch)
    past = 0 if cache is None else cache.columns
    mask = read_padding(kwargs.get("attention_mask"), batch, columns, past, cache)
    if mask is not None:
        mask = mask.to(tokens.device)
    seen = (0,) * batch if cache is None else cache.begin(batch, columns, mask, tokens.device)
    check_packing(kwargs)
    check_positions(kwargs.get("position_ids"), mask, columns)
    kwargs["position_ids"] = stream_positions(seen, mask, columns, tokens.device)
    config = infini_config_of(decoder.config)
    scale = read_scale(kwargs.pop("memory_scale", None), config, batch, tokens.device)
    rope = window_tables(decoder, config, tokens, cache)
    kwargs[PLAN] = SegmentPlan(config, seen, columns, mask, tokens.device, rope, scale)
    kwargs["attention_mask"] = stock_masks(decoder, mask, batch, columns, cache, tokens.device)
    if cache is not None:
        cache.reader = weakref.ref(decoder)
    return (), kwargs


def resolve_cache(decoder, kwargs, batch):
    """The cache of the call: the one passed, a new one when the model wants one, or none.

    Raises:
        ValueError: for a stock cache, a cache of another patch or batch, or a cache under activation checkpointing.
    """
    cache = kwargs.get("past_key_values")
    checkpointing = decoder.training and any(layer.gradient_checkpointing for layer in decoder.layers)
    if cache is None:
        use_cache = kwargs.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        if checkpointing:
            # What stock layers do anyway, each with a warning: they keep no state under checkpointing.
            kwargs["use_cache"] = use_cache = False
        return InfiniCache(decoder.config) if use_cache else None
    if not isinstance(cache, InfiniCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, and a patched model needs an InfiniCache: pass "
            "infini_hf.InfiniCache(model.config), or unpatch the model (PEFT's prefix tuning makes a cache of its "
            "own: adapt weights instead, with infini_hf.lora.lora_config)"
        )
    if checkpointing:
        raise ValueError(
            "an InfiniCache was passed while training under activation checkpointing, where layers drop it and the "
            "memory would never carry: turn checkpointing off (model.activation_checkpointing_disable()), or pass no "
            "cache (the memory then carries inside the call)"
        )
    if cache.infini_config != infini_config_of(decoder.config):
        raise ValueError(
            f"this cache was made for {cache.infini_config} and the model is patched with "
            f"{infini_config_of(decoder.config)}: make one with infini_hf.InfiniCache(model.config)"
        )
    cache.check_whole()
    if cache.seen:
        check_reader(cache, decoder)
    if cache.seen and len(cache.seen) != batch:
        raise ValueError(
            f"the cache holds {len(cache.seen)} rows and the call has {batch}: rows of one batch keep their places; "
            "use batch_repeat_interleave or batch_select_indices on the cache, or a cache for each batch"
        )
    return cache


def stream_positions(seen, mask, columns, device):
    """Positions from the start of each row's stream, `(1 or batch, columns)` int64: for the layers the patch left."""
    if mask is not None or len(set(seen)) > 1:
        mask = torch.ones(len(seen), columns, device=device) if mask is None else mask
        return (torch.tensor(seen, device=device)[:, None] + mask.long().cumsum(1) - 1).clamp_min(0)
    return torch.arange(seen[0], seen[0] + columns, device=device)[None]


def stock_masks(decoder, mask, batch, columns, cache, device):
    """The `attention_mask` argument for the decoder's forward: masks for the layers the patch left, nothing for ours.

    The decoder takes a mask of four dimensions as it is, so no mask of the whole length is built for patched layers.
    """
    unused = torch.ones(batch, 1, 1, columns, dtype=torch.bool, device=device)
    stock = {i: layer for i, layer in enumerate(decoder.layers) if not isinstance(layer.self_attn, InfiniAttention)}
    if not stock:
        return unused
    for index, layer in stock.items():
        if any(isinstance(part, InfiniAttention) for part in layer.self_attn.modules()):
            raise NotImplementedError(
                f"the attention of layer {index} is wrapped in a {type(layer.self_attn).__name__}, as PEFT's adaption "
                "prompt does: a patched layer cannot be; adapt weights instead (infini_hf.lora.lora_config)"
            )
    layers = (cache if cache is not None else DynamicCache(config=decoder.config)).layers
    past = 0 if cache is None else cache.columns
    warn_of_positions(decoder, past + columns, columns)
    dtype = decoder.get_input_embeddings().weight.dtype
    kinds = {}
    for index in stock:
        kinds.setdefault(bool(layers[index].is_sliding), layers[index])
    widest = max(layer.get_mask_sizes(columns)[0] for layer in kinds.values())
    padding = remember_padding(cache, mask, batch, columns, widest, device)
    if True in kinds:
        warn_of_inner_padding(decoder, padding, columns, cache)
    masks = {"full_attention": unused, "sliding_attention": unused}
    for sliding, layer in kinds.items():
        length = layer.get_mask_sizes(columns)[0]
        options = {}
        if sliding:
            options = {"mask_function": sliding_window_causal_mask_function(layer.sliding_window)}
            options["local_size"] = layer.sliding_window
        part = None if padding is None else padding[:, -length:]
        built = build_mask(decoder.config, batch, columns, length, part, dtype, device, **options)
        masks["sliding_attention" if sliding else "full_attention"] = built
    by_type = family_of(decoder.config).masks_by_layer_type
    return masks if by_type else masks["full_attention"]


def remember_padding(cache, mask, batch, columns, widest, device):
    """Padding of the last `widest` columns, `(batch, widest)` bool or `None`; the cache keeps it for the next call."""
    past = None if cache is None else cache.known_padding
    if mask is None and past is None:
        return None
    if past is not None:
        past = past.to(device)
    kept = widest - columns
    if past is None or past.shape[1] < kept:
        before = torch.ones(batch, kept, dtype=torch.bool, device=device)
        if past is not None and past.shape[1]:
            before[:, -past.shape[1] :] = past
    else:
        before = past[:, past.shape[1] - kept :]
    new = torch.ones(batch, columns, dtype=torch.bool, device=device) if mask is None else mask
    padding = torch.cat([before, new], dim=1)
    if cache is not None:
        cache.padding, cache.padding_end = padding, cache.columns + columns
    return padding


def warn_of_positions(decoder, position, columns):
    """Stock sliding layers count positions from the start of the stream, in float32."""
    # Once for a stream, where it crosses the limit.
    if position - columns <= LONGEST_GLOBAL_POSITION < position:
        logger.warning(
            "position %d: the sliding-window layers of %s keep global float32 positions, which are no longer exact at "
            "this length; the patched layers are not affected",
            position,
            type(decoder).__name__,
        )
