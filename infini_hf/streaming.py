"""Reading without end: `prefill`, `generate` and `score` push a stream through a patched model chunk by chunk."""

import copy

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from .cache import InfiniCache
from .generation_options import OWN_CACHES, GenerationOptions
from .inputs import (
    as_batch,
    check_mask,
    check_size,
    input_device,
    refuse_right_padding,
    stream_chunks,
    warn_of_padding,
)
from .patching import patched_decoder
from .sequence_parallel import SequenceParallelCache, refuse_split
from .static_cache import StaticInfiniCache

# Seconds before a progress bar shows: short calls stay quiet.
PATIENCE = 2.0


def require_patched(model):
    """The patched causal model inside `model`.

    Raises:
        TypeError: when it is no module.
        ValueError: when it is not patched.
        NotImplementedError: when an adapter puts virtual tokens before the text, or is switched on by one.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a patched model")
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise NotImplementedError(
                f"adapter {name!r} ({adapter.peft_type}): virtual tokens before a text would be left out here; use "
                "an adapter that changes weights (infini_hf.lora.lora_config)"
            )
        if getattr(adapter, "alora_invocation_tokens", None) and name in active_adapters(model):
            raise NotImplementedError(
                f"adapter {name!r} has alora_invocation_tokens: PEFT looks for them in each call, and would switch it "
                "off in the segments after them; call the PEFT model itself on whole inputs (its own generate, the "
                "stock Trainer), or make it without them"
            )
    inner = patched_decoder(model)
    if inner is None:
        raise ValueError(
            f"this {type(model).__name__} is not patched: call infini_hf.patch_model(model, InfiniConfig(...)) first"
        )
    return inner


def active_adapters(model):
    """The names of the adapters that are switched on, of the first module that knows them: all have the same."""
    # Of a transformers model it is a method.
    lists = (getattr(part, "active_adapters", None) for part in model.modules())
    return next((names for names in lists if isinstance(names, list)), [])


def require_head(model):
    """What [`require_patched`] gives, of a model that predicts tokens.

    Raises:
        TypeError: for one that has no language modelling head.
    """
    inner = require_patched(model)
    if not inner.can_generate():
        raise TypeError(
            f"a {type(inner).__name__} predicts no tokens: load the checkpoint as a causal language model "
            "(AutoInfiniModelForCausalLM); infini_hf.prefill reads with this one"
        )
    return inner


def read_chunks(inner, run, chunks, total, cache, progress, description):
    """Run a function over chunks; a chunk that is interrupted leaves no trace in the cache."""
    device = input_device(inner)
    with tqdm(total=total, unit="tok", unit_scale=True, desc=description, disable=not progress, delay=PATIENCE) as bar:
        for ids, mask in chunks:
            if not ids.shape[1]:
                continue
            before = copy.copy(cache)
            try:
                with torch.no_grad():
                    yield run(ids.to(device), None if mask is None else mask.to(device))
            except BaseException:
                cache.restore(before)
                raise
            bar.update(ids.shape[1])


def prefill(model, ids, attention_mask=None, cache=None, chunk_size=2048, progress=True):
    """Read a stream of any length into a cache, with constant memory.

    Ctrl-C leaves the cache as it was after the last whole chunk: pass your own cache to keep it.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        ids (`torch.Tensor`, `list`, or iterator): token ids `(batch, seq_len)`, or an iterator of such pieces.
        attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding: neither written nor read.
        cache ([`InfiniCache`], *optional*): the cache to continue; a new one by default.
        chunk_size (`int`, *optional*, defaults to `2048`): columns in a forward; speed and peak memory only.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar when it takes more than two seconds.

    Returns:
        [`InfiniCache`]: the cache that was read into.

    Raises:
        TypeError: when `ids` are not token ids, or `model` or `cache` is of another kind.
        ValueError: when the model is not patched, an id is not in the vocabulary, or shapes do not fit.
        NotImplementedError: when an adapter of PEFT puts virtual tokens before the text.
    """
    inner = require_patched(model)
    check_size("chunk_size", chunk_size)
    cache = open_cache(inner, cache)
    decoder = inner.get_decoder()
    chunks, total = stream_chunks(ids, attention_mask, chunk_size, inner.config.vocab_size)

    def run(ids, mask):
        if isinstance(cache, SequenceParallelCache):
            ids, mask = (None if whole is None else whole[:, cache.run_of(whole.shape[1])] for whole in (ids, mask))
        decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)

    for _ in read_chunks(inner, run, chunks, total, cache, progress, "reading"):
        pass
    return cache


def score(model, ids, attention_mask=None, cache=None, chunk_size=2048, progress=True):
    """Negative log-likelihood of every token after the first, in nats, with constant memory.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        ids (`torch.Tensor` or `list`): token ids `(batch, seq_len)`.
        attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding.
        cache ([`InfiniCache`], *optional*): what was read before; it goes on to hold `ids` too.
        chunk_size (`int`, *optional*, defaults to `2048`): columns whose logits are held at once.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar when it takes more than two seconds.

    Returns:
        `torch.Tensor`: `(batch, seq_len - 1)`, float32, on the device of `ids`; 0 where the token, or the one that
        predicts it, is padding.

    Raises:
        TypeError: for a model without a language modelling head, and as [`prefill`] does, as the others.
    """
    inner = require_head(model)
    check_size("chunk_size", chunk_size)
    cache = open_cache(inner, cache)
    refuse_split(cache)
    ids = as_batch(ids, inner.config.vocab_size)
    mask = check_mask(attention_mask, ids)
    chunks, total = stream_chunks(ids, mask, chunk_size, inner.config.vocab_size)

    def run(ids, mask):
        return inner(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    losses, start = [], 0
    for logits in read_chunks(inner, run, chunks, total, cache, progress, "scoring"):
        targets = ids[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
        logits = logits[:, : targets.shape[1]].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").to(ids.device))
        start += logits.shape[1]
    losses = torch.cat(losses, dim=1) if losses else torch.zeros(ids.shape[0], 0)
    if mask is not None:
        losses = losses.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()).to(losses.device), 0.0)
    return losses


def open_cache(inner, cache):
    if cache is None:
        return InfiniCache(inner.config)
    if not isinstance(cache, InfiniCache):
        raise TypeError(f"cache is a {type(cache).__name__}: pass an InfiniCache, as from infini_hf.prefill")
    return cache


def generate(model, ids, cache=None, attention_mask=None, **kwargs):
    """Continue a stream: `model.generate` on the new ids alone, after everything that the cache holds.

    Afterwards the cache holds every token returned, the last one too, and no padding of a row that finished early, so
    that the next turn of a conversation continues from it. A token costs the same whatever was read before.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        ids (`torch.Tensor` or `list`): the new token ids, `(batch, seq_len)`, at least one.
        cache ([`InfiniCache`], *optional*): what was read before; a new one by default.
        attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at (left) padding of the new ids.
        kwargs: everything else that `model.generate` takes. `cache_implementation="static"` decodes on a
            [`StaticInfiniCache`], which `model.generate` compiles a step for on an accelerator.

    Returns:
        What `model.generate` returns: the ids passed, then the new ones.

    Raises:
        TypeError: for a model without a language modelling head.
        ValueError: without tokens, with padding on the right, with a model that is not patched, or with
            `past_key_values` beside `cache`.
        NotImplementedError: for assisted decoding, for `inputs_embeds`, and as [`prefill`] does.
    """
    inner = require_head(model)
    cache = open_cache(inner, cache)
    refuse_split(cache)
    ids = as_batch(ids, inner.config.vocab_size)
    if not ids.shape[1]:
        raise ValueError(
            "ids hold no token: generation needs at least one to continue from, the cache alone has none to give"
        )
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values beside cache: pass the InfiniCache as cache=")
    if kwargs.get("inputs_embeds") is not None:
        raise NotImplementedError(
            "inputs_embeds: infini_hf.generate reads ids alone; read the embeddings with model(inputs_embeds=..., "
            "past_key_values=cache) under torch.no_grad(), and generate from the ids that follow"
        )
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False: infini_hf.generate continues a cache; use model.generate to do without")
    options = GenerationOptions(inner, kwargs)
    options.refuse_rollback()
    options.check_ends(ids.shape[0])
    kwargs |= options.watched_criteria()
    if options.implementation in OWN_CACHES:
        # The cache that is continued is of this kind; the stock loop refuses the name beside any cache.
        kwargs["cache_implementation"] = None
    if kwargs.get("generation_config") is None:
        kwargs["use_cache"] = True
    else:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].use_cache = True
    ids = ids.to(input_device(inner))
    mask = check_mask(attention_mask, ids)
    if mask is None:
        warn_of_padding(ids, options.pad, options.eos)
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    refuse_right_padding(mask)
    # All on copies, so that an interruption leaves the caller's cache before the turn, not in its middle. The prompt
    # is read in chunks up to its last token, which the stock loop needs to begin with.
    after, prompt = copy.copy(cache), ids.shape[1] - 1
    prefill(inner, ids[:, :prompt], attention_mask=mask[:, :prompt], cache=after)
    # Generation has a copy of its own: beams and padding of finished rows never reach the others.
    twin = copy.copy(after)
    twin.hidden_columns = cache.columns
    if twin.seen and options.rows_per_input > 1:
        twin.batch_repeat_interleave(options.rows_per_input)
    if options.is_static and not isinstance(twin, StaticInfiniCache):
        twin = StaticInfiniCache.from_cache(twin, inner)
    output = inner.generate(input_ids=ids, attention_mask=mask, past_key_values=twin, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    returned = sequences.shape[0] // ids.shape[0]
    real = options.real_tokens(sequences[:, ids.shape[1] :], ids.shape[1])
    kept = torch.cat([mask.repeat_interleave(returned, 0), real], dim=1)
    if after.seen and returned > 1:
        after.batch_repeat_interleave(returned)
    # What stands where nothing was generated may be no token at all.
    last = sequences[:, prompt:].masked_fill(kept[:, prompt:] == 0, 0)
    prefill(inner, last, attention_mask=kept[:, prompt:], cache=after, progress=False)
    cache.restore(after)
    if not isinstance(output, torch.Tensor):
        output.past_key_values = cache
    return output
