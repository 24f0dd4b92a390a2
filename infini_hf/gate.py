"""The memory gate: how much of a head's output comes from the compressive memory, and what it is asked with."""

import torch
from torch import nn

from .memory import no_autocast
from .memory_read import Retrieval

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


class MemoryGate(nn.Module):
    """`A = A_loc + g (A_mem - A_loc)` with `g = gate(b)`, one logit `b` for each query head (Eq. 6, rewritten).

    The parameter is named `bias`, so that the rules of trainers leave it out of the weight decay; it starts at zero
    and is float32.

    Args:
        num_heads (`int`): query heads.
        kind (`str`): `"tanh"` or `"sigmoid"`.
        device (`torch.device`, *optional*): where the parameter goes.
    """

    def __init__(self, num_heads, kind, device=None):
        super().__init__()
        self.kind = kind
        self.bias = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32, device=device))
        # Set by [`infini_hf.calibration.calibrate_memory`]; absent from the state dict before.
        self.register_buffer("query_shift", None)
        self.register_buffer("key_shift", None)
        # Set by [`infini_hf.calibration.add_memory_projections`]; then the shifts are part of them.
        self.query_projection = self.key_projection = None
        # Set inside [`infini_hf.evaluation.controls.closed_memory`]: nothing of the memory comes through.
        self.closed = False

    @property
    def itself(self):
        """This module: of a wrapper of PEFT, which hands on what it has not, the one of the active adapter."""
        return self

    def set_shifts(self, query_shift, key_shift):
        """Shift queries `(num_heads, head_dim)` and keys `(num_kv_heads, head_dim)` before their feature map."""
        device = self.bias.device
        self.query_shift = query_shift.detach().to(device, torch.float32).clone()
        self.key_shift = key_shift.detach().to(device, torch.float32).clone()

    def set_projections(self, query_weight, key_weight):
        """Learn an affine map of queries and keys before their feature map; weights as in [`HeadProjection`]."""
        device = self.bias.device
        self.query_projection = HeadProjection(query_weight.detach().to(device, torch.float32).clone())
        self.key_projection = HeadProjection(key_weight.detach().to(device, torch.float32).clone())
        self.query_shift = self.key_shift = None

    def add_projections(self, num_kv_heads, head_dim, mix_heads=False):
        """Projections that change nothing yet: they subtract the shifts, where there are some."""
        shifts = self.query_shift, self.key_shift
        if self.query_shift is None:
            shifts = torch.zeros(self.bias.numel(), head_dim), torch.zeros(num_kv_heads, head_dim)
        weights = (centering(shift) for shift in shifts)
        self.set_projections(*(of_all_heads(weight) if mix_heads else weight for weight in weights))

    def center_queries(self, queries):
        """Queries `(batch, num_heads, seq_len, head_dim)` as the memory is asked with them."""
        if self.query_projection is not None:
            return self.query_projection(queries)
        return queries if self.query_shift is None else centered(queries, self.query_shift)

    def center_keys(self, keys):
        """Keys `(batch, num_kv_heads, seq_len, head_dim)` as they are written."""
        if self.key_projection is not None:
            return self.key_projection(keys)
        return keys if self.key_shift is None else centered(keys, self.key_shift)

    def forward(self, local, retrieved=None, reads=None):
        """Mix the two attentions.

        Args:
            local (`torch.Tensor`): `(batch, num_heads, seq_len, head_dim)`, any floating dtype.
            retrieved (`torch.Tensor` or [`Retrieval`], *optional*): the same shape, float32, or how to retrieve it;
                without it `local` comes back, tied to the gate by a zero gradient, so that a data-parallel step on
                short rows still reaches every parameter.
            reads (`torch.Tensor`, *optional*): `(batch,)`, 0 for a row whose memory is still empty.

        Returns:
            `torch.Tensor`: the shape and dtype of `local`; exactly `local` where a row's memory is empty.
        """
        gate = ACTIVATIONS[self.kind](self.bias.to(local.device).float()).view(1, -1, 1, 1)
        if self.training and self.query_projection is not None:
            # Data parallelism waits for a gradient of every parameter, also where nothing is read or written.
            unused = self.query_projection.weight.sum() + self.key_projection.weight.sum()
            gate = gate + 0.0 * unused.to(gate.device)
        if retrieved is None or self.closed:
            return local + (0.0 * gate).to(local.dtype)
        if reads is not None:
            gate = gate * reads.view(-1, 1, 1, 1)
        if isinstance(retrieved, Retrieval):
            return retrieved.mixed_into(local, gate).to(local.dtype)
        return torch.lerp(local.float(), retrieved, gate).to(local.dtype)

    def extra_repr(self):
        return f"num_heads={self.bias.numel()}, kind={self.kind!r}"


class HeadProjection(nn.Module):
    """An affine map for each head of `(batch, heads, seq_len, head_dim)`, computed in float32.

    Args:
        weight (`torch.Tensor`): `(heads, head_dim + 1, head_dim)` float32, the last row the bias; or
            `(heads, heads * head_dim + 1, head_dim)`, where what a head gets is a map of the states of all heads.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def mixes_heads(self):
        """`bool`: whether a head gets a map of the states of all heads."""
        return self.weight.shape[1] - 1 != self.weight.shape[2]

    def forward(self, states):
        weight = self.weight.to(states.device).float()
        with no_autocast(states):
            return affine(states.float(), weight)


def affine(states, weight):
    """`(..., heads, n, head_dim)` through the weight of a [`HeadProjection`], whose last size the result has."""
    heads, inputs, dim = weight.shape
    if inputs - 1 == states.shape[-1]:
        return states @ weight[:, :-1] + weight[:, -1:]
    # One product for all heads, whose states lie side by side.
    together = states.transpose(-3, -2).flatten(-2)
    mapped = together @ weight[:, :-1].transpose(0, 1).flatten(1) + weight[:, -1].flatten()
    return mapped.unflatten(-1, (heads, dim)).transpose(-3, -2)


def of_all_heads(weight):
    """`(heads, head_dim + 1, head_dim)` as a map of the states of all heads, in which each head reads its own."""
    heads, _, dim = weight.shape
    own = torch.einsum("hic,hg->hgic", weight[:, :-1], torch.eye(heads, dtype=weight.dtype, device=weight.device))
    return torch.cat([own.reshape(heads, heads * dim, dim), weight[:, -1:]], dim=1)


def centering(shift):
    """The weight of the [`HeadProjection`] that subtracts `(heads, head_dim)`."""
    heads, dim = shift.shape
    return torch.cat([torch.eye(dim).expand(heads, dim, dim), -shift.cpu().float()[:, None]], dim=1)


def centered(states, shift):
    """`(batch, heads, seq_len, head_dim)` less `(heads, head_dim)`, float32."""
    return states.float() - shift.to(states.device, torch.float32)[:, None]
