"""The output does not depend on how the input was chunked."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, build_patched, gate_parameters, open_gates, random_ids
from reading import assert_close, assert_same_state, read, read_whole, state_of

from infini_hf import InfiniCache, InfiniConfig, patch_model, prefill, unpatch_model
from infini_hf.fast_paths import MODES, fast_paths

# A fixed seed makes a failure repeat.
EXAMPLES = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@st.composite
def inputs(draw):
    """Options of a patch, a shape of the input, and chunk sizes that add up to its length."""
    segment = draw(st.sampled_from([8, 16]))
    options = {
        "segment_length": segment,
        "memory_update": draw(st.sampled_from(["linear", "delta"])),
        "feature_map": draw(st.sampled_from(["elu", "exp"])),
        "gate": draw(st.sampled_from(["tanh", "sigmoid"])),
        "overlap": draw(st.one_of(st.just(0), st.integers(1, segment))),
        "sink_tokens": draw(st.one_of(st.just(0), st.integers(1, segment))),
    }
    length = draw(st.integers(1, 5 * segment))
    sizes, left = [], length
    while left:
        size = min(left, draw(st.one_of(st.just(1), st.integers(1, 3 * segment))))
        sizes.append(size)
        left -= size
    return options, draw(st.integers(1, 3)), length, sizes


def assert_chunking_is_free(model, ids, sizes, tolerance=1e-5):
    """Layer-major, one call into a cache and a call per chunk agree, and so does what they remember."""
    whole = read_whole(model, ids)
    at_once, expected = read(model, ids)
    chunked, cache = read(model, ids, sizes)
    assert_close(at_once, whole, tolerance, "logits of one call with a cache")
    assert_close(chunked, whole, tolerance, f"logits of chunks {sizes}")
    assert_same_state(cache, expected, tolerance)


@pytest.fixture(scope="module")
def stock_models():
    """One stock model for each backend: patched and unpatched for every example."""
    return {attention: build("llama", attention) for attention in ("eager", "sdpa")}


@EXAMPLES
@given(
    case=inputs(),
    attention=st.sampled_from(["eager", "sdpa"]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 100),
)
def test_any_chunks_of_any_patch_give_the_same_logits_and_state(stock_models, case, attention, mode, seed):
    options, batch, length, sizes = case
    model = open_gates(patch_model(stock_models[attention], InfiniConfig(**options)), seed)
    try:
        with fast_paths(mode):
            assert_chunking_is_free(model, random_ids(batch, length, seed), sizes)
    finally:
        unpatch_model(model)


# Stock Gemma 2 does not offer sdpa.
@pytest.mark.parametrize(
    ("family", "attention"), [("gemma2", "eager"), ("gemma3_text", "eager"), ("gemma3_text", "sdpa")]
)
@pytest.mark.parametrize("sizes", [[1] * 6 + [13, 2, 16, 3], [7, 8, 25], [40]], ids=str)
@pytest.mark.parametrize("carried", [{}, {"overlap": 5, "sink_tokens": 2}], ids=["no carry", "carry"])
def test_hybrids_are_free_of_chunking(family, attention, sizes, carried):
    model = build_patched(family, attention, segment_length=8, memory_update="delta", **carried)
    assert_chunking_is_free(model, random_ids(2, 40), sizes)


@pytest.mark.parametrize(("family", "layers"), [("llama", [0]), ("llama", [1]), ("gemma3_text", [3]), ("gemma2", [1])])
@pytest.mark.parametrize("sizes", [[1, 1, 10, 5, 20], [17, 20]], ids=str)
def test_partial_patches_are_free_of_chunking(family, layers, sizes):
    model = build_patched(family, segment_length=8, layers=layers, overlap=3)
    assert sorted(InfiniCache(model.config).infini_layers) == layers
    assert_chunking_is_free(model, random_ids(2, 37), sizes)


@pytest.mark.parametrize("feature_map", ["elu", "exp", "softmax"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_segment_is_written_once_however_it_is_cut(rule, feature_map):
    """After k segments z is the sum of σ(K) over exactly those tokens, and another empty call adds nothing."""
    segment, count = 8, 3
    model = build_patched(segment_length=segment, memory_update=rule, feature_map=feature_map, layers=[0])
    ids = random_ids(2, segment * count)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        keys = attention.project(hidden)[1]
    mapped = torch.where(keys > 0, keys + 1, keys.exp()) if feature_map == "elu" else keys.clamp(max=8).exp()
    for sizes in ([segment * count], [segment] * count, [1] * (segment * count), [3, 5, 8, 7, 1]):
        _, cache = read(model, ids, sizes)
        layer = cache.layers[0]
        assert_close(layer.memory_norm, mapped.sum(2), 1e-5, f"z after chunks {sizes}")
        assert layer.keys.shape[2] == 0
        prefill(model, ids[:, :0], cache=cache)
        assert_close(layer.memory_norm, mapped.sum(2), 1e-5, "z after an empty call")


def test_the_open_segment_is_not_written_before_it_is_full():
    segment = 8
    model = build_patched(segment_length=segment)
    ids = random_ids(1, 3 * segment)
    _, cache = read(model, ids, [2 * segment, segment - 1, 1])
    _, full = read(model, ids[:, : 2 * segment])
    _, almost = read(model, ids[:, : 3 * segment - 1])
    for index, layer in almost.infini_layers.items():
        assert_close(layer.memory_norm, full.layers[index].memory_norm, 1e-6, "z of an open segment")
        assert bool((cache.layers[index].memory_norm > layer.memory_norm).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_memory_is_float32_under_half_precision_models(dtype, rule):
    model = build_patched(segment_length=8, memory_update=rule, overlap=2).to(dtype)
    # Half-precision matrix products round differently for every shape.
    whole = read_whole(model, random_ids(2, 40))
    chunked, cache = read(model, random_ids(2, 40), [1, 6, 13, 20])
    assert whole.dtype == chunked.dtype == dtype
    assert_close(chunked, whole, 0.1, "logits")
    for name, tensor in state_of(cache):
        assert tensor.dtype == (torch.float32 if "memory" in name else dtype), name
        assert bool(tensor.isfinite().all()), name


def test_memory_is_float32_under_autocast_and_equals_that_of_the_bfloat16_keys():
    model = build_patched(segment_length=8, memory_update="delta")
    ids = random_ids(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = read_whole(model, ids)
        chunked, cache = read(model, ids, [1, 6, 13, 20])
    _, reference = read(model, ids)
    assert_close(chunked, whole, 0.1, "logits")
    for (name, tensor), (_, expected) in zip(state_of(cache), state_of(reference), strict=True):
        if "memory" in name:
            assert tensor.dtype == torch.float32, name
            assert_close(tensor, expected, 0.1, name)


def test_sums_of_z_are_exact_in_a_bfloat16_model():
    """Four thousand ones sum to 256 in bfloat16; in float32 the norm goes on growing, segment by segment."""
    model = build_patched(segment_length=64, overrides={"num_hidden_layers": 1}).to(torch.bfloat16)
    ids = random_ids(1, 64)
    once = prefill(model, ids, progress=False).layers[0].memory_norm
    many = prefill(model, ids.repeat(1, 80), chunk_size=640, progress=False).layers[0].memory_norm
    assert_close(many, 80 * once, 1e-4, "z of eighty equal segments")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_long_stream_in_bfloat16_stays_finite_and_bounded(rule):
    shape = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2}
    options = {"segment_length": 256, "memory_update": rule, "overlap": 16, "sink_tokens": 4}
    model = build_patched(overrides={**shape, "num_key_value_heads": 1}, **options).to(torch.bfloat16)
    cache = InfiniCache(model.config)
    sizes = set()
    for piece in range(4):
        prefill(model, random_ids(1, 256_000, seed=piece), cache=cache, chunk_size=5_120, progress=False)
        sizes.add(cache.state_bytes())
    assert cache.seen == (1_024_000,)
    assert len(sizes) == 1
    for name, tensor in state_of(cache):
        assert bool(tensor.isfinite().all()), name
    logits, _ = read(model, random_ids(1, 300, seed=9), cache=cache)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradients_do_not_depend_on_chunks(rule):
    """A cache carries the graph too: the loss of the last chunk reaches the first."""
    model = build_patched(segment_length=8, memory_update=rule, overlap=3, sink_tokens=1)
    ids = random_ids(2, 37)

    def gradients(sizes):
        model.zero_grad()
        cache = InfiniCache(model.config)
        if sizes is None:
            logits = [model(ids, use_cache=False).logits]
        else:
            logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)]
        torch.cat(logits, dim=1)[:, -5:].logsumexp(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients(None)
    assert all(bool(whole[name].abs().min() > 0) for name in gate_parameters(model))
    for sizes in ([37], [1, 7, 12, 17], [10, 10, 10, 7]):
        for name, gradient in gradients(sizes).items():
            assert_close(gradient, whole[name], 1e-4, f"gradient of {name} with chunks {sizes}")


def test_a_copy_of_a_cache_goes_its_own_way():
    model = build_patched("gemma3_text", segment_length=8)
    first, second, third = random_ids(2, 20), random_ids(2, 21, seed=1), random_ids(2, 21, seed=2)
    _, cache = read(model, first)
    twin = copy.copy(cache)
    ours, _ = read(model, second, cache=cache)
    theirs, _ = read(model, third, cache=twin)
    for logits, ids in ((ours, second), (theirs, third)):
        assert_close(logits, read_whole(model, torch.cat([first, ids], dim=1))[:, 20:], 1e-5, "logits after a copy")
