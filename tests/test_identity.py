"""Nothing is lost on day one: with fresh gates a patched model is its base model, and the backends agree."""

import pytest
import torch
from models import (
    FAMILIES,
    HYBRID,
    SLIDING_WINDOW,
    build,
    build_patched,
    gate_parameters,
    random_ids,
    relative_error,
)
from oracle import Oracle
from transformers.utils import is_flash_attn_2_available

from infini_hf import InfiniConfig, patch_model

SEGMENT = 24
TOLERANCE = 1e-5
# Stock Gemma 2 refuses sdpa, which has no soft cap.
SDPA_FAMILIES = [family for family in FAMILIES if family != "gemma2"]


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def pair(family, attention="eager", **infini):
    """A base model and its freshly patched twin."""
    return build(family, attention), patch_model(build(family, attention), InfiniConfig(**infini))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [1, SEGMENT - 5, SEGMENT])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_is_the_base_model_to_the_bit(family, length, use_cache):
    base, patched = pair(family, segment_length=SEGMENT, overlap=3, sink_tokens=2)
    ids = random_ids(2, length)
    assert torch.equal(logits_of(patched, ids, use_cache=use_cache), logits_of(base, ids, use_cache=use_cache))


@pytest.mark.parametrize("family", SDPA_FAMILIES)
def test_one_segment_is_the_base_model_with_sdpa(family):
    base, patched = pair(family, "sdpa", segment_length=SEGMENT)
    ids = random_ids(2, SEGMENT)
    assert relative_error(logits_of(patched, ids), logits_of(base, ids)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_one_segment_are_those_of_the_base_model(family):
    base, patched = pair(family, segment_length=SEGMENT)
    ids = random_ids(2, SEGMENT)
    base(ids, labels=ids).loss.backward()
    patched(ids, labels=ids).loss.backward()
    for name, parameter in base.named_parameters():
        assert relative_error(patched.get_parameter(name).grad, parameter.grad) <= TOLERANCE, name


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_gates_have_a_gradient_in_every_head(family, rule):
    model = patch_model(build(family), InfiniConfig(segment_length=8, memory_update=rule))
    ids = random_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    for name, bias in gate_parameters(model).items():
        assert not bias.detach().any(), name
        assert bias.grad.abs().min() > 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_gate_leaves_the_first_segment_exact(family):
    """A sigmoid is 0.5 at zero: only a row that has a memory may mix it in."""
    base, patched = pair(family, segment_length=8, gate="sigmoid")
    ids = random_ids(2, 20)
    expected = logits_of(base, ids[:, :8])
    logits = logits_of(patched, ids)
    assert relative_error(logits[:, :8], expected) <= TOLERANCE
    with torch.no_grad():
        for bias in gate_parameters(patched).values():
            bias.fill_(-100.0)
    # With the gates shut the same model differs where the memory is read, and nowhere else.
    shut = logits_of(patched, ids)
    assert torch.equal(logits[:, :8], shut[:, :8])
    assert relative_error(logits[:, 8:], shut[:, 8:]) > 1e-2


def additive(allowed):
    """A four-dimensional additive mask from `(query, key)` bool."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("overlap", [0, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_base_model_under_a_window_mask(family, overlap):
    """Without sinks window positions and global ones differ by a constant, which RoPE does not see."""
    base, patched = pair(family, segment_length=8, overlap=overlap)
    ids = random_ids(2, 37)
    query, key = torch.arange(37)[:, None], torch.arange(37)[None]
    window = additive((key <= query) & (key >= query // 8 * 8 - overlap))
    if family in HYBRID:
        sliding = additive((key <= query) & (key > query - SLIDING_WINDOW))
        masks = {"full_attention": window, "sliding_attention": sliding}
    else:
        masks = window
    assert relative_error(logits_of(patched, ids), logits_of(base, ids, attention_mask=masks)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_with_sinks_are_windowed_attention(family):
    """Sinks stand right before the overlap in RoPE, so the reference is the oracle, its memory shut off."""
    _, patched = pair(family, segment_length=8, overlap=3, sink_tokens=2)
    ids = random_ids(1, 37)
    with torch.no_grad():
        expected = Oracle(patched).logits(ids[0])
    assert relative_error(logits_of(patched, ids)[0], expected) <= TOLERANCE


BACKENDS = [
    *((family, "sdpa") for family in SDPA_FAMILIES),
    # Compiling takes a while: one global and one hybrid family stand for the others.
    *(pytest.param(family, "flex_attention", marks=pytest.mark.slow) for family in ("llama", "gemma3_text")),
]
MANY_OPTIONS = {"segment_length": 8, "memory_update": "delta", "gate": "sigmoid", "overlap": 3, "sink_tokens": 2}


def assert_backends_agree(eager, other, tolerance):
    """Two models on one input over many segments: in one call, and continued one token into a segment."""
    ids = random_ids(2, 37).to(eager.device)
    expected = logits_of(eager, ids)
    assert relative_error(logits_of(other, ids), expected) <= tolerance
    with torch.no_grad():
        first = other(ids[:, :17])
        second = other(ids[:, 17:], past_key_values=first.past_key_values)
    assert relative_error(torch.cat([first.logits, second.logits], dim=1), expected) <= tolerance


@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_backends_agree_with_eager(family, attention):
    eager, other = build_patched(family, **MANY_OPTIONS), build_patched(family, attention, **MANY_OPTIONS)
    assert other.config._attn_implementation == attention
    assert_backends_agree(eager, other, TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn or a GPU for it is missing")
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_agrees_with_eager(family):
    """On the GPU in bfloat16, all that its kernels take; the tolerance is that of the format over a few layers."""
    eager = build_patched(family, **MANY_OPTIONS).to("cuda", torch.bfloat16)
    flash = build_patched(family, "flash_attention_2", **MANY_OPTIONS).to("cuda", torch.bfloat16)
    assert_backends_agree(eager, flash, 5e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions_are_those_of_the_base_model(family):
    base, patched = pair(family, segment_length=SEGMENT)
    ids = random_ids(2, SEGMENT)
    with torch.no_grad():
        expected = base(ids, output_attentions=True).attentions
        attentions = patched(ids, output_attentions=True).attentions
    assert len(attentions) == len(expected) == base.config.num_hidden_layers
    for actual, wanted in zip(attentions, expected, strict=True):
        assert torch.equal(actual, wanted)
