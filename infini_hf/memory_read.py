"""Retrieval and gate in one step, whose gradient is written out.

Autograd would keep and pass over several tensors as large as the queries for every small operation of
`A_loc + g (σ(Q) M / (σ(Q) z) - A_loc)`. With R the retrieved values, D = σ(Q) z and G the gradient of the output:

    dA_loc = (1 - g) G      dg = Σ G (R - A_loc)      N = g G / D      e = -Σ_d N R
    dM = σ(Q)ᵀ N            dz = σ(Q)ᵀ e              dQ = σ'(Q) (N Mᵀ + e zᵀ)
"""

from dataclasses import dataclass

import torch

from . import memory as memory_math


@dataclass(frozen=True)
class Retrieval:
    """What [`infini_hf.memory.retrieve`] is to be called with, for a gate that does it together with its own work."""

    queries: torch.Tensor
    memory: torch.Tensor
    memory_norm: torch.Tensor
    feature_map: str = "elu"

    def mixed_into(self, local, gate):
        """`local + gate (retrieved - local)`, float32; gate `(1 or batch, num_heads, 1, 1)`, float32."""
        return MixRetrieved.apply(local, self.queries, self.memory, self.memory_norm, gate, self.feature_map)


class MixRetrieved(torch.autograd.Function):
    """[`infini_hf.memory.retrieve`] and the gate; shapes as there, the same numbers to rounding."""

    @staticmethod
    def forward(ctx, local, queries, memory, memory_norm, gate, feature_map):
        heads = (queries.shape[0], memory.shape[1], -1, queries.shape[-1])
        with memory_math.no_autocast(queries):
            mapped = memory_math.map_queries(queries, feature_map).reshape(heads)
            denominator = (mapped @ memory_norm.unsqueeze(-1)).clamp_min_(memory_math.SMALLEST_NORM)
            retrieved = (mapped @ memory).div_(denominator)
            mixed = torch.lerp(local.float(), retrieved.view(queries.shape), gate)
        ctx.save_for_backward(local, mapped, denominator, retrieved, memory, memory_norm, gate)
        ctx.dtype, ctx.feature_map = queries.dtype, feature_map
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a second derivative (create_graph=True) through a patched layer: what reads the memory has its first "
                'written out; go forward and backward inside infini_hf.fast_paths.fast_paths("never")'
            )
        local, mapped, denominator, retrieved, memory, memory_norm, gate = ctx.saved_tensors
        to_local, to_queries, to_memory, to_norm, to_gate, _ = ctx.needs_input_grad
        grads = [None] * 6
        with memory_math.no_autocast(gradient):
            # As the heads of a group lie in the products below; a gradient that comes transposed is copied once.
            gradient = gradient.contiguous()
            through = gradient * gate
            if to_gate:
                change = (retrieved.view(local.shape) - local).mul_(gradient).sum((-2, -1), keepdim=True)
                grads[4] = change.sum_to_size(gate.shape)
            if to_local:
                grads[0] = (gradient - through).to(local.dtype)
            through = through.view(mapped.shape).div_(denominator)
            shared = torch.linalg.vecdot(through, retrieved).neg_().unsqueeze(-1)
            # A denominator that was kept away from zero is a constant.
            shared.masked_fill_(denominator <= memory_math.SMALLEST_NORM, 0.0)
            if to_memory:
                grads[2] = mapped.transpose(-1, -2) @ through
            if to_norm:
                grads[3] = (mapped.transpose(-1, -2) @ shared).squeeze(-1)
            if to_queries:
                asked = through @ memory.transpose(-1, -2)
                asked.addcmul_(shared, memory_norm.unsqueeze(-2))
                asked.mul_(memory_math.slope(mapped, ctx.feature_map))
                grads[1] = asked.view(local.shape).to(ctx.dtype)
        return tuple(grads)
