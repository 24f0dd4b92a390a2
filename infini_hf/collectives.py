"""What the ranks that share a row tell each other, with gradients, and how much of it.

A backward pass tells it in the opposite direction, exchange for exchange. Every rank has to take part in each, also
where it needs nothing itself: autograd runs nodes in the reverse of the order in which they were made, so exchanges
meet as long as each one's result reaches the loss on every rank ([`tie`]).
"""

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh


class RowGroup:
    """The ranks that share a row, in its order.

    Args:
        group (`DeviceMesh` or `ProcessGroup`): one dimension of a mesh, or a group of processes.

    Attributes:
        rank (`int`): this process, from 0.
        size (`int`): processes.
        received (`int`): bytes that this process was sent, those of the backward pass too.

    Raises:
        TypeError: for a group of another kind.
        ValueError: for a mesh of several dimensions, or a group that this process does not belong to.
    """

    def __init__(self, group):
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group is a mesh of {group.ndim} dimensions {group.mesh_dim_names}: pass the one that a row is "
                    'split over, as mesh["sequence"]'
                )
            group = group.get_group()
        if not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"group is a {type(group).__name__}: pass one dimension of a DeviceMesh, or a ProcessGroup "
                "(torch.distributed.init_device_mesh, torch.distributed.new_group)"
            )
        self.group, self.received = group, 0
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process does not belong to it, and has no part of the row")

    def __deepcopy__(self, memo):
        # A connection cannot be copied, and a copied cache shares the row.
        return self

    def shift(self, tensor, by):
        """What the rank `by` places before holds, in the shape of `tensor`; zeros where there is none."""
        tensor = tensor.contiguous()
        received, calls = torch.zeros_like(tensor), []
        if 0 <= self.rank + by < self.size:
            peer = self.rank + by
            calls.append(distributed.P2POp(distributed.isend, tensor, group=self.group, group_peer=peer))
        if 0 <= self.rank - by < self.size:
            peer = self.rank - by
            calls.append(distributed.P2POp(distributed.irecv, received, group=self.group, group_peer=peer))
            self.received += received.nbytes
        if calls:
            for request in distributed.batch_isend_irecv(calls):
                request.wait()
        return received

    def broadcast(self, tensor, source):
        """What the rank `source` holds, in the shape of `tensor`."""
        tensor = tensor.contiguous().clone()
        distributed.broadcast(tensor, group=self.group, group_src=source)
        self.received += 0 if self.rank == source else tensor.nbytes
        return tensor

    def sum_to(self, tensor, target):
        """The sum of what all ranks hold on the rank `target`, zeros on the others."""
        tensor = tensor.contiguous().clone()
        distributed.reduce(tensor, group=self.group, group_dst=target)
        self.received += tensor.nbytes if self.rank == target else 0
        return tensor if self.rank == target else torch.zeros_like(tensor)

    def gather(self, numbers, device):
        """The whole numbers of every rank, a list of lists; it waits for the device."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        table = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(table, mine, group=self.group)
        self.received += (self.size - 1) * mine.nbytes
        return torch.stack(table).tolist()


def row_group(group):
    """A [`RowGroup`] of a group that may be one already."""
    return group if isinstance(group, RowGroup) else RowGroup(group)


class Shift(torch.autograd.Function):
    """[`RowGroup.shift`] with a gradient: it goes back to the rank that the tensor came from."""

    @staticmethod
    def forward(ctx, tensor, group, by):
        ctx.group, ctx.by = group, by
        return group.shift(tensor, by)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.group.shift(gradient, -ctx.by), None, None


class Broadcast(torch.autograd.Function):
    """[`RowGroup.broadcast`] with a gradient: the sum over all ranks, on the one that told them."""

    @staticmethod
    def forward(ctx, tensor, group, source):
        ctx.group, ctx.source = group, source
        return group.broadcast(tensor, source)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.group.sum_to(gradient, ctx.source), None, None


def scan_before(group, tensor, join):
    """`join` over the tensors of all ranks before this one, in their order; zeros on the first.

    One exchange for each doubling of the ranks: `1 + ceil(log2(ranks - 1))` tensors received, whatever the row holds.
    Gathering all of them would be `ranks - 1`.

    Args:
        group ([`RowGroup`]): the ranks.
        tensor (`torch.Tensor`): what this rank adds.
        join (`Callable`): `join(earlier, later)`, associative, for which zeros change nothing.
    """
    before, step = Shift.apply(tensor, group, 1), 1
    while step < group.size - 1:
        before = join(Shift.apply(before, group, step), before)
        step *= 2
    return before


def tie(tensor, *others):
    """`tensor`, with all of `others` in its graph: a backward pass through it reaches them, with zeros."""
    return tensor + sum(other[:0].sum() for other in others).to(tensor.dtype)
