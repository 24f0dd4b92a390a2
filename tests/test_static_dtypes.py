"""The static cache under autocast, with what another precision has read, and with weights that are elsewhere."""

import contextlib
import copy

import pytest
import torch
from accelerate import cpu_offload
from models import build_patched, random_ids
from reading import assert_close
from transformers import GenerationConfig

from infini_hf import InfiniCache, generate, prefill
from infini_hf.static_cache import StaticInfiniCache

SEGMENT = 8


def autocast(on):
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


def make(family):
    model = build_patched(family, attention="sdpa", segment_length=SEGMENT, overlap=3, sink_tokens=1)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_steps_of_another_precision_are_those_of_the_ordinary_cache(family, before, after):
    model, ids = make(family), random_ids(2, 20)
    with torch.no_grad():
        with autocast(before):
            cache = prefill(model, ids, progress=False)
            static = StaticInfiniCache.from_cache(cache, model)
        with autocast(after):
            for token in random_ids(2, 2 * SEGMENT, seed=1).split(1, dim=1):
                expected = model(token, past_key_values=cache).logits
                # Rounded to bfloat16 wherever autocast multiplies, in another order.
                assert_close(
                    model(token, past_key_values=static).logits, expected, 4e-2 if before or after else 1e-5, "logits"
                )
    held, kept = static.to_infini_cache(), cache
    assert held.seen == kept.seen
    for ours, theirs in zip(held.layers, kept.layers, strict=True):
        assert_close(ours.keys.float(), theirs.keys.float(), 4e-2, "keys")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_autocast_has_read_goes_on_in_float32_exactly(family):
    model, ids = make(family), random_ids(2, 20)
    with torch.no_grad():
        with autocast(True):
            cache = prefill(model, ids, progress=False)
        static = StaticInfiniCache.from_cache(cache, model)
        for token in random_ids(2, 2 * SEGMENT, seed=1).split(1, dim=1):
            expected = model(token, past_key_values=cache).logits
            assert_close(model(token, past_key_values=static).logits, expected, 1e-5, "logits")
    assert all(layer.keys.dtype == torch.float32 for layer in static.layers)


class Quantised(torch.nn.Module):
    """A projection whose weight is stored in eight bits, or not under that name."""

    def __init__(self, linear, dtype):
        super().__init__()
        if dtype is None:
            self.packed = linear.weight
        else:
            self.register_buffer("weight", linear.weight.detach().to(dtype))

    def forward(self, states):
        weight = vars(self)["_buffers"].get("weight")
        return states @ (self.packed if weight is None else weight.to(states.dtype)).T


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, None])
def test_weights_whose_dtype_says_nothing(dtype):
    model, ids = make("llama"), random_ids(2, 20)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Quantised(layer.self_attn.o_proj, dtype)
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = generate(model, ids, **options)
    assert torch.equal(generate(model, ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generate_under_autocast(family):
    model, ids = make(family), random_ids(2, 20)
    with autocast(True):
        for call in (model.generate, lambda *args, **options: generate(model, *args, **options)):
            out = call(ids, max_new_tokens=10, do_sample=False, cache_implementation="static")
            assert out.shape == (2, 30)


@pytest.mark.parametrize("warm", [False, True])
def test_weights_that_accelerate_keeps_elsewhere(warm):
    model, ids = make("llama"), random_ids(2, 20)
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    expected = generate(model, ids, **options)
    cpu_offload(model, execution_device=torch.device("cpu"))
    cache = InfiniCache(model.config)
    if warm:
        prefill(model, ids[:, :12], cache=cache, progress=False)
        assert torch.equal(generate(model, ids[:, 12:], cache=cache, **options), expected[:, 12:])
    else:
        assert torch.equal(generate(model, ids, cache=cache, **options), expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_goes_on_with_its_cache(attention, to, static):
    model = build_patched("llama", attention=attention, segment_length=SEGMENT, overlap=3, sink_tokens=1)
    ids, more = random_ids(2, 20), random_ids(2, 2 * SEGMENT, seed=1)
    cache = prefill(model, ids, progress=False)
    with torch.no_grad():
        expected = model(more, past_key_values=copy.copy(cache)).logits
        model.to(to)
        if static:
            cache = StaticInfiniCache.from_cache(cache, model)
        found = [model(token, past_key_values=cache).logits for token in more.split(1, dim=1)]
    found = torch.cat(found, dim=1)
    assert found.dtype == to
    # What rounding every weight to eight bits makes of a logit.
    assert (found.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    kept = (cache.to_infini_cache() if static else cache).layers[0]
    assert kept.memory.dtype == torch.float32
