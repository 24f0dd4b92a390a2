"""Every fast path of a layer against the plain one: whole segments at once, and causal attention without a mask."""

import itertools

import pytest
import torch
from models import build_patched, gate_parameters, random_ids, relative_error
from reading import assert_same_state, read
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from infini_hf import InfiniCache, attention, local_attention
from infini_hf.config import FEATURE_MAPS, MEMORY_UPDATES
from infini_hf.fast_paths import MODES, Choice, fast_paths
from infini_hf.segments import Layout

SEGMENT = 8
LENGTH = 5 * SEGMENT + 5
CARRIES = [(0, 0), (3, 2), (SEGMENT, 1), (0, 3), (SEGMENT, SEGMENT)]
TOLERANCE = 1e-5


def options(rule="linear", feature_map="elu", carry=(3, 2)):
    overlap, sinks = carry
    return {
        "segment_length": SEGMENT,
        "memory_update": rule,
        "feature_map": feature_map,
        "overlap": overlap,
        "sink_tokens": sinks,
    }


def logits_and_gradients(model, ids, sizes=None, **inputs):
    """Logits of one call, or of a call per chunk into a cache, and the gradients of their weighted sum by name."""
    model.zero_grad()
    cache = None if sizes is None else InfiniCache(model.config)
    chunks = ids.split(sizes or ids.shape[1], dim=1)
    outputs = [model(chunk, past_key_values=cache, use_cache=cache is not None, **inputs).logits for chunk in chunks]
    logits = torch.cat(outputs, dim=1)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_both_equal(actual, expected, tolerance=TOLERANCE):
    assert relative_error(actual[0], expected[0]) <= tolerance
    for name, gradient in expected[1].items():
        assert relative_error(actual[1][name], gradient) <= 3 * tolerance, name


ALL_OPTIONS = [("sdpa", *values) for values in itertools.product(MEMORY_UPDATES, FEATURE_MAPS, CARRIES)]


@pytest.mark.parametrize(
    ("backend", "rule", "feature_map", "carry"),
    [*ALL_OPTIONS, ("eager", "linear", "elu", CARRIES[0]), ("eager", "delta", "exp", CARRIES[1])],
)
def test_fast_paths_give_the_logits_and_gradients_of_the_plain_ones(backend, rule, feature_map, carry):
    """In one call, and in chunks that end inside a segment and hold several."""
    model = build_patched("llama", backend, **options(rule, feature_map, carry))
    ids = random_ids(2, LENGTH)
    with fast_paths("never"):
        plain = logits_and_gradients(model, ids)
    assert all(bool(plain[1][name].abs().min() > 0) for name in gate_parameters(model))
    for mode, sizes in (("auto", None), ("always", None), ("always", [5, 19, 21])):
        with fast_paths(mode):
            assert_both_equal(logits_and_gradients(model, ids, sizes), plain)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3"])
def test_fast_paths_of_other_families_are_the_plain_ones(family):
    model = build_patched(family, "eager" if family == "gemma2" else "sdpa", **options("delta", "exp"))
    ids = random_ids(2, LENGTH)
    with fast_paths("never"):
        plain = logits_and_gradients(model, ids)
    with fast_paths("always"):
        assert_both_equal(logits_and_gradients(model, ids), plain)


@pytest.mark.parametrize("carry", CARRIES[:2], ids=str)
def test_scaled_writes_of_whole_segments(carry):
    model = build_patched("llama", **options("linear", "exp", carry))
    ids, scale = random_ids(2, LENGTH), torch.rand(2, 4) + torch.tensor([[0.5], [3.0]])
    with fast_paths("never"):
        plain = logits_and_gradients(model, ids, memory_scale=scale)
    with fast_paths("always"):
        assert_both_equal(logits_and_gradients(model, ids, memory_scale=scale), plain)
        assert relative_error(logits_and_gradients(model, ids)[0], plain[0]) > 1e-2


@pytest.mark.parametrize("carry", CARRIES, ids=str)
@pytest.mark.parametrize("rule", MEMORY_UPDATES)
def test_the_state_after_whole_segments_is_that_of_one_after_another(rule, carry):
    model = build_patched("llama", "sdpa", **options(rule, "elu", carry))
    ids = random_ids(2, LENGTH)
    with fast_paths("never"):
        logits, expected = read(model, ids, [SEGMENT] * 5 + [5])
    for sizes in ([LENGTH], [3 * SEGMENT, LENGTH - 3 * SEGMENT], [5, LENGTH - 5]):
        with fast_paths("always"):
            actual, cache = read(model, ids, sizes)
        assert relative_error(actual, logits) <= TOLERANCE
        assert_same_state(cache, expected)


def test_rows_that_begin_anew_read_nothing_beside_rows_that_go_on():
    """Both stand at a boundary, so they share a run, and only one of them has a memory in its first segment."""
    model = build_patched("llama", **options(carry=(0, 0)))
    ids, more = random_ids(2, 2 * SEGMENT), random_ids(2, 3 * SEGMENT, seed=1)
    results = {}
    for mode in ("never", "always"):
        with fast_paths(mode):
            _, cache = read(model, ids)
            cache.reset_rows(torch.tensor([False, True]))
            results[mode] = read(model, more, cache=cache)[0]
            alone = read(model, more[1:])[0]
    assert relative_error(results["always"], results["never"]) <= TOLERANCE
    assert relative_error(results["always"][1:], alone) <= TOLERANCE


