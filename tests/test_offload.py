"""Weights that accelerate keeps elsewhere: reading, scoring, generating and snapshots are those of the whole model."""

import pytest
import torch
from accelerate import cpu_offload
from models import build_patched, random_ids
from reading import assert_same_state

from infini_hf import InfiniCache, generate, prefill, score


@pytest.fixture(params=["llama", "gemma3_text"])
def pair(request):
    """The same model twice, whole and with every weight offloaded."""
    whole, offloaded = (build_patched(request.param, segment_length=8, overlap=2) for _ in range(2))
    return whole, cpu_offload(offloaded, execution_device=torch.device("cpu"))


def test_everything_that_streams_equals_the_whole_model(pair, tmp_path):
    whole, offloaded = pair
    assert next(offloaded.parameters()).device.type == "meta"
    ids, question = random_ids(1, 30), random_ids(1, 3, seed=1)
    assert torch.equal(score(offloaded, ids), score(whole, ids))
    caches = [prefill(model, ids) for model in pair]
    assert_same_state(caches[1], caches[0], tolerance=0)
    answers = [
        generate(model, question, cache=cache, max_new_tokens=12, do_sample=False)
        for model, cache in zip(pair, caches, strict=True)
    ]
    assert torch.equal(*answers)
    caches[1].save_pretrained(tmp_path)
    assert_same_state(InfiniCache.from_pretrained(tmp_path, model=offloaded), caches[0], tolerance=0)


def test_padded_snapshots_too(pair, tmp_path):
    whole, offloaded = pair
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    prefill(offloaded, ids, attention_mask=mask).save_pretrained(tmp_path)
    cache = InfiniCache.from_pretrained(tmp_path, model=offloaded)
    question = random_ids(2, 3, seed=1)
    expected = generate(whole, question, cache=prefill(whole, ids, attention_mask=mask), max_new_tokens=9)
    assert torch.equal(generate(offloaded, question, cache=cache, max_new_tokens=9), expected)
