"""The compressive memory as pure functions on tensors: no module, no cache, no transformers.

Equation numbers are those of "Leave No Context Behind" (arXiv 2404.07143). Shapes use one vocabulary:

    queries               (batch, num_heads, seq_len, head_dim)        any floating dtype, before RoPE
    keys, values          (batch, num_kv_heads, seq_len, head_dim)     any floating dtype, keys before RoPE
    memory       M        (batch, num_kv_heads, head_dim, head_dim)    float32
    memory_norm  z        (batch, num_kv_heads, head_dim)              float32

Query head `h` reads the memory of KV head `h // (num_heads // num_kv_heads)`, as in grouped-query attention.
"""

from itertools import accumulate

import torch
from torch.nn import functional as F

# Below this a denominator stands for "nothing was written here": the quotient then goes to 0 instead of NaN or inf.
SMALLEST_NORM = 1e-20
# exp(8) = 2981: sums over a hundred million keys stay far from the end of float32.
LARGEST_EXPONENT = 8.0


def map_keys(keys, feature_map="elu"):
    """σ(K) in float32: `"elu"` is ELU(x) + 1, `"exp"` is exp(min(x, 8)), `"softmax"` is exp(x) scaled to a sum of e⁸
    at most: softmax(x) min(e⁸, Σ exp x).

    The bound of `"softmax"` is that of a token as a whole: tokens that are loud are equally loud, and one channel of
    theirs gains what another loses, where `"exp"` would have them all at its bound.

    Args:
        keys (`torch.Tensor`): `(..., head_dim)`, any floating dtype.
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.

    Returns:
        `torch.Tensor`: the same shape, float32, non-negative.
    """
    keys = keys.float()
    if feature_map == "elu":
        return EluPlusOne.apply(keys)
    if feature_map == "exp":
        return keys.clamp(max=LARGEST_EXPONENT).exp_()
    if feature_map == "softmax":
        return (keys - (keys.logsumexp(-1, keepdim=True) - LARGEST_EXPONENT).clamp_min(0.0)).exp_()
    raise ValueError(f"feature_map={feature_map!r}: must be one of 'elu', 'exp', 'softmax'")


def map_queries(queries, feature_map="elu"):
    """σ(Q) in float32; for all but `"elu"` exp(x - max x), whose scale cancels between numerator and denominator."""
    if feature_map in ("exp", "softmax"):
        queries = queries.float()
        return (queries - queries.detach().amax(-1, keepdim=True)).exp_()
    return map_keys(queries, feature_map)


class EluPlusOne(torch.autograd.Function):
    """x + 1 above zero, exp(x) below: (exp(x) - 1) + 1 would cancel to nothing for keys far below zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states):
        # In place, for on CPUs fresh memory costs more than the arithmetic.
        return F.threshold(states, 0.0, 0.0).add_(states.clamp(max=0.0).exp_())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (mapped,) = ctx.saved_tensors
        return slope(mapped, "elu") * gradient


def slope(mapped, feature_map):
    """The derivative of the map of queries, from what it returned."""
    return mapped.clamp(max=1.0) if feature_map == "elu" else mapped


def divide(numerator, denominator):
    """`numerator / denominator` with the denominator, one dimension less, kept away from zero; both float32."""
    return numerator / denominator.clamp_min(SMALLEST_NORM).unsqueeze(-1)


def normalized(mapped, memory_norm):
    """`σ / (σ z)` for `σ` of `(..., seq_len, head_dim)`: what the delta rule is affine in M with; float32."""
    denominator = (mapped @ memory_norm.unsqueeze(-1)).squeeze(-1)
    # Where nothing was written M is zero too, and any factor will do: the clamped quotient overflows in products.
    return divide(mapped, denominator).masked_fill(denominator.unsqueeze(-1) == 0.0, 0.0)


def no_autocast(tensor):
    """A context in which matrix products of float32 tensors stay in float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def empty(keys):
    """A memory with nothing in it, `M = 0` and `z = 0` for keys `(batch, num_kv_heads, ..., head_dim)`."""
    batch, heads, dim = keys.shape[0], keys.shape[1], keys.shape[-1]
    options = {"dtype": torch.float32, "device": keys.device}
    return torch.zeros(batch, heads, dim, dim, **options), torch.zeros(batch, heads, dim, **options)


def look_up(mapped, memory, memory_norm):
    """`σ M / (σ z)` for `σ` of `(..., seq_len, head_dim)`, float32; zeros where nothing was ever written."""
    numerator = mapped @ memory
    denominator = (mapped @ memory_norm.unsqueeze(-1)).clamp_min(SMALLEST_NORM)
    # Autograd keeps the numerator; nobody else does.
    return numerator / denominator if numerator.requires_grad else numerator.div_(denominator)


def retrieve(queries, memory, memory_norm, feature_map="elu"):
    """Read the memory: `A_mem = σ(Q) M / (σ(Q) z)` (Eq. 3).

    Args:
        queries (`torch.Tensor`): `(batch, num_heads, seq_len, head_dim)`, before RoPE.
        memory (`torch.Tensor`): `(batch, num_kv_heads, head_dim, head_dim)`, float32.
        memory_norm (`torch.Tensor`): `(batch, num_kv_heads, head_dim)`, float32.
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.

    Returns:
        `torch.Tensor`: `(batch, num_heads, seq_len, head_dim)`, float32; zeros where nothing was ever written.
    """
    batch, heads, length, dim = queries.shape
    with no_autocast(queries):
        # The heads of a group lie side by side, so that one product per KV head serves them all.
        mapped = map_queries(queries, feature_map).reshape(batch, memory.shape[1], -1, dim)
        return look_up(mapped, memory, memory_norm).reshape(batch, heads, length, dim)


