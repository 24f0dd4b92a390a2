"""Infini-attention over whatever a layer is given: it splits the call at segment boundaries and continues the cache.

One forward serves both orders. A plain call on a long input scans the segments inside the layer; a stream pushes one
chunk after another through the model. Nothing but the rounding depends on where the chunks were cut.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import memory as memory_math
from .fast_paths import Choice
from .local_attention import attend_window, build_mask, needs_no_mask, rotate
from .memory_read import Retrieval
from .segments import SegmentPlan
from .windows import as_new, as_rows, carry, held_after, held_before, take_columns

PLAN = "infini_plan"
# Tokens of whole segments that are read at once: on CPUs what their caches hold, elsewhere enough to fill a device.
TOKENS_AT_ONCE = {"cpu": 1_024}
MANY_TOKENS = 16_384
# Scores that an eager backend may hold at once.
SCORES_AT_ONCE = 2**24


@dataclass
class LayerState:
    """What a layer carries from round to round; tensors as in [`InfiniLayer`]."""

    keys: torch.Tensor
    values: torch.Tensor
    memory: torch.Tensor
    memory_norm: torch.Tensor


class InfiniAttention:
    """Mixin that turns a stock attention class into Infini-attention; parameter names and signature stay.

    A family's class says how it projects (`project`), which extra options its backend call takes
    (`attention_options`), and which function its stock module falls back on (`eager_attention`).
    """

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        infini_plan=None,
        **kwargs,
    ):
        """Attention over the call, `(batch, seq_len, hidden_size)` to the same, and the local attention weights.

        `position_embeddings` and `attention_mask` are not used: positions are those of the local window and padding
        comes with the plan, both from the hook on the decoder.

        Raises:
            RuntimeError: when the layer is called around the decoder, where no plan was made.
        """
        if infini_plan is None:
            raise RuntimeError(
                "an Infini-attention layer was called without a segment plan: call the model or its decoder, whose "
                "hook makes the plan, not the layer alone"
            )
        # Global positions mean nothing to a backend that gets one segment at a time.
        kwargs.pop("position_ids", None)
        queries, keys, values = self.project(hidden_states)
        if not isinstance(infini_plan, SegmentPlan):
            # One token on a static cache.
            output, weights = infini_plan.decode(self, queries, keys, values, past_key_values.layers[self.layer_idx])
            return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights
        layer = None if past_key_values is None else past_key_values.fetch(self.layer_idx)
        output, weights = self.scan_segments(queries, keys, values, layer, infini_plan, kwargs)
        if layer is not None:
            past_key_values.stow(self.layer_idx)
        return self.o_proj(output.flatten(2).contiguous()), weights

    def project(self, hidden_states):
        """Queries, keys and values `(batch, heads, seq_len, head_dim)` as the stock module has them before RoPE."""
        heads = (-1, self.head_dim)
        return (
            self.q_proj(hidden_states).unflatten(-1, heads).transpose(1, 2),
            self.k_proj(hidden_states).unflatten(-1, heads).transpose(1, 2),
            self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2),
        )

    def attention_options(self):
        """Extra keyword arguments of the stock module's call of its attention backend."""
        return {}

    def scan_segments(self, queries, keys, values, layer, plan, kwargs):
        """All rounds of the plan: `(batch, seq_len, num_heads, head_dim)` and the weights of the last round."""
        queries, state = self.open_state(queries, keys, values, layer, plan)
        outputs, weights = [], None
        for run in plan.runs(self.segments_at_once(queries, plan)):
            # Nobody reads what the last round writes, unless a cache carries it on.
            writes = layer is not None or run[-1] is not plan.rounds[-1]
            attend = self.attend_segments if self.is_fast(run, plan) else self.attend
            output, weights, state = attend(queries, keys, values, state, run, plan, writes, kwargs)
            outputs.append(output)
        outputs = outputs or [queries[:, :, :0].transpose(1, 2)]
        if self.training and torch.is_grad_enabled() and not any(any(round.reads) for round in plan.rounds):
            # A call too short to read, or all padding, still reaches the gate: data parallelism waits for it.
            outputs = [self.memory_gate(output.transpose(1, 2)).transpose(1, 2) for output in outputs]
        if layer is not None:
            layer.close(state, plan)
        return self.place(outputs, plan), weights

    def open_state(self, queries, keys, values, layer, plan):
        """The queries, and the state to start from: that of the cache, or an empty one."""
        if layer is None:
            return queries, LayerState(keys[:, :, :0], values[:, :, :0], *memory_math.empty(keys))
        queries, held_keys, held_values, *memory = layer.open(queries, keys, values, plan, self.memory_gate)
        return queries, LayerState(as_new(held_keys, keys), as_new(held_values, values), *memory)

    def pick(self, states, round):
        """The round's tokens of `(batch, heads, seq_len, head_dim)`, right-aligned."""
        if isinstance(round.columns, slice):
            return states[:, :, round.columns]
        return take_columns(states, round.columns)

    def place(self, outputs, plan):
        """The rounds' outputs `(batch, count, num_heads, head_dim)` in the columns of the call; zeros at padding."""
        if plan.scatter_index is None:
            return torch.cat(outputs, dim=1) if len(outputs) != 1 else outputs[0]
        batch, _, *heads = outputs[0].shape
        outputs = torch.cat([*outputs, outputs[0].new_zeros(batch, 1, *heads)], dim=1)
        return take_columns(outputs.transpose(1, 2), plan.scatter_index).transpose(1, 2)

    def segments_at_once(self, queries, plan):
        """How many whole segments one run holds: a bound on what is kept in memory for the length of a layer."""
        if Choice.mode != "auto":
            return 1 if Choice.mode == "never" else len(plan.rounds)
        batch, heads, _, _ = queries.shape
        length = plan.config.segment_length
        most = TOKENS_AT_ONCE.get(queries.device.type, MANY_TOKENS) // (batch * length)
        if self.config._attn_implementation == "eager":
            most = min(most, SCORES_AT_ONCE // (batch * heads * length * plan.config.longest_window))
        return max(1, most)

    def is_fast(self, run, plan):
        return Choice.mode != "never" and plan.is_whole(run[0])

    def attend_segments(self, queries, keys, values, state, run, plan, writes, kwargs):
        """Whole segments that follow one another, as rows of a batch: all that [`attend`] does, once for all of them.

        Returns:
            `tuple`: outputs `(batch, count, num_heads, head_dim)`, weights of the last segment, the state after it.
        """
        config, layout, count = plan.config, run[0].layout, len(run)
        columns = slice(run[0].columns.start, run[-1].columns.stop)
        queries, keys, values = (states[:, :, columns] for states in (queries, keys, values))
        rows = [as_rows(states, count) for states in (queries, keys, values)]
        held = [
            held_before(old, new, count, config.sink_tokens)
            for old, new in ((state.keys, keys), (state.values, values))
        ]
        windows = [[old, new] if old.shape[2] else [new] for old, new in zip(held, rows[1:], strict=True)]
        local, weights = self.attend_locally(rows[0], *windows, layout, plan, kwargs)
        before, after = self.scan_memory(rows[1], rows[2], state, run, plan, writes)
        local = self.read_memory(local, rows[0], *before, run, plan)
        kept = min(config.carried_length(2), layout.length)
        sinks = min(config.sink_tokens, kept)
        old, new = (state.keys, state.values), (keys, values)
        window = (held_after(*parts, kept, sinks) for parts in zip(old, new, strict=True))
        if weights is not None:
            weights = weights.unflatten(0, (-1, count))[:, -1]
        output = local.transpose(1, 2).reshape(queries.shape[0], -1, *local.shape[1::2])
        return output, weights, LayerState(*window, *after)

    def scan_memory(self, keys, values, state, run, plan, writes):
        """The memory before each of the segments of a run, and after the last.

        Args:
            keys (`torch.Tensor`): `(batch * count, num_kv_heads, length, head_dim)`, before RoPE.
            values (`torch.Tensor`): the same shape.
            state ([`LayerState`]): what the run begins with.
            run (`list[Round]`): the rounds of the segments.
            plan ([`SegmentPlan`]): that of the call.
            writes (`bool`): whether anybody reads the state after the last.

        Returns:
            `tuple`: memory and norm before each, with `batch * count` rows, and the pair after the last, or that
            before it where nobody reads the one after.
        """
        config, count = plan.config, len(run)
        rule, scale = (config.memory_update, config.feature_map), plan.scales_of(run)
        start = state.memory, state.memory_norm
        if count == 1:
            if not writes:
                return start, start
            scale = None if scale is None else scale[:, 0]
            return start, memory_math.update(self.memory_gate.center_keys(keys), values, *start, *rule, scale)
        keys = self.memory_gate.center_keys(keys).unflatten(0, (-1, count))
        values = values.unflatten(0, (-1, count))
        if not writes:
            keys, values = keys[:, :-1], values[:, :-1]
            scale = None if scale is None else scale[:, :-1]
        memories, norms = memory_math.scan(keys, values, *start, *rule, scale)
        before = memories[:, :count].flatten(0, 1), norms[:, :count].flatten(0, 1)
        # Copies, so that a state does not keep those before it alive.
        return before, (memories[:, -1].clone(), norms[:, -1].clone())

    def read_memory(self, local, queries, memory, memory_norm, run, plan):
        """Local attention mixed with what the memory returns; all `(rows, num_heads, seq_len, head_dim)`.

        `memory` and `memory_norm` have a row for each row and round of the run.
        """
        if not any(any(round.reads) for round in run):
            return local
        asked = self.memory_gate.center_queries(queries)
        reads = plan.reads_of(run)
        reads = None if reads is None else reads.to(local.device)
        # Without a gradient the two steps hold one tensor less.
        read = Retrieval if Choice.mode != "never" and torch.is_grad_enabled() else memory_math.retrieve
        retrieved = read(asked, memory, memory_norm, plan.config.feature_map)
        return self.memory_gate(local, retrieved=retrieved, reads=reads)

    def attend(self, queries, keys, values, state, run, plan, writes, kwargs):
        """One round: local attention, retrieval, gate, and the write for rows that close their segment.

        Returns:
            `tuple`: outputs `(batch, count, num_heads, head_dim)`, the weights, and the state after the round.
        """
        (round,), layout = run, run[0].layout
        queries, keys, values = (self.pick(states, round) for states in (queries, keys, values))
        window_keys = torch.cat([state.keys, keys], dim=2)
        window_values = torch.cat([state.values, values], dim=2)
        if layout.join_index is not None:
            window_keys = take_columns(window_keys, layout.join_index)
            window_values = take_columns(window_values, layout.join_index)
        local, weights = self.attend_locally(queries, [window_keys], [window_values], layout, plan, kwargs)
        local = self.read_memory(local, queries, state.memory, state.memory_norm, run, plan)
        state = LayerState(window_keys, window_values, state.memory, state.memory_norm)
        if any(round.closes):
            state = self.close_segment(state, round, plan, writes)
        return local.transpose(1, 2), weights, state

    def attend_locally(self, queries, keys, values, layout, plan, kwargs):
        """Softmax attention of queries over their rows' windows, whose keys and values are lists of parts."""
        cos, sin = plan.share(("rope", layout), lambda: window_rope(plan.rope, layout))
        count, device = layout.count, queries.device
        queries, end, rotated = rotate(queries, cos[:, -count:], sin[:, -count:]), 0, []
        for part in keys:
            start, end = end, end + part.shape[2]
            rotated.append(rotate(part, cos[:, start:end], sin[:, start:end]))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        options = {**self.attention_options(), **kwargs}
        if needs_no_mask(interface, layout, device, dropout, options):
            return attend_window(queries, rotated, values, self.scaling, plan, layout), None
        keys, values = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in (rotated, values))
        batch = 1 if layout.padding is None else queries.shape[0]
        mask = plan.share(
            ("mask", layout, device),
            lambda: build_mask(self.config, batch, count, layout.length, layout.padding, values.dtype, device),
        )
        output, weights = interface(
            self, queries, keys, values, mask, dropout=dropout, scaling=self.scaling, **options
        )
        return output.transpose(1, 2), weights

    def close_segment(self, state, round, plan, writes):
        """Write the segments that are full and carry their sinks and overlap into the next window."""
        config, layout = plan.config, round.layout
        length = config.segment_length
        if writes:
            open_keys, open_values = state.keys[:, :, -length:], state.values[:, :, -length:]
            open_keys = self.memory_gate.center_keys(open_keys)
            state.memory, state.memory_norm = memory_math.update(
                open_keys,
                open_values,
                state.memory,
                state.memory_norm,
                config.memory_update,
                config.feature_map,
                plan.scale_of(round),
            )
        carried = config.carried_length(2)
        kept = [min(carried, n) if closes else n for n, closes in zip(layout.lengths, round.closes, strict=True)]
        first = [min(config.sink_tokens, n) if closes else n for n, closes in zip(kept, round.closes, strict=True)]
        # Windows of one length may hold what was carried in one row and a first segment alone in another.
        if layout.is_uniform and len(set(round.closes)) == 1:
            state.keys, state.values = carry(state.keys, kept[0], first[0]), carry(state.values, kept[0], first[0])
        else:
            index = layout.carry_index(kept, first)
            state.keys, state.values = take_columns(state.keys, index), take_columns(state.values, index)
        return state


def window_rope(rope, layout):
    """Cosines and sines of a round's keys, `(1 or batch, length, head_dim)`."""
    if layout.padding is None:
        return tuple(table[:, : layout.length] for table in rope)
    return tuple(table[0][layout.positions.to(table.device)] for table in rope)
