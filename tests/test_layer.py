"""The patched layers against the float64 oracle: logits, gradients, causality and reach."""

import itertools

import pytest
import torch
from models import GLOBAL, HYBRID, build_patched, gate_parameters, random_ids, relative_error
from oracle import Oracle

from infini_hf import InfiniCache
from infini_hf.config import FEATURE_MAPS, GATES, MEMORY_UPDATES
from infini_hf.fast_paths import fast_paths

SEGMENT = 8
# Four full segments and an open one.
LENGTH = 4 * SEGMENT + 5
# Overlap and sinks: the paper's hard edge, both, and a whole segment of overlap.
CARRIES = [(0, 0), (3, 2), (SEGMENT, 1)]
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def infini_options(rule="linear", feature_map="elu", gate="tanh", carry=(0, 0)):
    return {
        "segment_length": SEGMENT,
        "memory_update": rule,
        "feature_map": feature_map,
        "gate": gate,
        "overlap": carry[0],
        "sink_tokens": carry[1],
    }


def assert_equals_oracle(model, ids, use_cache=True):
    """Logits of every row, read in one call, are those of the oracle on that row."""
    oracle = Oracle(model)
    with torch.no_grad():
        logits = model(ids, use_cache=use_cache).logits
        for row, expected in zip(logits, map(oracle.logits, ids), strict=True):
            assert relative_error(row, expected) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("carry", CARRIES, ids=str)
@pytest.mark.parametrize(("rule", "feature_map", "gate"), list(itertools.product(MEMORY_UPDATES, FEATURE_MAPS, GATES)))
def test_every_option_equals_the_oracle(rule, feature_map, gate, carry):
    model = build_patched("llama", **infini_options(rule, feature_map, gate, carry))
    assert_equals_oracle(model, random_ids(1, LENGTH))


@pytest.mark.parametrize("carry", CARRIES, ids=str)
@pytest.mark.parametrize("rule", MEMORY_UPDATES)
@pytest.mark.parametrize("mode", ["always", "never"])
def test_fast_paths_and_plain_ones_equal_the_oracle(mode, rule, carry):
    model = build_patched("llama", "sdpa", **infini_options(rule, "exp", "sigmoid", carry))
    with fast_paths(mode):
        assert_equals_oracle(model, random_ids(2, LENGTH))


@pytest.mark.parametrize(
    "options",
    [
        infini_options("linear", "elu", "sigmoid", CARRIES[0]),
        infini_options("linear", "exp", "tanh", CARRIES[2]),
        infini_options("delta", "elu", "tanh", CARRIES[1]),
    ],
    ids=["linear", "exp", "delta"],
)
@pytest.mark.parametrize("family", [family for family in GLOBAL + HYBRID if family != "llama"])
def test_every_family_equals_the_oracle(family, options):
    assert_equals_oracle(build_patched(family, **options), random_ids(1, LENGTH))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_batch_equal_the_oracle_with_and_without_a_cache(use_cache):
    model = build_patched("llama", **infini_options("delta", "exp", "sigmoid", (3, 2)))
    assert_equals_oracle(model, random_ids(3, LENGTH), use_cache)


