"""A forward that breaks anywhere is noticed, and `prefill` undoes it: no layer is ever a token ahead of another."""

import pytest
import torch
from models import build_patched, random_ids, relative_error
from reading import read, read_whole

from infini_hf import InfiniCache, prefill

PLACES = [
    ("llama", {}, 0),
    ("llama", {}, 1),
    ("llama", {"layers": [1]}, 1),
    ("gemma2", {}, 1),
    ("gemma3_text", {}, 0),
    ("gemma3_text", {}, 2),
    ("gemma3_text", {}, 3),
]


class Broken(Exception):
    pass


def broken_before(model, layer):
    """A hook that breaks the next forward before a layer."""

    def stop(*_):
        raise Broken

    return model.model.layers[layer].register_forward_pre_hook(stop)


def left_padded(columns, padding):
    mask = torch.ones(2, columns, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


@pytest.mark.parametrize(("family", "options", "layer"), PLACES)
def test_a_broken_call_is_noticed_or_leaves_no_trace(family, options, layer):
    model, ids = build_patched(family, segment_length=8, **options), random_ids(1, 31)
    _, cache = read(model, ids[:, :20])
    hook = broken_before(model, layer)
    with pytest.raises(Broken):
        read(model, ids[:, 20:21], cache=cache)
    hook.remove()
    if layer:
        with pytest.raises(ValueError, match=r"have read \[20, 21\] columns: a forward was interrupted"):
            read(model, ids[:, 20:], cache=cache)
    else:
        rest, _ = read(model, ids[:, 20:], cache=cache)
        assert relative_error(rest, read_whole(model, ids)[:, 20:]) <= 1e-5


def test_padding_of_a_broken_call_is_forgotten():
    model, ids = build_patched("gemma3_text", segment_length=8), random_ids(2, 31)
    mask = left_padded(31, 3)
    _, cache = read(model, ids[:, :20], mask=mask[:, :20])
    hook = broken_before(model, 0)
    with pytest.raises(Broken):
        read(model, ids[:, 20:24], mask=mask[:, 20:24], cache=cache)
    hook.remove()
    rest, _ = read(model, ids[:, 20:], mask=mask[:, 20:], cache=cache)
    assert relative_error(rest, read_whole(model, ids, mask)[:, 20:]) <= 1e-5


@pytest.mark.parametrize(("family", "options", "layer"), PLACES)
def test_prefill_undoes_a_broken_chunk(family, options, layer):
    model, ids = build_patched(family, segment_length=8, **options), random_ids(1, 31)
    cache = prefill(model, ids[:, :20], cache=InfiniCache(model.config), chunk_size=5)
    hook = broken_before(model, layer)
    with pytest.raises(Broken):
        prefill(model, ids[:, 20:25], cache=cache)
    hook.remove()
    rest, _ = read(model, ids[:, 20:], cache=cache)
    assert relative_error(rest, read_whole(model, ids)[:, 20:]) <= 1e-5
