"""What one layer remembers in tensors whose shapes and addresses never change.

The window of a row lies in slots: `sink_tokens` of them, then `overlap`, then `segment_length` for the open segment,
so that a segment's end moves the sinks and the overlap alone. What the open segment will write is summed up token by
token beside the memory, and added to it where the segment ends.
"""

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from . import memory as memory_math
from .attention import rotate, take_columns
from .layer_state import CROP_REFUSED, InfiniLayer, row_numbers


def carried_tokens(seen, config):
    """Sinks and overlap that a row's window holds after `seen` tokens; both int64 of any shape."""
    return (seen // config.segment_length * config.segment_length).clamp_max(config.carried_length(2))


def slot_places(seen, config):
    """Where the tokens of the slots stand in the windows of rows that have read `seen` tokens, `(batch,)` int64.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(batch, slots)` int64 places, counted from the window's first token, and
        `(batch, slots)` bool, true where the slot holds a token.
    """
    slot = torch.arange(config.longest_window, device=seen.device)[None]
    seen = seen[:, None]
    carried = carried_tokens(seen, config)
    is_sink = (slot < config.sink_tokens) & (carried > 0)
    # The last slot of the overlap stands before the first of the open segment, however much is carried.
    place = torch.where(is_sink, slot, slot + carried - config.carried_length(2))
    end = carried + seen % config.segment_length
    filled = is_sink | ((place >= carried.clamp_max(config.sink_tokens)) & (place < end))
    return place.clamp_min(0), filled


def window_slots(seen, config, width):
    """The slot of each column of right-aligned windows, `(batch, width)` int64; any where there is no token."""
    seen = seen[:, None]
    carried = carried_tokens(seen, config)
    place = torch.arange(width, device=seen.device)[None] - (width - carried - seen % config.segment_length)
    is_sink = (place < config.sink_tokens) & (carried > 0)
    return torch.where(is_sink, place, place + config.carried_length(2) - carried).clamp_min(0)


class StaticTensors:
    """What static layers have in common: tensors by name that are written in place."""

    is_compileable = True
    TENSORS = ()
    # Those of them that have no row for each of the batch.
    ROWLESS = ("columns_read",)

    def get_seq_length(self):
        """`int`: columns read, padding included. It waits for the device."""
        return int(self.columns_read) if self.is_initialized else 0

    def bind(self, state):
        """Write tensors by name into those that are there, or keep them where shapes or dtypes differ."""
        like = ((getattr(self, name), new) for name, new in state.items()) if self.is_initialized else ()
        kept = self.is_initialized and all(old.shape == new.shape and old.dtype == new.dtype for old, new in like)
        for name, new in state.items():
            if kept:
                getattr(self, name).copy_(new)
            else:
                setattr(self, name, new)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.pin()

    def pin(self):
        """Tell the compiler that the addresses stay: CUDA graphs may then write there."""
        for name in self.TENSORS:
            torch._dynamo.mark_static_address(getattr(self, name))

    def map_tensors(self, function):
        """Bind `function(tensor)` in place of every tensor of the state."""
        if self.is_initialized:
            for name in self.TENSORS:
                setattr(self, name, function(getattr(self, name)))
            self.pin()

    def detach(self):
        """Nothing to do: no graph ever holds this state."""

    def reorder_cache(self, beam_idx):
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices):
        if self.is_initialized:
            self._select_rows(row_numbers(indices, self.keys.shape[0]))

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            self._select_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _select_rows(self, index):
        if self.is_initialized:
            names = [name for name in self.TENSORS if name not in self.ROWLESS]
            with torch.inference_mode(False):
                self.bind({name: getattr(self, name).index_select(0, index.to(self.device)) for name in names})

    def crop(self, tokens_to_remove):
        raise NotImplementedError(CROP_REFUSED)


