"""Rows of a batch by index, also from the end, and an index that is no row's."""

import pytest
import torch
from models import build_patched, random_ids
from reading import assert_close, assert_same_state, read

from infini_hf import InfiniCache
from infini_hf.static_cache import StaticInfiniCache


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("index", [[-1], [-1, 0, -2]])
@pytest.mark.parametrize("uneven", [False, True])
def test_an_index_from_the_end_counts_from_the_end(family, static, index, uneven):
    model = build_patched(family, segment_length=8, overlap=2)
    ids, mask = random_ids(3, 21), torch.ones(3, 21, dtype=torch.int64)
    mask[0, : 9 * uneven] = 0
    caches = []
    for chosen in (index, [row % 3 for row in index]):
        cache = InfiniCache(model.config)
        read(model, ids, mask=mask, cache=cache)
        cache = StaticInfiniCache.from_cache(cache, model) if static else cache
        cache.batch_select_indices(torch.tensor(chosen))
        caches.append(cache)
    new = random_ids(len(index), 1, seed=1)
    assert_close(*(read(model, new, cache=cache)[0] for cache in caches), tolerance=0)
    assert caches[0].seen == caches[1].seen


def test_an_index_that_is_no_row_leaves_the_cache_as_it_is():
    model, ids = build_patched(segment_length=8), random_ids(2, 21)
    cache, untouched = InfiniCache(model.config), InfiniCache(model.config)
    read(model, ids, cache=cache)
    read(model, ids, cache=untouched)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([2, 0, 0]))
    assert_same_state(cache, untouched, tolerance=0)
    assert_close(*(read(model, ids[:, :5], cache=one)[0] for one in (cache, untouched)), tolerance=0)


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, model: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache, model: cache.batch_select_indices(torch.tensor([1])),
        lambda cache, model: cache.batch_repeat_interleave(2),
        lambda cache, model: cache.reset_rows(torch.tensor([True, False])),
        StaticInfiniCache.from_cache,
        lambda cache, model: cache.save_pretrained(cache.notes["folder"]),
    ],
)
def test_what_looks_at_an_offloaded_state_waits_for_it_first(use, monkeypatch, tmp_path):
    """On a GPU the layer that comes first next is on its way to it; here, that the call is made before any use."""
    model, ids = build_patched(segment_length=8), random_ids(2, 21)
    cache = InfiniCache(model.config)
    read(model, ids, cache=cache)
    cache.notes["folder"] = str(tmp_path)
    held, waited = cache.layers[0].keys, []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: waited.append(cache.layers[0].keys is held))
    use(cache, model)
    assert not waited
    cache = InfiniCache(model.config)
    read(model, ids, cache=cache)
    cache.notes["folder"], held = str(tmp_path), cache.layers[0].keys
    cache.offloading = True
    use(cache, model)
    assert waited
    assert waited[0]