def check_rule(rule):
    """Raise for an update rule that does not exist."""
    if rule not in ("linear", "delta"):
        raise ValueError(f"memory_update={rule!r}: must be one of 'linear', 'delta'")


def contribution(keys, values, memory=None, memory_norm=None, rule="linear", feature_map="elu"):
    """What one segment adds to the memory, as a pair shaped like `(memory, memory_norm)`.

    `"linear"` (Eq. 4): `σ(K)ᵀ V` and `Σ σ(K_t)`; it needs no state.
    `"delta"` (Eq. 5): `σ(K)ᵀ (V - σ(K) M / (σ(K) z))` and `Σ σ(K_t)`.
    """
    check_rule(rule)
    with no_autocast(keys):
        mapped = map_keys(keys, feature_map)
        values = values.float()
        if rule == "delta":
            values = values - look_up(mapped, memory, memory_norm)
        return mapped.transpose(-1, -2) @ values, mapped.sum(-2)


def update(keys, values, memory, memory_norm, rule="linear", feature_map="elu", scale=None):
    """Write a segment into the memory (Eq. 4 and 5). The state passed in is not changed.

    Args:
        keys (`torch.Tensor`): `(batch, num_kv_heads, seq_len, head_dim)`, before RoPE.
        values (`torch.Tensor`): the same shape.
        memory (`torch.Tensor`): `(batch, num_kv_heads, head_dim, head_dim)`, float32.
        memory_norm (`torch.Tensor`): `(batch, num_kv_heads, head_dim)`, float32.
        rule (`str`, *optional*, defaults to `"linear"`): `"linear"` or `"delta"`.
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.
        scale (`torch.Tensor`, *optional*):
            `(batch,)`, how many times each row's segment is written; 0 leaves a row's memory as it is. For the linear
            rule any other number is exactly that many repeated writes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the new memory and its norm, float32.
    """
    with no_autocast(keys):
        added, added_norm = contribution(keys, values, memory, memory_norm, rule, feature_map)
        if scale is not None:
            scale = scale.to(device=memory.device, dtype=torch.float32)
            added, added_norm = added * scale.view(-1, 1, 1, 1), added_norm * scale.view(-1, 1, 1)
        return memory + added, memory_norm + added_norm


def scan(keys, values, memory, memory_norm, rule="linear", feature_map="elu", scale=None):
    """The state before each of several segments, and after the last: an exclusive scan of [`update`].

    The delta rule is affine in M, and what it divides by is a sum that needs no M. So all that is as long as a segment
    is done for all segments at once, and what is left of the loop is one product of `head_dim x head_dim` matrices:

        M += A - B M        A = σ(K)ᵀ V        B = Σ_t σ(K_t)ᵀ σ(K_t) / (σ(K_t) z)

    Args:
        keys (`torch.Tensor`): `(batch, num_segments, num_kv_heads, seq_len, head_dim)`, before RoPE.
        values (`torch.Tensor`): the same shape.
        memory (`torch.Tensor`): `(batch, num_kv_heads, head_dim, head_dim)`, float32, the state before the first.
        memory_norm (`torch.Tensor`): `(batch, num_kv_heads, head_dim)`, float32.
        rule (`str`, *optional*, defaults to `"linear"`): `"linear"` (one cumulative sum) or `"delta"` (a short loop).
        feature_map (`str`, *optional*, defaults to `"elu"`): `"elu"`, `"exp"` or `"softmax"`.
        scale (`torch.Tensor`, *optional*): `(batch, num_segments)`, how many times each segment is written.

    Returns:
        `tuple`: memories `(batch, num_segments + 1, num_kv_heads, head_dim, head_dim)` and norms
        `(batch, num_segments + 1, num_kv_heads, head_dim)`, float32; entry `s` is what segment `s` reads.
    """
    check_rule(rule)
    with no_autocast(keys):
        mapped = map_keys(keys, feature_map)
        added, added_norm = mapped.transpose(-1, -2) @ values.float(), mapped.sum(-2)
        if scale is not None:
            scale = scale.to(device=memory.device, dtype=torch.float32)[..., None, None]
            added, added_norm = added * scale.unsqueeze(-1), added_norm * scale
        # A loop of sums: cumsum along a dimension that is not the last costs a CPU a hundred times as much.
        norms = torch.stack(list(accumulate([memory_norm, *added_norm.unbind(1)])), dim=1)
        if rule == "linear":
            return torch.stack(list(accumulate([memory, *added.unbind(1)])), dim=1), norms
        known = mapped.transpose(-1, -2) @ normalized(mapped, norms[:, :-1])
        if scale is not None:
            known = known * scale.unsqueeze(-1)
        memories = [memory]
        for segment in range(keys.shape[1]):
            memories.append(memories[-1] + added[:, segment] - known[:, segment] @ memories[-1])
        return torch.stack(memories, dim=1), norms