def calls_of(model, monkeypatch):
    """The shapes of queries, keys and mask of every call of the backend that the model names, as they come."""
    name, calls = model.config._attn_implementation, []
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(name, type(model.model.layers[0].self_attn).eager_attention)

    def spy(module, query, key, value, mask, **kwargs):
        calls.append((tuple(query.shape), tuple(key.shape), mask))
        return stock(module, query, key, value, mask, **kwargs)

    if name == "eager":
        monkeypatch.setattr(type(model.model.layers[0].self_attn), "eager_attention", staticmethod(spy))
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, spy)
    return calls


def test_whole_segments_are_one_call_of_the_backend(monkeypatch):
    model = build_patched("llama", **options(carry=(3, 2)), layers=[0])
    calls = calls_of(model, monkeypatch)
    with fast_paths("auto"):
        _, cache = read(model, random_ids(2, 3))
        del calls[:]
        read(model, random_ids(2, LENGTH - 3), cache=cache)
    shapes = [(query[0], query[2], key[2]) for query, key, _ in calls if key[1] == 3]
    # What is left of the first segment, four more as rows of a batch, and what begins the last: the second layer is
    # stock and reads all columns at once.
    assert shapes[:3] == [(2, 5, 8), (8, 8, 13), (2, 5, 10)]
    with fast_paths("never"):
        del calls[:]
        read(model, random_ids(2, LENGTH))
    assert [(query[0], query[2], key[2]) for query, key, _ in calls][:6] == [(2, 8, 8), *[(2, 8, 13)] * 4, (2, 5, 10)]


def test_a_run_holds_a_bounded_number_of_tokens(monkeypatch):
    """And, where scores exist as a tensor, a bounded number of those."""
    model = build_patched("llama", **options(carry=(0, 0)))
    ids = random_ids(2, LENGTH)
    with torch.no_grad(), fast_paths("never"):
        expected = model(ids).logits
    for name, limit in (("TOKENS_AT_ONCE", {"cpu": 2 * 2 * SEGMENT}), ("SCORES_AT_ONCE", 2 * 2 * 6 * SEGMENT**2)):
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, limit)
            calls = calls_of(model, patch)
            with torch.no_grad(), fast_paths("auto"):
                assert relative_error(model(ids).logits, expected) <= TOLERANCE
            assert [query[0] for query, _, _ in calls] == 2 * [4, 4, 2, 2]


def test_patched_layers_with_sdpa_build_no_mask(monkeypatch):
    """A chunk continues a segment, whole segments carry an overlap: the stock caller would ask for a mask in each."""
    model, stock = build_patched("llama", "sdpa", **options()), attention.build_mask
    shapes, masks = [], []

    def spy(config, batch, queries, keys, *rest):
        shapes.append((queries, keys))
        masks.append(stock(config, batch, queries, keys, *rest))
        return masks[-1]

    monkeypatch.setattr(attention, "build_mask", spy)
    with fast_paths("always"):
        read(model, random_ids(2, LENGTH), [5, 1, 19, 20])
    # Where queries are as many as keys, and where there is one, the backend is asked.
    assert all(queries in (1, keys) for queries, keys in shapes)
    assert all(mask is None for mask, (queries, _) in zip(masks, shapes, strict=True) if queries > 1)
    with fast_paths("never"):
        read(model, random_ids(2, LENGTH), [5, 1, 19, 20])
    assert any(mask is not None for mask, (queries, _) in zip(masks, shapes, strict=True) if queries > 1)


def test_a_backend_of_the_users_under_the_name_of_sdpa_is_the_one_that_runs(monkeypatch):
    model = build_patched("llama", "sdpa", **options())
    with fast_paths("never"):
        expected = read(model, random_ids(2, LENGTH))[0]
    calls = calls_of(model, monkeypatch)
    with fast_paths("always"):
        assert relative_error(read(model, random_ids(2, LENGTH))[0], expected) <= TOLERANCE
    assert any(mask is not None for _, _, mask in calls)


def test_flash_attention_gets_no_mask_for_queries_that_are_the_last_of_their_keys(monkeypatch):
    """Its kernels align the causal mask with the last key; this stand-in does as they do."""

    def flash(module, query, key, value, mask, scaling=None, **kwargs):
        assert mask is None
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    eager, other = build_patched("llama", **options()), build_patched("llama", **options())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    other.config._attn_implementation_internal = "flash_attention_2"
    for sizes in ([LENGTH], [5, 1, 19, 20]):
        assert (
            relative_error(read(other, random_ids(2, LENGTH), sizes)[0], read(eager, random_ids(2, LENGTH))[0]) < 1e-5
        )


