"""Ways to run a model over the same tokens, and to compare what it says and remembers."""

import torch

from infini_hf import InfiniCache

STATE = ("keys", "values", "memory", "memory_norm")


def read(model, ids, sizes=None, mask=None, cache=None):
    """Logits `(batch, seq_len, vocabulary)` and the cache of a call per chunk; `sizes` defaults to one chunk."""
    cache = InfiniCache(model.config) if cache is None else cache
    sizes = [ids.shape[1]] if sizes is None else sizes
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    with torch.no_grad():
        logits = [
            model(chunk, attention_mask=part, past_key_values=cache, use_cache=True).logits
            for chunk, part in zip(ids.split(sizes, dim=1), masks, strict=True)
        ]
    return torch.cat(logits, dim=1), cache


def read_whole(model, ids, mask=None):
    """Logits of one call without any cache: the segments are scanned inside each layer."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def state_of(cache, row=None):
    """Name and tensor of all that a cache holds; of one `row` without the columns that stand left of its window."""
    for index, layer in enumerate(cache.layers):
        for name in STATE if index in cache.infini_layers else ("keys", "values"):
            tensor = getattr(layer, name)
            if row is not None:
                tensor = tensor[row : row + 1]
                if name in ("keys", "values") and index in cache.infini_layers:
                    window = cache.infini_config.window_length(layer.seen[row])
                    tensor = tensor[:, :, tensor.shape[2] - window :]
            yield f"layer {index} {name}", tensor


def assert_close(actual, expected, tolerance=1e-5, what="tensors"):
    """Equal to `tolerance` times the largest expected value, which is what rounding is relative to."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.numel():
        actual, expected = actual.double(), expected.double()
        error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_same_state(actual, expected, tolerance=1e-5, row=None, expected_row=None):
    """Two caches remember the same tokens, or one row of each does."""
    if row is None:
        assert (actual.seen, actual.columns) == (expected.seen, expected.columns)
    else:
        assert actual.seen[row] == expected.seen[expected_row]
    pairs = zip(state_of(actual, row), state_of(expected, expected_row), strict=True)
    for (name, ours), (_, theirs) in pairs:
        assert_close(ours, theirs, tolerance, name)
