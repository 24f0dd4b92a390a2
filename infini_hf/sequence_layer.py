"""`SequenceParallelLayer`: what a layer needs of the ranks before it, when a row is split over several.

That is the state which they leave: M and z, whose size does not depend on how much was read, the sinks and the
overlap. It is found from keys and values alone, before any segment is scanned: the sum of what each rank adds (linear
rule), or the composition of the maps that they apply to M (delta rule). The scan then begins from it.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import memory_maps
from .collectives import Broadcast, Shift, scan_before, tie
from .layer_state import InfiniLayer


@dataclass(frozen=True)
class RowSplit:
    """Who reads what in one call.

    Attributes:
        began (`int`): tokens that the cache held before the call, whole segments.
        lengths (`tuple[int, ...]`): tokens of each rank's run.
    """

    began: int
    lengths: tuple[int, ...]

    @property
    def ended(self):
        """`int`: tokens that the cache holds after the call."""
        return self.began + sum(self.lengths)

    @property
    def last(self):
        """`int`: the last rank that reads anything, whose state is that of the row."""
        return max((rank for rank, length in enumerate(self.lengths) if length), default=0)

    def start(self, rank):
        """`int`: tokens of the row before a rank's run."""
        return self.began + sum(self.lengths[:rank])


class SequenceParallelLayer(InfiniLayer):
    """State of one patched layer, the same on all ranks between calls.

    Args:
        infini_config ([`InfiniConfig`]): the options of the patch.
        group ([`RowGroup`]): the ranks.
    """

    def __init__(self, infini_config, group):
        super().__init__(infini_config)
        self.group = group
        # Of the call that is being read.
        self.split = None

    def reset(self):
        self.__init__(self.infini_config, self.group)

    def open(self, queries, keys, values, plan, gate):
        """The queries, tied to what was exchanged, and the state that the ranks before this one leave."""
        super().open(queries, keys, values, plan, gate)
        if self.group.size == 1:
            return queries, self.keys, self.values, self.memory, self.memory_norm
        window, exchanged = self.window_before(keys, values)
        memory, memory_norm = self.memory_before(gate.center_keys(keys), values, plan)
        if torch.is_grad_enabled():
            # The gate too, so that what needs a gradient does not depend on whether this rank reads the memory, and
            # the window of an earlier call, which came from another rank.
            queries = tie(gate(queries), memory, memory_norm, self.keys, self.values, *exchanged)
        return queries, *window, memory, memory_norm

    def memory_before(self, keys, values, plan):
        """`(memory, memory_norm)` that this rank's run begins with, from its keys as they are written."""
        config = self.infini_config
        whole = keys.shape[2] // config.segment_length * config.segment_length
        keys, values = keys[:, :, :whole], values[:, :, :whole]
        if config.memory_update == "linear":
            added = memory_maps.sum_of_run(
                keys, values, config.segment_length, config.feature_map, scale=plan.write_scale
            )
            before = scan_before(self.group, pack(*added), torch.add)
            memory, memory_norm = unpack(before)
            return self.memory + memory, self.memory_norm + memory_norm
        added_norm = memory_maps.norm_of_run(keys, config.feature_map)
        memory_norm = self.memory_norm + scan_before(self.group, added_norm, torch.add)
        run = memory_maps.map_of_run(keys, values, memory_norm, config.segment_length, config.feature_map)
        return memory_maps.apply(scan_before(self.group, run, memory_maps.compose), self.memory), memory_norm

    def window_before(self, keys, values):
        """Keys and values of the window that this rank's run begins with, and what was exchanged for it."""
        config, rank, split = self.infini_config, self.group.rank, self.split
        sinks, overlap, exchanged = config.sink_tokens, config.overlap, []
        first = take(self.keys, self.values, 0, sinks)
        if sinks and not split.began:
            first = Broadcast.apply(fit(take(keys, values, 0, sinks), sinks), self.group, 0)
            exchanged.append(first)
        columns = keys.shape[2]
        last = take(keys, values, max(0, columns - overlap), columns)
        if overlap:
            last = Shift.apply(fit(last, overlap), self.group, 1)
            exchanged.append(last)
        if rank == 0 or not split.lengths[rank]:
            return (self.keys, self.values), exchanged
        kept = config.window_length(split.start(rank))
        first = first[..., :kept, :]
        last = fit(last, kept - first.shape[-2])
        window = torch.cat([first, last], dim=-2)
        return (window[0].to(keys.dtype), window[1].to(values.dtype)), exchanged

    def close(self, state, plan):
        """Keep the state after the whole row, that of the last rank which read."""
        super().close(state, plan)
        if self.group.size == 1:
            return
        split = self.split
        self.seen = (split.ended,) * len(self.seen)
        self.columns += sum(split.lengths) - plan.columns
        packed = Broadcast.apply(pack(self.memory, self.memory_norm), self.group, split.last)
        self.memory, self.memory_norm = unpack(packed)
        kept = self.infini_config.window_length(split.ended)
        # All see the same number, and a window may be empty.
        both = fit(take(self.keys, self.values, 0, None), kept)
        keys, values = Broadcast.apply(both, self.group, split.last) if kept else both
        self.keys, self.values = keys.to(self.keys.dtype), values.to(self.values.dtype)


def pack(memory, memory_norm):
    """M and z as one tensor, `(batch, num_kv_heads, head_dim, head_dim + 1)`, for one exchange."""
    return torch.cat([memory, memory_norm.unsqueeze(-1)], dim=-1)


def unpack(packed):
    """The inverse of [`pack`]."""
    return packed[..., :-1], packed[..., -1]


def take(keys, values, start, stop):
    """Some columns of keys and values, `(2, batch, num_kv_heads, n, head_dim)`, for one exchange."""
    return torch.stack([keys[:, :, start:stop], values[:, :, start:stop]])


def fit(states, length):
    """The last `length` tokens of `(..., seq_len, head_dim)`, after zeros where there are fewer."""
    states = states[..., max(0, states.shape[-2] - length) :, :]
    return F.pad(states, (0, 0, length - states.shape[-2], 0))
