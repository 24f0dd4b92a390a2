"""The cache that `generate` of a patched model goes on with: one that remembers, in place of a stock one."""

from functools import partial

from .cache import InfiniCache
from .generation_options import NO_ROLLBACK
from .static_cache import StaticInfiniCache


def prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs):
    """What `generate` calls for its cache: an [`InfiniCache`] in place of a stock one.

    Raises:
        ValueError: for a stock cache, a `cache_implementation` that would make one, a cache with `use_cache=False`, or
            one that holds all that is passed.
        NotImplementedError: for assisted decoding, which takes tokens back.
    """
    if "assisted_generation" in (*args[:1], kwargs.get("generation_mode")):
        raise NotImplementedError(NO_ROLLBACK)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, InfiniCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, and a patched model needs an InfiniCache: pass "
            "infini_hf.InfiniCache(model.config), or unpatch the model"
        )
    if cache is not None and generation_config.use_cache is False:
        raise ValueError(
            "use_cache=False beside past_key_values: every step would read the whole text into the cache again; leave "
            "one of them out"
        )
    if cache is not None and cache.seen and not cache.hidden_columns:
        check_goes_on(cache, model_kwargs, generation_config)
    kind = generation_config.cache_implementation
    if cache is None and kind not in (None, "dynamic", "dynamic_full", "offloaded", "static"):
        raise ValueError(
            f"cache_implementation={kind!r}: a patched model keeps its state in an InfiniCache; leave it out, or use "
            "'offloaded' or 'static'"
        )
    if cache is None and generation_config.use_cache is not False:
        make = StaticInfiniCache if kind == "static" else partial(InfiniCache, offloading=kind == "offloaded")
        model_kwargs["past_key_values"] = make(model.config)
        generation_config.cache_implementation = None
    elif kind == "static" and isinstance(cache, StaticInfiniCache):
        # The stock method takes no kind beside a cache, and this is one of the kind.
        generation_config.cache_implementation = None
    if isinstance(model_kwargs.get("past_key_values"), StaticInfiniCache) and generation_config.prefill_chunk_size:
        raise NotImplementedError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} with a static cache: generate would compile "
            "every chunk of the prompt; leave it out, and read a long prompt with infini_hf.prefill or "
            "infini_hf.generate, whose memory does not grow"
        )
    # The stock method checks the rest of what the user passed and finds the cache made.
    return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)


def check_goes_on(cache, model_kwargs, generation_config):
    """Refuse a call of `generate` that brings no more than its cache holds.

    The stock loop takes off as many ids as a cache holds; where no more come it would read some of them once again.

    Raises:
        ValueError: with both lengths.
    """
    mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
    # Where all of a mask is ones the stock loop keeps its length alone.
    length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    # Of embeddings it takes off what the cache holds, whatever the mask says.
    length = length if embeds is None else embeds.shape[1]
    if length is not None and length <= cache.get_seq_length():
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} columns and the call has {length}: model.generate wants all "
            "of a stream from its start and at least one id more; infini_hf.generate takes new ids alone, and "
            "model(inputs_embeds=..., past_key_values=cache) new embeddings"
        )
