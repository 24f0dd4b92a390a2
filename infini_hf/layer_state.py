"""`InfiniLayer`: what one patched layer remembers, as a transformers cache layer."""

import torch
from transformers.cache_utils import CacheLayerMixin

from . import memory as memory_math

CROP_REFUSED = (
    "an InfiniCache cannot be cropped: a token that was written into the compressive memory cannot be taken out. "
    "Assisted decoding needs that; generate without an assistant, or go back to a copy (copy.copy) of the cache"
)


class InfiniLayer(CacheLayerMixin):
    """State of one patched layer.

    Attributes:
        keys (`torch.Tensor`):
            `(batch, num_kv_heads, window, head_dim)`, keys before RoPE of the local window: sinks, overlap, open
            segment. A row that holds less than the longest row of the batch is right-aligned.
        values (`torch.Tensor`): the same shape.
        memory (`torch.Tensor`): M, `(batch, num_kv_heads, head_dim, head_dim)`, float32.
        memory_norm (`torch.Tensor`): z, `(batch, num_kv_heads, head_dim)`, float32.
        seen (`tuple[int, ...]`): valid tokens read, for each row.
        columns (`int`): columns read, padding included.
    """

    supports_early_init = False
    TENSORS = ("keys", "values", "memory", "memory_norm")

    def __init__(self, infini_config):
        super().__init__()
        self.infini_config = infini_config
        self.memory = self.memory_norm = None
        self.seen = ()
        self.columns = 0

    def lazy_initialization(self, key_states, value_states):
        """An empty state for keys `(batch, num_kv_heads, seq_len, head_dim)`: their batch, heads, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.memory, self.memory_norm = memory_math.empty(key_states)
        self.seen = self.seen or (0,) * key_states.shape[0]
        self.is_initialized = True

    def open(self, queries, keys, values, plan, gate):
        """What a call begins with: the queries, and the tensors of the state.

        Args:
            queries (`torch.Tensor`): `(batch, num_heads, seq_len, head_dim)`, before RoPE.
            keys (`torch.Tensor`): `(batch, num_kv_heads, seq_len, head_dim)`, before RoPE.
            values (`torch.Tensor`): the same shape.
            plan ([`SegmentPlan`]): the plan of the call.
            gate ([`MemoryGate`]): that of the attention.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        return queries, self.keys, self.values, self.memory, self.memory_norm

    def close(self, state, plan):
        """Keep the tensors of `state`, a [`LayerState`], after the call of a plan."""
        self.keys, self.values = state.keys, state.values
        self.memory, self.memory_norm = state.memory, state.memory_norm
        self.seen, self.columns = plan.seen_after, self.columns + plan.columns

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError(
            "an InfiniLayer is written by the patched attention layer alone, and a stock layer called its update: "
            "the cache belongs to a patched model (infini_hf.patch_model), or names other layers than the patch"
        )

    def get_mask_sizes(self, query_length):
        kept = 0 if self.keys is None else self.keys.shape[-2]
        return kept + query_length, self.columns - kept

    def get_seq_length(self):
        return self.columns

    def get_max_length(self):
        return -1

    def map_tensors(self, function):
        """Bind `function(tensor)` in place of every tensor of the state."""
        if self.is_initialized:
            for name in self.TENSORS:
                setattr(self, name, function(getattr(self, name)))

    def offload(self):
        self.map_tensors(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self):
        if self.is_initialized and self.keys.device != self.device:
            self.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))

    def detach(self):
        """Cut the state from the graph that computed it."""
        self.map_tensors(torch.Tensor.detach)

    def reset(self):
        self.__init__(self.infini_config)

    def reset_rows(self, rows):
        """Forget the rows of a `(batch,)` bool tensor; the others stay as they are."""
        if not self.is_initialized:
            return
        self.seen = tuple(0 if forget else seen for seen, forget in zip(self.seen, rows.tolist(), strict=True))
        rows = rows.to(self.memory.device)
        self.memory = self.memory.masked_fill(rows.view(-1, 1, 1, 1), 0.0)
        self.memory_norm = self.memory_norm.masked_fill(rows.view(-1, 1, 1), 0.0)
        self._narrow_window()

    def _select_rows(self, index):
        if not self.is_initialized:
            return
        # Only a batch whose rows stand at different places has to look at the index itself.
        if len(set(self.seen)) == 1:
            seen = self.seen[:1] * len(index)
        else:
            seen = tuple(self.seen[row] for row in index.tolist())
        self.map_tensors(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        self.seen = seen
        self._narrow_window()

    def _narrow_window(self):
        """Drop columns that no row needs: those left may all hold less than the widest of the rows before."""
        widest = max(map(self.infini_config.window_length, self.seen), default=0)
        spare = self.keys.shape[2] - widest
        self.keys, self.values = self.keys[:, :, spare:], self.values[:, :, spare:]

    def reorder_cache(self, beam_idx):
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices):
        if self.is_initialized:
            self._select_rows(row_numbers(indices, self.keys.shape[0]))

    def batch_repeat_interleave(self, repeats):
        self._select_rows(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove):
        raise NotImplementedError(CROP_REFUSED)


def row_numbers(indices, rows):
    """The numbers, `(n,)` int64, of those of `rows` rows that numbers, negative from the end, or a bool mask name."""
    index = torch.as_tensor(indices)
    return index.nonzero().flatten() if index.dtype == torch.bool else torch.where(index < 0, index + rows, index)
