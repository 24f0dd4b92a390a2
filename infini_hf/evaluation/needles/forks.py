"""Forked reading: what streams have in common is read once, each goes on alone in a copy of the cache.

The output of a patched model does not depend on where its input was cut, so a fork holds what its stream holds when it
is read alone. Over depths `d` of streams of `L` tokens this costs `(1 + Σ (1 − d)) L` in place of one `L` each.
"""

import copy

import numpy as np
import torch

from ...cache import InfiniCache
from ...streaming import prefill


def fork_points(batches):
    """Where each batch of streams leaves the trunk: before the first needle of any of its rows.

    Args:
        batches (`dict[object, list[Layout]]`): for each name, the streams of a batch, all of one length.

    Returns:
        `dict[object, int]`: tokens read with the trunk, in the order in which the trunk meets them.
    """
    points = {name: min(layout.shared for layout in batch) for name, batch in batches.items()}
    return dict(sorted(points.items(), key=lambda pair: pair[1]))


def tokens_to_read(batches):
    """`int`: tokens that [`read_forked`] reads for these batches, all rows counted."""
    points, rows = fork_points(batches), max(map(len, batches.values()))
    forks = sum(len(batch) * (batch[0].tokens - points[name]) for name, batch in batches.items())
    return rows * max(points.values()) + forks


def read_forked(model, trunk, batches, bar=None, chunk_size=2048):
    """Read batches of streams that share their filler; each is handed over as soon as it is read.

    Args:
        model (`PreTrainedModel`): a patched model.
        trunk (`numpy.ndarray`): `(batch, tokens)` ids: header and filler of every row.
        batches (`dict[object, list[Layout]]`): for each name, as a depth, the streams of all rows.
        bar (`tqdm`, *optional*): is told of every token read.
        chunk_size (`int`, *optional*, defaults to `2048`): columns in a forward; speed and peak memory only.

    Yields:
        `tuple[object, InfiniCache]`: a name and the cache that holds its whole streams.
    """
    shared, position = InfiniCache(model.config), 0
    for name, point in fork_points(batches).items():
        read(model, trunk[:, position:point], shared, bar, chunk_size)
        position, fork = point, copy.copy(shared)
        rest = [layout.fill(ids)[point:] for layout, ids in zip(batches[name], trunk, strict=True)]
        read(model, np.stack(rest), fork, bar, chunk_size)
        yield name, fork


def read(model, ids, cache, bar=None, chunk_size=2048):
    """Read `(batch, tokens)` ids into a cache, telling the bar of every chunk."""
    for start in range(0, ids.shape[1], chunk_size):
        chunk = torch.from_numpy(ids[:, start : start + chunk_size])
        prefill(model, chunk, cache=cache, chunk_size=chunk_size, progress=False)
        if bar is not None:
            bar.update(chunk.numel())
