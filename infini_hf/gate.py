"""The memory gate: how much of a head's output comes from the compressive memory, and what it is asked with."""

import torch
from torch import nn

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

    def set_shifts(self, query_shift, key_shift):
        """Shift queries `(num_heads, head_dim)` and keys `(num_kv_heads, head_dim)` before their feature map."""
        device = self.bias.device
        self.query_shift = query_shift.detach().to(device, torch.float32).clone()
        self.key_shift = key_shift.detach().to(device, torch.float32).clone()

    def center_queries(self, queries):
        """Queries `(batch, num_heads, seq_len, head_dim)` as the memory is asked with them."""
        return queries if self.query_shift is None else centered(queries, self.query_shift)

    def center_keys(self, keys):
        """Keys `(batch, num_kv_heads, seq_len, head_dim)` as they are written."""
        return keys if self.key_shift is None else centered(keys, self.key_shift)

    def forward(self, local, retrieved=None, reads=None):
        """Mix the two attentions.

        Args:
            local (`torch.Tensor`): `(batch, num_heads, seq_len, head_dim)`, any floating dtype.
            retrieved (`torch.Tensor`, *optional*): the same shape, float32; without it `local` comes back, tied to the
                gate by a zero gradient, so that a data-parallel step on short rows still reaches every parameter.
            reads (`torch.Tensor`, *optional*): `(batch,)`, 0 for a row whose memory is still empty.

        Returns:
            `torch.Tensor`: the shape and dtype of `local`; exactly `local` where a row's memory is empty.
        """
        gate = ACTIVATIONS[self.kind](self.bias.to(local.device).float()).view(1, -1, 1, 1)
        if retrieved is None:
            return local + (0.0 * gate).to(local.dtype)
        if reads is not None:
            gate = gate * reads.view(-1, 1, 1, 1)
        mixed = torch.lerp(local.float(), retrieved, gate)
        return mixed.to(local.dtype)

    def extra_repr(self):
        return f"num_heads={self.bias.numel()}, kind={self.kind!r}"


def centered(states, shift):
    """`(batch, heads, seq_len, head_dim)` less `(heads, head_dim)`, float32."""
    return states.float() - shift.to(states.device, torch.float32)[:, None]


def trainable_gates(model):
    """Parameters of the gates that are trained, in the order of the layers."""
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    return [parameter for gate in gates for parameter in gate.parameters() if parameter.requires_grad]
