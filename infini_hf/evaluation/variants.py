"""Ways to write and to map that the memory does not have, measured beside the ones it has.

A variant is kept out of [`infini_hf.memory`] until it pays; what it would bring is read off the same random facts as
in [`infini_hf.evaluation.capacity`].
"""

import torch

from .. import memory as memory_math

RULES = ("linear", "delta", "corrected")


def both_signs(states):
    """`(..., head_dim)` and its opposite, `(..., 2 · head_dim)`: the map then tells large from small either way."""
    return torch.cat([states, -states], -1)


def neighbours(states):
    """Products of neighbouring rectified channels, `(..., 2 · head_dim)`: DPFP with ν = 1 (arXiv 2102.11174)."""
    rectified = both_signs(states).relu()
    return rectified * rectified.roll(1, -1)


# The map of keys and that of queries, and how many times as many features as channels they make.
MAPS = {
    "elu": (memory_math.map_keys, memory_math.map_queries, 1),
    "exp": (
        lambda keys: memory_math.map_keys(keys, "exp"),
        lambda queries: memory_math.map_queries(queries, "exp"),
        1,
    ),
    "exp of sum 1": (lambda keys: keys.softmax(-1), lambda queries: memory_math.map_queries(queries, "exp"), 1),
    "relu": (torch.relu, torch.relu, 1),
    "exp, both signs": (
        lambda keys: memory_math.map_keys(both_signs(keys), "exp"),
        lambda queries: memory_math.map_queries(both_signs(queries), "exp"),
        2,
    ),
    "dpfp": (neighbours, neighbours, 2),
}


def correction(mapped, memory_norm):
    """How much of each key is new to z, `γ = 1 − σ(k)ᵀz / ‖σ(k)‖²` (ARMT, arXiv 2407.04841).

    Args:
        mapped (`torch.Tensor`): features `(batch, num_kv_heads, seq_len, features)`.
        memory_norm (`torch.Tensor`): z, `(batch, num_kv_heads, features)`.

    Returns:
        `torch.Tensor`: `(batch, num_kv_heads, seq_len, 1)`: 0 for a key that z holds already, alone.
    """
    return 1 - (mapped @ memory_norm.unsqueeze(-1)) / mapped.square().sum(-1, keepdim=True)


def write(keys, values, memory, memory_norm, rule, feature_map):
    """One write of `(batch, num_kv_heads, seq_len, head_dim)`, as [`infini_hf.memory.update`], by any rule and map.

    `"corrected"` is the delta rule with [`correction`] of z.
    """
    mapped = MAPS[feature_map][0](keys)
    if rule != "linear":
        values = values - memory_math.divide(mapped @ memory, (mapped @ memory_norm.unsqueeze(-1)).squeeze(-1))
    added = mapped if rule != "corrected" else correction(mapped, memory_norm) * mapped
    return memory + mapped.transpose(-1, -2) @ values, memory_norm + added.sum(-2)


def read(queries, memory, memory_norm, feature_map):
    """Retrieval, as [`infini_hf.memory.retrieve`]; a corrected z can make the denominator negative."""
    mapped = MAPS[feature_map][1](queries)
    denominator = mapped @ memory_norm.unsqueeze(-1)
    small = denominator.abs() < memory_math.SMALLEST_NORM
    return (mapped @ memory) / torch.where(small, memory_math.SMALLEST_NORM, denominator)


def recall_variant(facts, rule, feature_map, filler=None, per_write=16):
    """Write facts one by one, then fillers, and ask for every fact with its own key.

    Args:
        facts ([`infini_hf.evaluation.capacity.Facts`]): the facts.
        rule (`str`): of `RULES`.
        feature_map (`str`): of `MAPS`.
        filler (`tuple`, *optional*): keys and values `(seeds, 1, tokens, head_dim)` that are written afterwards.
        per_write (`int`, *optional*, defaults to `16`): fillers in one write.

    Returns:
        `torch.Tensor`: what the memory returns, `(seeds, 1, facts, head_dim)`.
    """
    seeds, _, _, dim = facts.keys.shape
    features = MAPS[feature_map][2] * dim
    state = torch.zeros(seeds, 1, features, dim), torch.zeros(seeds, 1, features)
    parts = [(facts.keys, facts.values, 1), *([] if filler is None else [(*filler, per_write)])]
    for keys, values, size in parts:
        for piece in zip(keys.split(size, dim=2), values.split(size, dim=2), strict=True):
            state = write(*piece, *state, rule, feature_map)
    return read(facts.keys, *state, feature_map)