@pytest.mark.parametrize("chunk", [1, 3, SEGMENT, SEGMENT + 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_of_any_size_equal_the_oracle(family, chunk):
    model = build_patched(family, **infini_options("delta", "elu", "sigmoid", (3, 2)))
    ids = random_ids(1, LENGTH)
    cache = InfiniCache(model.config)
    with torch.no_grad():
        parts = [model(piece, past_key_values=cache).logits[0] for piece in ids.split(chunk, dim=1)]
        expected = Oracle(model).logits(ids[0])
    assert relative_error(torch.cat(parts), expected) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("length", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 1])
def test_lengths_around_a_boundary_equal_the_oracle(length):
    model = build_patched("llama", **infini_options("delta", "elu", "sigmoid", (3, 2)))
    assert_equals_oracle(model, random_ids(1, length))


@pytest.mark.parametrize(("overlap", "sinks"), [(0, 3), (0, SEGMENT), (SEGMENT, SEGMENT), (5, 0), (6, 6)])
def test_every_shape_of_window_equals_the_oracle(overlap, sinks):
    """Also where sinks and overlap share tokens in the second segment, each of which may count once only."""
    model = build_patched("llama", **infini_options(carry=(overlap, sinks)))
    assert_equals_oracle(model, random_ids(1, LENGTH))


def test_segments_of_one_token_equal_the_oracle():
    model = build_patched("llama", **{**infini_options("delta", "elu", "tanh", (1, 1)), "segment_length": 1})
    assert_equals_oracle(model, random_ids(1, 9))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_patch_of_some_layers_equals_the_oracle(family):
    """The layers left out keep their full or sliding attention at global positions."""
    last = {"llama": 1, "gemma3_text": 3}[family]
    model = build_patched(family, layers=[last], **infini_options("linear", "exp", "tanh", (3, 2)))
    assert len(gate_parameters(model)) == 1
    assert_equals_oracle(model, random_ids(1, LENGTH))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", infini_options("linear", "elu", "tanh", (0, 0))),
        ("llama", infini_options("delta", "exp", "sigmoid", (0, 0))),
        ("llama", infini_options("delta", "elu", "tanh", (SEGMENT, 1))),
        ("qwen3", infini_options("linear", "exp", "sigmoid", (3, 2))),
        ("gemma2", infini_options("delta", "elu", "sigmoid", (3, 2))),
    ],
    ids=["linear", "delta-exp", "overlap", "qwen3", "gemma2"],
)
def test_gradients_equal_those_of_the_oracle(family, options):
    """Of the embeddings, and of every weight of the attention; the loss weighs all logits of all segments."""
    model = build_patched(family, **options)
    oracle = Oracle(model)
    embeds = model.get_input_embeddings()(random_ids(1, LENGTH)).detach()
    weights = torch.randn(LENGTH, model.config.vocab_size)
    expected_inputs = embeds[0].double().requires_grad_()
    (oracle.logits(embeds=expected_inputs) * weights.double()).sum().backward()
    expected = dict(oracle.model.named_parameters())
    compared = [name for name, _ in model.named_parameters() if ".self_attn." in name]
    assert sum(name.endswith("memory_gate.bias") for name in compared) == len(gate_parameters(model)) > 1

    for mode in ("auto", "never"):
        model.zero_grad()
        inputs = embeds.clone().requires_grad_()
        with fast_paths(mode):
            (model(inputs_embeds=inputs).logits[0] * weights).sum().backward()
        assert relative_error(inputs.grad[0], expected_inputs.grad) <= GRADIENT_TOLERANCE
        for name in compared:
            actual = model.get_parameter(name).grad
            assert relative_error(actual, expected[name].grad) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("changed", [0, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3, LENGTH - 1])
def test_a_token_changes_no_logit_before_it(family, changed):
    model = build_patched(family, **infini_options("delta", "elu", "sigmoid", (3, 2)))
    ids = random_ids(1, LENGTH)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(ids).logits[0], model(other).logits[0]
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("rule", MEMORY_UPDATES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_open_gates_reach_the_first_segment_from_every_later_one(rule, feature_map):
    model = build_patched("llama", **infini_options(rule, feature_map))
    moved = movement_after_changing_the_first_segment(model)
    for segment in range(1, 5):
        assert moved[segment * SEGMENT : (segment + 1) * SEGMENT].min() > 1e-4


def test_closed_gates_do_not_reach_past_the_segment():
    model = build_patched("llama", **infini_options())
    with torch.no_grad():
        for bias in gate_parameters(model).values():
            bias.zero_()
    moved = movement_after_changing_the_first_segment(model)
    assert moved[:SEGMENT].max() > 1e-2
    assert moved[SEGMENT:].max() == 0


def movement_after_changing_the_first_segment(model):
    """How far each token's logits move, `(seq_len,)`, when the second token of the row is another."""
    ids = random_ids(1, LENGTH)
    other = ids.clone()
    other[0, 1] = (ids[0, 1] + 1) % model.config.vocab_size
    with torch.no_grad():
        return (model(ids).logits - model(other).logits).abs()[0].amax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_float32_in_a_half_precision_model(dtype):
    """And the logits are the oracle's as far as the format goes: the state adds no error of its own."""
    model = build_patched("llama", **infini_options("delta", "elu", "tanh", (3, 2))).to(dtype)
    cache = InfiniCache(model.config)
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits[0]
        expected = Oracle(model).logits(ids[0])
    for layer in cache.infini_layers.values():
        assert layer.memory.dtype == layer.memory_norm.dtype == torch.float32
        assert layer.keys.dtype == dtype
    assert relative_error(logits, expected) <= 32 * torch.finfo(dtype).eps


def test_the_state_is_float32_under_autocast():
    model = build_patched("llama", **infini_options("delta", "exp", "tanh", (3, 2)))
    cache = InfiniCache(model.config)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_ids(1, LENGTH), past_key_values=cache).logits
    for layer in cache.infini_layers.values():
        assert layer.memory.dtype == layer.memory_norm.dtype == torch.float32
    assert logits.isfinite().all()