class StaticInfiniLayer(StaticTensors, InfiniLayer):
    """State of one patched layer.

    Attributes:
        keys (`torch.Tensor`): `(batch, num_kv_heads, slots, head_dim)`, keys before RoPE.
        values (`torch.Tensor`): the same shape.
        rotated (`torch.Tensor`): the same shape, keys after RoPE at their places in the window.
        memory (`torch.Tensor`): M, `(batch, num_kv_heads, head_dim, head_dim)`, float32.
        memory_norm (`torch.Tensor`): z, `(batch, num_kv_heads, head_dim)`, float32.
        pending (`torch.Tensor`): what the open segment will add to M, float32.
        pending_norm (`torch.Tensor`): what it will add to z, float32.
        tokens (`torch.Tensor`): `(batch,)` int64, valid tokens read.
        columns_read (`torch.Tensor`): `()` int64, columns read, padding included.
    """

    SUMS = ("memory", "memory_norm", "pending", "pending_norm")
    TENSORS = ("keys", "values", "rotated", *SUMS, "tokens", "columns_read")

    def __init__(self, infini_config):
        # Not that of the layer above, whose counts are Python numbers.
        CacheLayerMixin.__init__(self)
        self.infini_config = infini_config

    @property
    def seen(self):
        """`tuple[int, ...]`: valid tokens read, for each row. It waits for the device."""
        return tuple(self.tokens.tolist()) if self.is_initialized else ()

    @property
    def columns(self):
        """`int`: columns read, padding included. It waits for the device."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length):
        return self.infini_config.longest_window + query_length, 0

    def load(self, layer, rope, gate):
        """Take over the state of an [`InfiniLayer`], into the tensors that are there if they fit.

        Args:
            layer ([`InfiniLayer`]): a layer that has read something; it is not changed.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines `(1, slots, head_dim)`.
            gate ([`MemoryGate`]): the gate of the attention, which may shift keys before they are written.
        """
        config, device = self.infini_config, layer.memory.device
        # Outside inference mode, whose tensors nothing outside it may write.
        with torch.inference_mode(False), torch.no_grad():
            tokens = torch.tensor(layer.seen, device=device)
            place, filled = slot_places(tokens, config)
            window = carried_tokens(tokens, config) + tokens % config.segment_length
            column = layer.keys.shape[2] - window[:, None] + place
            state = {
                name: take_slots(getattr(layer, name), torch.where(filled, column, -1)) for name in ("keys", "values")
            }
            state["rotated"] = rotate(state["keys"], *(table[0][place.to(table.device)] for table in rope))
            sums = (layer.memory.clone(), layer.memory_norm.clone(), *pending_of(layer, gate))
            state |= dict(zip(self.SUMS, sums, strict=True))
            self.bind({**state, "tokens": tokens, "columns_read": torch.tensor(layer.columns, device=device)})

    def unload(self):
        """The same state as an [`InfiniLayer`] with tensors of its own."""
        layer = InfiniLayer(self.infini_config)
        if self.is_initialized:
            layer.lazy_initialization(self.keys, self.values)
            layer.seen, layer.columns = self.seen, self.columns
            width = max(map(self.infini_config.window_length, layer.seen), default=0)
            slots = window_slots(self.tokens, self.infini_config, width)
            layer.keys, layer.values = take_columns(self.keys, slots), take_columns(self.values, slots)
            layer.memory, layer.memory_norm = self.memory.clone(), self.memory_norm.clone()
        return layer

    def reset_rows(self, rows):
        if self.is_initialized:
            rows = rows.to(self.device)
            self.tokens.masked_fill_(rows, 0)
            for name in self.SUMS:
                tensor = getattr(self, name)
                tensor.masked_fill_(rows.view(-1, *[1] * (tensor.ndim - 1)), 0.0)


def take_slots(states, column):
    """`(batch, num_heads, n, head_dim)` gathered by `(batch, slots)` columns, zeros where a column is below 0."""
    padded = torch.nn.functional.pad(states, (0, 0, 1, 0))
    return take_columns(padded, column + 1)


def pending_of(layer, gate):
    """What the open segments of an [`InfiniLayer`] will add to M and z, float32 of their shapes."""
    config = layer.infini_config
    added = torch.zeros_like(layer.memory), torch.zeros_like(layer.memory_norm)
    counts = [seen % config.segment_length for seen in layer.seen]
    for count in set(counts) - {0}:
        rows = torch.tensor([row for row, n in enumerate(counts) if n == count], device=layer.memory.device)
        keys, values = gate.center_keys(layer.keys[rows, :, -count:]), layer.values[rows, :, -count:]
        state, rule = (layer.memory[rows], layer.memory_norm[rows]), (config.memory_update, config.feature_map)
        for whole, part in zip(added, memory_math.contribution(keys, values, *state, *rule), strict=True):
            whole[rows] = part
    return added


class StaticSlidingLayer(StaticTensors, CacheLayerMixin):
    """State of a stock layer with a sliding window: column `c` of the stream stands in slot `c % sliding_window`.

    Attributes:
        keys (`torch.Tensor`): `(batch, num_kv_heads, sliding_window, head_dim)`, keys after RoPE.
        values (`torch.Tensor`): the same shape.
        columns_read (`torch.Tensor`): `()` int64, columns read, padding included.
    """

    is_sliding = True
    supports_early_init = False
    TENSORS = ("keys", "values", "columns_read")

    def __init__(self, sliding_window):
        super().__init__()
        self.sliding_window = sliding_window

    def lazy_initialization(self, key_states, value_states):
        raise TypeError("a StaticSlidingLayer begins with the first columns that its layer reads")

    def update(self, key_states, value_states, *args, **kwargs):
        """Take new columns in, and return those that they see: one column sees the slots as they lie."""
        if not self.is_initialized or key_states.shape[2] > 1:
            layer = self.unload()
            seen = layer.update(key_states, value_states)
            self.load(layer)
            return seen
        slot = (self.columns_read % self.sliding_window)[None]
        # Under autocast a column comes in less precision than its slot has.
        self.keys.index_copy_(2, slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, slot, value_states.to(self.values.dtype))
        self.columns_read.add_(1)
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        held = min(self.get_seq_length(), self.sliding_window - 1)
        return held + query_length, self.get_seq_length() - held

    def get_max_length(self):
        return self.sliding_window

    def held_slots(self):
        """The slots of the last `sliding_window - 1` columns, in the order of the stream, `(held,)` int64."""
        read = self.get_seq_length()
        first = max(0, read - self.sliding_window + 1)
        return torch.arange(first, read, device=self.device) % self.sliding_window

    @torch.compiler.disable
    def load(self, layer):
        """Take over the state of a stock sliding layer, into the tensors that are there if they fit."""
        with torch.inference_mode(False), torch.no_grad():
            read = torch.tensor(layer.cumulative_length, device=layer.keys.device)
            held, window = layer.keys.shape[2], self.sliding_window
            slots = torch.arange(layer.cumulative_length - held, layer.cumulative_length, device=read.device) % window
            state = {"columns_read": read}
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                state[name] = tensor.new_zeros(*tensor.shape[:2], window, tensor.shape[-1])
                state[name][:, :, slots] = tensor
            self.bind(state)

    @torch.compiler.disable
    def unload(self):
        """The same state as a stock layer with tensors of its own."""
        layer = DynamicSlidingWindowLayer(self.sliding_window)
        if self.is_initialized:
            layer.lazy_initialization(self.keys[:, :, :0], self.values[:, :, :0])
            slots = self.held_slots()
            layer.keys, layer.values = self.keys[:, :, slots], self.values[:, :, slots]
            layer.cumulative_length = self.get_seq_length()
        return layer
