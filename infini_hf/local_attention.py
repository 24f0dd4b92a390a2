"""Softmax attention of new tokens over their window, on the model's backend, and without a mask where that is faster.

A window is what is held of earlier tokens and the new ones, whose queries see all of the former and, causally, each
other. SDPA's own causal mode aligns the mask with the first key, not the last, so for such a window its stock caller
builds a mask, which costs CPUs the causal half of the work and CUDA its flash kernel. Here the kernels get no mask.
"""

from functools import reduce

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from .fast_paths import Choice

# Queries from which two kernels and a merge take a CPU less time than one kernel with a mask, at any window measured.
SPLIT_QUERIES = 512
# Options of the stock SDPA caller that it alone can answer.
FOREIGN_OPTIONS = ("softcap", "position_bias", "is_causal", "cache", "output_attentions")


def build_mask(config, batch, query_length, key_length, padding=None, dtype=None, device=None, **options):
    """A mask in the format of the model's attention backend, the queries being the last of the keys.

    Args:
        config (`PreTrainedConfig`): the model's config, which names the backend.
        batch (`int`): rows.
        query_length (`int`): queries.
        key_length (`int`): keys.
        padding (`torch.Tensor`, *optional*): `(batch, key_length)` bool, false at padding.
        dtype (`torch.dtype`, *optional*): dtype of an additive mask.
        device (`torch.device`, *optional*): where the mask goes.
        options: `mask_function` and `local_size` for a window narrower than the keys.

    Returns:
        What the backend takes: a tensor, a block mask, or `None` where its own causal mode is right.
    """
    options.setdefault("mask_function", causal_mask_function)
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=query_length,
        kv_length=key_length,
        q_offset=key_length - query_length,
        kv_offset=0,
        attention_mask=padding,
        dtype=dtype,
        device=device,
        config=config,
        **options,
    )


class Rotation(torch.autograd.Function):
    """`x cos + rotate_half(x) sin` with two temporaries of half the size, and the opposite rotation as gradient."""

    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        return turn(states, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        # As a rotation again, which has a gradient of its own where a second derivative is wanted.
        return Rotation.apply(gradient, cos, -sin.roll(sin.shape[-1] // 2, -1)).to(ctx.dtype), None, None


def turn(states, cos, sin):
    """The stock formula to the bit, of halves in place: on CPUs fresh memory costs more than the arithmetic."""
    turned = states * cos
    (left, right), (sin_left, sin_right) = states.chunk(2, -1), sin.chunk(2, -1)
    turned_left, turned_right = turned.chunk(2, -1)
    turned_left.sub_(right * sin_left)
    turned_right.add_(left * sin_right)
    return turned


def rotate(states, cos, sin):
    """RoPE on `(batch, num_heads, seq_len, head_dim)` with cosines and sines `(1 or batch, seq_len, head_dim)`."""
    return Rotation.apply(states, cos.to(states.device).unsqueeze(1), sin.to(states.device).unsqueeze(1))


def needs_no_mask(interface, layout, device, dropout, options):
    """Whether [`attend_window`] stands in for the stock caller `interface` of a backend.

    Dropout, soft caps and padding are the stock caller's; so is a single query, which it gives no mask either.
    """
    return (
        Choice.mode != "never"
        and interface is sdpa_attention_forward
        and device.type in ("cpu", "cuda")
        and layout.padding is None
        and layout.length > layout.count > 1
        and not dropout
        and all(options.get(name) in (None, False) for name in FOREIGN_OPTIONS)
    )


def attend_window(queries, keys, values, scaling, plan, layout):
    """Causal attention of queries on held keys and their own.

    Args:
        queries (`torch.Tensor`): `(batch, num_heads, count, head_dim)`, after RoPE.
        keys (`list[torch.Tensor]`): parts `(batch, num_kv_heads, …, head_dim)` of the window, after RoPE: what is held
            and the new ones, or both in one.
        values (`list[torch.Tensor]`): the same shapes.
        scaling (`float`): what scores are multiplied by.
        plan ([`SegmentPlan`]): that of the call, which keeps a mask for the other layers.
        layout ([`Layout`]): how the window lies.

    Returns:
        `torch.Tensor`: `(batch, num_heads, count, head_dim)`
    """
    held, device = layout.length - layout.count, queries.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        queries, keys, values = queries.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
    if device.type == "cpu" and (layout.count >= SPLIT_QUERIES or Choice.mode == "always"):
        keys, values = (cut(parts, held) for parts in (keys, values))
        # What is held may have been read under autocast, in a narrower dtype than what is new.
        dtype = reduce(torch.promote_types, (part.dtype for part in (queries, *keys, *values)))
        queries, keys, values = queries.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
        return SplitAttention.apply(queries, *keys, *values, scaling)
    keys, values = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in (keys, values))
    if device.type == "cpu":
        mask = plan.share(("additive", layout, queries.dtype), lambda: additive_mask(layout, queries.dtype))
    else:
        mask = plan.share(("lower right", layout), lambda: causal_lower_right(layout.count, layout.length))
        if queries.dtype not in (torch.float16, torch.bfloat16) or queries.shape[-1] > 256:
            # Of the kernels without a mask flash attention alone shares keys among heads, and it takes nothing else.
            group = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling, enable_gqa=grouped)


def cut(parts, held):
    """A window as the two parts that are held and new."""
    return parts if len(parts) > 1 else parts[0].tensor_split((held,), dim=2)


def additive_mask(layout, dtype):
    """`(1, 1, count, length)`, 0 where a query sees a key: a boolean mask would be made into it at every call."""
    seen = torch.ones(layout.count, layout.length, dtype=torch.bool).tril(layout.length - layout.count)
    return torch.zeros(1, 1, layout.count, layout.length, dtype=dtype).masked_fill_(~seen, float("-inf"))


class SplitAttention(torch.autograd.Function):
    """Attention on held keys without a mask, and causally on the new ones, merged by their normalisers; CPU alone.

    `A = A_new + sigmoid(l_held - l_new) (A_held - A_new)`, with `l` the logarithm of a part's sum of exponentials. The
    kernels' backward pass takes the whole output and the whole normaliser, and gives each part's gradients.
    """

    @staticmethod
    def forward(ctx, queries, held_keys, keys, held_values, values, scaling):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        old, old_sum = kernel(queries, held_keys, held_values, 0.0, False, scale=scaling)
        new, new_sum = kernel(queries, keys, values, 0.0, True, scale=scaling)
        share = torch.sigmoid(old_sum - new_sum).unsqueeze(-1)
        output = torch.lerp(new.float(), old.float(), share).to(new.dtype)
        saved = (queries, held_keys, keys, held_values, values, output, torch.logaddexp(old_sum, new_sum))
        ctx.save_for_backward(*saved)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        queries, held_keys, keys, held_values, values, *whole = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        old = kernel(gradient, queries, held_keys, held_values, *whole, 0.0, False, scale=ctx.scaling)
        new = kernel(gradient, queries, keys, values, *whole, 0.0, True, scale=ctx.scaling)
        return old[0] + new[0], old[1], new[1], old[2], new[2], None
