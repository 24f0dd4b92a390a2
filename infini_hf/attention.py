"""Infini-attention over whatever a layer is given: it splits the call at segment boundaries and continues the cache.

One forward serves both orders. A plain call on a long input scans the segments inside the layer; a stream pushes one
chunk after another through the model. Nothing but the rounding depends on where the chunks were cut.
"""

from dataclasses import dataclass

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from . import memory as memory_math

PLAN = "infini_plan"


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


def rotate(states, cos, sin):
    """RoPE on `(batch, num_heads, seq_len, head_dim)` with cosines and sines `(1 or batch, seq_len, head_dim)`."""
    cos, sin = cos.to(states.device).unsqueeze(1), sin.to(states.device).unsqueeze(1)
    return states * cos + rotate_half(states) * sin


def take_columns(states, index):
    """`(batch, num_heads, seq_len, head_dim)` gathered along the sequence by `(batch, n)`."""
    index = index.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, index)


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
        layer = None if past_key_values is None else past_key_values.fetch(self.layer_idx)
        output, weights = self.scan_segments(queries, keys, values, layer, infini_plan, kwargs)
        if layer is not None:
            past_key_values.stow(self.layer_idx)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(output), weights

    def project(self, hidden_states):
        """Queries, keys and values `(batch, heads, seq_len, head_dim)` as the stock module has them before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return (
            self.q_proj(hidden_states).view(shape).transpose(1, 2),
            self.k_proj(hidden_states).view(shape).transpose(1, 2),
            self.v_proj(hidden_states).view(shape).transpose(1, 2),
        )

    def attention_options(self):
        """Extra keyword arguments of the stock module's call of its attention backend."""
        return {}

    def scan_segments(self, queries, keys, values, layer, plan, kwargs):
        """All rounds of the plan: `(batch, seq_len, num_heads, head_dim)` and the weights of the last round."""
        state = self.open_state(keys, values, layer)
        outputs, weights, reads_anything = [], None, False
        for index, round in enumerate(plan.rounds):
            parts = [self.pick(states, round) for states in (queries, keys, values)]
            # Nobody reads what the last round writes, unless a cache carries it on.
            writes = layer is not None or index + 1 < len(plan.rounds)
            output, weights, state = self.attend(*parts, state, round, plan, writes, kwargs)
            reads_anything = reads_anything or any(round.reads)
            outputs.append(output)
        if self.training and torch.is_grad_enabled() and not reads_anything:
            # A call too short to read, or all padding, still reaches the gate: data parallelism waits for it.
            outputs = [self.memory_gate(output) for output in outputs or [queries[:, :, :0]]]
        if layer is not None:
            layer.keys, layer.values = state.keys, state.values
            layer.memory, layer.memory_norm = state.memory, state.memory_norm
            layer.seen, layer.columns = plan.seen_after, layer.columns + plan.columns
        return self.place(outputs, queries, plan), weights

    def open_state(self, keys, values, layer):
        """The state to start from: that of the cache, or an empty one."""
        if layer is None:
            return LayerState(keys[:, :, :0], values[:, :, :0], *memory_math.empty(keys))
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        return LayerState(layer.keys, layer.values, layer.memory, layer.memory_norm)

    def pick(self, states, round):
        """The round's tokens of `(batch, heads, seq_len, head_dim)`, right-aligned."""
        if isinstance(round.columns, slice):
            return states[:, :, round.columns]
        return take_columns(states, round.columns)

    def place(self, outputs, queries, plan):
        """The rounds' outputs in the columns of the call; zeros at padding."""
        if plan.scatter_index is None:
            return (torch.cat(outputs, dim=2) if len(outputs) != 1 else outputs[0]).transpose(1, 2)
        outputs = outputs or [queries[:, :, :0]]
        nothing = outputs[0].new_zeros(*queries.shape[:2], 1, queries.shape[-1])
        return take_columns(torch.cat([*outputs, nothing], dim=2), plan.scatter_index).transpose(1, 2)

    def attend(self, queries, keys, values, state, round, plan, writes, kwargs):
        """One round: local attention, retrieval, gate, and the write for rows that close their segment."""
        layout = round.layout
        window_keys = torch.cat([state.keys, keys], dim=2)
        window_values = torch.cat([state.values, values], dim=2)
        if layout.join_index is not None:
            window_keys = take_columns(window_keys, layout.join_index)
            window_values = take_columns(window_values, layout.join_index)
        local, weights = self.attend_locally(queries, window_keys, window_values, layout, plan, kwargs)
        if any(round.reads):
            config = plan.config
            asked = self.memory_gate.center_queries(queries)
            retrieved = memory_math.retrieve(asked, state.memory, state.memory_norm, config.feature_map)
            reads = None if all(round.reads) else round.flags(round.reads).to(queries.device)
            local = self.memory_gate(local, retrieved, reads)
        state = LayerState(window_keys, window_values, state.memory, state.memory_norm)
        if any(round.closes):
            state = self.close_segment(state, round, plan, writes)
        return local, weights, state

    def attend_locally(self, queries, keys, values, layout, plan, kwargs):
        """Softmax attention of the round's queries over their rows' windows, on the model's backend."""
        cos, sin = plan.share(("rope", layout), lambda: window_rope(plan.rope, layout))
        dtype, device = queries.dtype, queries.device
        batch, count = queries.shape[0], layout.count
        mask = plan.share(
            ("mask", layout, device),
            lambda: build_mask(self.config, batch, count, layout.length, layout.padding, dtype, device),
        )
        output, weights = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager_attention
        )(
            self,
            rotate(queries, cos[:, -count:], sin[:, -count:]),
            rotate(keys, cos, sin),
            values,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.attention_options(),
            **kwargs,
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
        if layout.is_uniform:
            state.keys, state.values = carry(state.keys, kept[0], first[0]), carry(state.values, kept[0], first[0])
        else:
            index = layout.carry_index(kept, first)
            state.keys, state.values = take_columns(state.keys, index), take_columns(state.values, index)
        return state


def carry(states, kept, first):
    """The first `first` and the last `kept - first` tokens of a window."""
    if kept == states.shape[2]:
        return states
    last = kept - first
    if first == 0:
        # A copy, so that a short window does not keep the whole segment's storage alive.
        return states[:, :, states.shape[2] - last :].clone()
    return torch.cat([states[:, :, :first], states[:, :, states.shape[2] - last :]], dim=2)


def window_rope(rope, layout):
    """Cosines and sines of a round's keys, `(1 or batch, length, head_dim)`."""
    if layout.padding is None:
        return tuple(table[:, : layout.length] for table in rope)
    return tuple(table[0][layout.positions.to(table.device)] for table in rope)
