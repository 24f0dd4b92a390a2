"""Scaled writes: `memory_scale` stands for that many repeated writes, in every order of the forward."""

from functools import partial

import pytest
import torch
from models import build_patched, random_ids, relative_error

from infini_hf import InfiniCache, generate, memory

L = 8


def test_a_scaled_write_equals_repeated_ones():
    keys, values = torch.randn(2, 3, L, 4), torch.randn(2, 3, L, 4)
    for feature_map in ("elu", "exp", "softmax"):
        once = memory.update(keys, values, *memory.empty(keys), feature_map=feature_map)
        state = once
        for _ in range(4):
            state = memory.update(keys, values, *state, feature_map=feature_map)
        scale = torch.tensor([5.0, 1.0])
        scaled = memory.update(keys, values, *memory.empty(keys), feature_map=feature_map, scale=scale)
        for repeated, plain, ours in zip(state, once, scaled, strict=True):
            torch.testing.assert_close(ours[0], repeated[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=0)


@pytest.fixture
def model():
    return build_patched("llama", segment_length=L, overlap=3)


def test_scaled_segments_weigh_as_much_as_repeated_writes_of_them(model):
    ids, scale = random_ids(2, 4 * L), torch.tensor([[1.0, 3.0, 1.0], [2.0, 1.0, 5.0]])
    with torch.no_grad():
        scaled = model(ids, use_cache=False, memory_scale=scale).logits
        cache = InfiniCache(model.config)
        parts = []
        for segment, chunk in enumerate(ids.split(L, dim=1)):
            before = [(layer.memory, layer.memory_norm) if layer.is_initialized else (0, 0) for layer in cache.layers]
            parts.append(model(chunk, past_key_values=cache).logits)
            if segment == 3:
                break
            for layer, (memory_before, norm_before) in zip(cache.layers, before, strict=True):
                times = scale[:, segment]
                layer.memory = memory_before + times.view(-1, 1, 1, 1) * (layer.memory - memory_before)
                layer.memory_norm = norm_before + times.view(-1, 1, 1) * (layer.memory_norm - norm_before)
    assert relative_error(scaled, torch.cat(parts, dim=1)) < 1e-5
    assert relative_error(scaled, model(ids, use_cache=False).logits) > 1e-3


def test_a_scale_of_one_changes_nothing(model):
    ids = random_ids(2, 3 * L)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        assert torch.equal(plain, model(ids, use_cache=False, memory_scale=torch.ones(2)).logits)
        assert torch.equal(plain, model(ids, use_cache=False, memory_scale=torch.ones(2, 5)).logits)


def test_padded_rows_scale_their_own_segments(model):
    ids, scale = random_ids(2, 4 * L), torch.tensor([[4.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask, use_cache=False, memory_scale=scale).logits
        alone = model(ids[:1, 5:], use_cache=False, memory_scale=scale[:1]).logits
    assert relative_error(both[:1, 5:], alone) < 1e-5


def test_what_does_not_fit_is_refused(model):
    ids = random_ids(2, L)
    with pytest.raises(ValueError, match=r"memory_scale of \(3,\): must be a tensor"):
        model(ids, memory_scale=torch.ones(3))
    with pytest.raises(ValueError, match="memory_scale of float"):
        model(ids, memory_scale=2.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"memory_scale={wrong}: must be a finite number above 0.*leave it out"):
            model(ids, memory_scale=torch.tensor([[1.0, 2.0], [1.0, wrong]]))
    # It counts the segments of one call, and generate makes many.
    for write in (model.generate, partial(generate, model)):
        with pytest.raises(ValueError, match=r"not used by the model: \['memory_scale'\]"):
            write(ids, memory_scale=torch.ones(2), max_new_tokens=2)
    delta = build_patched("llama", segment_length=L, memory_update="delta")
    with pytest.raises(ValueError, match="memory_update='linear'"):
        delta(ids, memory_scale=torch.ones(2))
