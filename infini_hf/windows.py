"""Columns of keys and values: gathered, carried on, and laid before each of several segments. Pure tensor work."""

import torch


def take_columns(states, index):
    """`(batch, num_heads, seq_len, head_dim)` gathered along the sequence by `(batch, n)`."""
    index = index.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, index)


def as_new(states, new):
    """What is held, in the dtype of what is new where that is narrower: a model may be cast between two calls."""
    wider = torch.promote_types(states.dtype, new.dtype)
    if wider == new.dtype or torch.is_autocast_enabled(new.device.type):
        return states
    return states.to(new.dtype)


def carry(states, kept, first):
    """The first `first` and the last `kept - first` tokens of a window."""
    if kept == states.shape[2]:
        return states
    last = kept - first
    if first == 0:
        # A copy, so that a short window does not keep the whole segment's storage alive.
        return states[:, :, states.shape[2] - last :].clone()
    return torch.cat([states[:, :, :first], states[:, :, states.shape[2] - last :]], dim=2)


def as_rows(states, count):
    """Segments as rows of a batch: `(batch, heads, count * length, dim)` to `(batch * count, heads, length, dim)`."""
    return states.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def held_before(held, states, count, sinks):
    """What each of `count` whole segments that follow one another holds of earlier ones.

    Args:
        held (`torch.Tensor`): `(batch, num_kv_heads, window, head_dim)`, what the first of them holds.
        states (`torch.Tensor`): `(batch, num_kv_heads, count * length, head_dim)`, the segments.
        count (`int`): segments; several all hold as much as the first.
        sinks (`int`): tokens of the window that stay, at its beginning; the rest are the last of the segment before.

    Returns:
        `torch.Tensor`: `(batch * count, num_kv_heads, window, head_dim)`
    """
    window = held.shape[2]
    if count == 1 or window == 0:
        return held if count == 1 else held.repeat_interleave(count, 0)
    overlap = window - sinks
    segments = states.unflatten(2, (count, -1))
    ends = segments[:, :, :-1, segments.shape[3] - overlap :]
    before = torch.cat([held[:, :, None, sinks:], ends], dim=2)
    if sinks:
        before = torch.cat([held[:, :, None, :sinks].expand(-1, -1, count, -1, -1), before], dim=3)
    return before.transpose(1, 2).flatten(0, 1)


def held_after(held, states, kept, sinks):
    """What is held after whole segments: the row's first `sinks` tokens and the last `kept - sinks`.

    Args:
        held (`torch.Tensor`): `(batch, num_kv_heads, window, head_dim)`, what was held before them.
        states (`torch.Tensor`): `(batch, num_kv_heads, seq_len, head_dim)`, the segments.
        kept (`int`): tokens to hold.
        sinks (`int`): those of them from the beginning of the row.
    """
    last = states[:, :, states.shape[2] - (kept - sinks) :]
    if sinks == 0:
        return last.clone()
    return torch.cat([(held if held.shape[2] else states)[:, :, :sinks], last], dim=2)
