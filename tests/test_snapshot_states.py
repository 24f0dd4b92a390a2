"""Snapshots beside what moves in a model: frequencies that follow what was read, padding of a call that failed."""

import copy
import io

import pytest
import torch
from models import build_patched, random_ids
from reading import assert_close, assert_same_state, read

from infini_hf import InfiniCache, prefill
from infini_hf.evaluation.reader import reader_of

SCALED = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}


def make(rope, **changed):
    overrides = {"rope_parameters": {**SCALED[rope], **changed}, "max_position_embeddings": 32}
    return build_patched(overrides=overrides, segment_length=8)


def test_a_cache_from_a_snapshot_can_be_pickled_where_its_window_is_empty(tmp_path):
    """Tensors without elements share their place in the file with the next one."""
    model, ids = build_patched("gemma3_text", segment_length=4), random_ids(4, 8)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = prefill(model, ids, attention_mask=mask)
    assert any(not layer.keys.numel() for layer in cache.infini_layers.values())
    cache.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(InfiniCache.from_pretrained(tmp_path, model=model), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=False), cache)


@pytest.mark.parametrize("rope", SCALED)
@pytest.mark.parametrize("length", [20, 100])
def test_what_a_model_has_read_does_not_make_it_another(rope, length, tmp_path):
    model, ids = make(rope), random_ids(1, length)
    fresh = reader_of(model)
    cache = prefill(model, ids, progress=False)
    assert reader_of(model) == fresh
    cache.save_pretrained(tmp_path)
    prefill(model, ids[:, :5], progress=False)
    for reader in (model, make(rope)):
        loaded = InfiniCache.from_pretrained(tmp_path, reader)
        expected, _ = read(model, ids[:, :12], cache=copy.copy(cache))
        assert_close(read(reader, ids[:, :12], cache=loaded)[0], expected)
    with pytest.raises(ValueError, match="rope_parameters"):
        InfiniCache.from_pretrained(tmp_path, make(rope, factor=2.0))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("rows", [False, True])
def test_padding_of_a_call_that_failed_is_not_saved(family, rows, tmp_path):
    model, ids = build_patched(family, segment_length=8), random_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :18] = 0
    cache = InfiniCache(model.config)
    read(model, ids, mask=mask, cache=cache)
    hook = model.model.layers[0].input_layernorm.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(ids[:, :3], past_key_values=cache)
    hook.remove()
    if rows:
        cache.batch_select_indices(torch.tensor([1, 0]))
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model)
    assert_close(*(read(model, ids[:, :5], cache=one)[0] for one in (loaded, cache)), tolerance=0)


def fail(*_):
    raise torch.OutOfMemoryError("in the first layer")
