"""What a run of segments does to the memory, before anybody knows the memory: pure functions on tensors.

The linear rule adds (Eq. 4), so a run is the sum of its contributions. The delta rule (Eq. 5) is affine in M, and z,
which it divides by, is a sum:

    M -> M + A M + B     A = -Σ_t σ(k_t)ᵀ σ(k_t) / (σ(k_t) z)     B = σ(K)ᵀ V

Runs are joined by composing their maps. A map is kept as `[A | B]`, `(batch, num_kv_heads, head_dim, 2 head_dim)` in
float32, in which zeros leave the memory as it is. The other shapes are those of `infini_hf.memory`.
"""

import torch

from . import memory as memory_math


def sum_of_run(keys, values, length, feature_map="elu", scale=None):
    """What the full segments of a run add under the linear rule, a pair shaped like `(memory, memory_norm)`.

    Args:
        keys (`torch.Tensor`): `(batch, num_kv_heads, seq_len, head_dim)`, before RoPE, whole segments.
        values (`torch.Tensor`): the same shape.
        length (`int`): tokens of a segment.
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.
        scale (`torch.Tensor`, *optional*): `(batch, n)` float32, how many times each segment is written, in their
            order; the last for all that follow.
    """
    if scale is None:
        return memory_math.contribution(keys, values, feature_map=feature_map)
    state = memory_math.empty(keys)
    for index, parts in enumerate(zip(keys.split(length, 2), values.split(length, 2), strict=True)):
        times = scale[:, min(index, scale.shape[1] - 1)]
        state = memory_math.update(*parts, *state, "linear", feature_map, times)
    return state


def norm_of_run(keys, feature_map="elu"):
    """What a run adds to z, `(batch, num_kv_heads, head_dim)` float32: `Σ σ(K_t)`, by either rule."""
    return memory_math.map_keys(keys, feature_map).sum(-2)


def map_of_segment(keys, values, memory_norm, feature_map="elu"):
    """The delta rule's write of one segment as a map, `(batch, num_kv_heads, head_dim, 2 head_dim)` float32.

    Args:
        keys (`torch.Tensor`): `(batch, num_kv_heads, seq_len, head_dim)`, before RoPE.
        values (`torch.Tensor`): the same shape.
        memory_norm (`torch.Tensor`): `(batch, num_kv_heads, head_dim)`, float32, z before the segment.
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.
    """
    with memory_math.no_autocast(keys):
        mapped = memory_math.map_keys(keys, feature_map)
        known = memory_math.normalized(mapped, memory_norm)
        return mapped.transpose(-1, -2) @ torch.cat([-known, values.float()], dim=-1)


def compose(first, second):
    """The map of `first` and then `second`."""
    with memory_math.no_autocast(first):
        return first + second + second[..., : second.shape[-2]] @ first


def apply(memory_map, memory):
    """The memory `(batch, num_kv_heads, head_dim, head_dim)` after a map."""
    with memory_math.no_autocast(memory):
        dim = memory.shape[-1]
        return memory + memory_map[..., :dim] @ memory + memory_map[..., dim:]


def map_of_run(keys, values, memory_norm, length, feature_map="elu"):
    """The delta rule's write of whole segments of `length` tokens as one map; arguments as [`map_of_segment`]."""
    # Through the keys, so that a run without a segment is tied to them like any other.
    whole = map_of_segment(keys[:, :, :0], values[:, :, :0], memory_norm, feature_map)
    for part, value in zip(keys.split(length, 2), values.split(length, 2), strict=True):
        if part.shape[2]:
            whole = compose(whole, map_of_segment(part, value, memory_norm, feature_map))
            memory_norm = memory_norm + norm_of_run(part, feature_map)
    return whole