def test_dropout_and_weights_are_the_stock_callers(monkeypatch):
    model = build_patched("llama", "sdpa", overrides={"attention_dropout": 0.5}, **options()).train()
    calls = calls_of(model, monkeypatch)
    monkeypatch.setattr(local_attention, "sdpa_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"])
    with fast_paths("always"):
        model(random_ids(2, LENGTH), use_cache=False)
        assert any(mask is not None for _, _, mask in calls)
        del calls[:]
        model.eval()(random_ids(2, LENGTH), use_cache=False)
        assert all(mask is None for _, _, mask in calls)
        model(random_ids(2, LENGTH), use_cache=False, output_attentions=True)
        assert any(mask is not None for _, _, mask in calls)


WINDOWS = [(1, 2), (5, 3), (3, 40), (16, 16), (40, 7)]


def draw_window(held, count, dtype=torch.float32, device="cpu"):
    """Queries of 6 heads over a window of 3, and the gradient of the output."""
    shapes = (2, 6, count, 16), (2, 3, held + count, 16), (2, 3, held + count, 16), (2, 6, count, 16)
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def explicit(queries, keys, values, held, scaling):
    """Attention with the scores and the mask written out."""
    keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    scores = scaling * queries @ keys.transpose(-1, -2)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(held)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values


def without_mask(queries, keys, values, held, scaling, parts):
    """The same by the fast path, from one window or from its two parts."""
    layout = Layout((held,) * 2, (queries.shape[2],) * 2, queries.device)
    windows = [list(window.tensor_split((held,), dim=2)) if parts == 2 else [window] for window in (keys, values)]
    plan = type("Plan", (), {"share": staticmethod(lambda key, build: build())})
    return local_attention.attend_window(queries, *windows, scaling, plan, layout)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize(("held", "count"), WINDOWS)
def test_attention_without_a_mask_is_attention_with_one(held, count, mode, parts):
    """With queries for two groups of heads: a tiled repeat of the keys would be seen."""
    inputs, gradient = draw_window(held, count)
    expected = explicit(*inputs, held, 0.3)
    with fast_paths(mode):
        actual = without_mask(*inputs, held, 0.3, parts)
    assert relative_error(actual, expected) <= TOLERANCE
    wanted = torch.autograd.grad(expected, inputs, gradient)
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, gradient), wanted, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_attention_without_a_mask_in_half_precision_and_under_autocast(mode, dtype):
    inputs, _ = draw_window(7, 9)
    expected = explicit(*inputs, 7, 0.3)
    with fast_paths(mode), torch.no_grad():
        halves = without_mask(*(tensor.to(dtype) for tensor in inputs), 7, 0.3, 2)
        with torch.autocast("cpu", dtype=dtype):
            cast = without_mask(*inputs, 7, 0.3, 1)
    for actual in (halves, cast):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= 8 * torch.finfo(dtype).eps


def test_what_was_read_under_autocast_is_read_on_without_it():
    """A run of one whole segment has held and new tokens in two parts, which meet in no other place."""
    model, ids = build_patched("llama", "sdpa", **options(carry=(3, 2))), random_ids(1, 4 * SEGMENT)
    logits = {}
    for mode in ("always", "never"):
        cache = InfiniCache(model.config)
        with fast_paths(mode), torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(ids[:, : 2 * SEGMENT], past_key_values=cache)
            assert cache.layers[0].keys.dtype == torch.bfloat16
            logits[mode] = model(ids[:, 2 * SEGMENT : 3 * SEGMENT], past_key_values=cache).logits
    assert logits["always"].dtype == torch.float32
    # The states before it differ as bfloat16 rounds them.
    assert relative_error(logits["always"], logits["never"]) <= 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("held", "count"), WINDOWS)
def test_attention_without_a_mask_on_a_gpu(held, count, dtype):
    inputs, gradient = draw_window(held, count, dtype, "cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    expected = explicit(*inputs, held, 0.3)
    actual = without_mask(*inputs, held, 0.3, 2)
    assert relative_error(actual, expected) <= tolerance
    wanted = torch.autograd.grad(expected, inputs, gradient)
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, gradient), wanted, strict=True):
        assert relative_error(ours, theirs) <= tolerance


def test_the_rotation_is_the_stock_one_to_the_bit_and_so_is_its_gradient():
    """Also for tables whose halves differ, which says which half goes where."""
    states, cos, sin = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)
    actual = local_attention.rotate(states, cos, sin)
    assert torch.equal(actual, expected)
    gradient = torch.randn(expected.shape)
    (ours,), (wanted,) = (torch.autograd.grad(output, states, gradient) for output in (actual, expected))
    assert relative_error(ours, wanted) <= 1e-6


def test_a_mode_holds_inside_its_context_alone():
    assert MODES == ("auto", "always", "never")
    before = Choice.mode
    with fast_paths("never"):
        with pytest.raises(ZeroDivisionError), fast_paths("always"):
            1 / len(Choice.mode.removeprefix("always"))
        assert Choice.mode == "never"
    assert Choice.mode == before
    with pytest.raises(ValueError, match=r"^mode='on': must be one of 'auto', 'always', 'never'$"), fast_paths("on"):
        pass
