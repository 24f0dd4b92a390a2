"""One token on a [`StaticInfiniCache`]: fixed shapes, no branch on what was read, no wait for the device."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import memory as memory_math
from .attention import PLAN, rotate
from .static_layer import carried_tokens, slot_places

IN_PLACE = (
    "a StaticInfiniCache is written in place, for inference: call the model in evaluation mode (model.eval()) under "
    "torch.no_grad(), or pass an InfiniCache"
)


@dataclass
class StaticStep:
    """The plan of a call of one token, in place of a [`SegmentPlan`]; every tensor has a row for each of the batch.

    Attributes:
        config ([`InfiniConfig`]): the geometry of segments.
        valid (`torch.Tensor`, *optional*): `(batch,)` bool, false at padding; all valid by default.
        slot (`torch.Tensor`): `(batch, 1)` int64, where the token goes.
        filled (`torch.Tensor`): `(batch, 1, 1, slots)` bool, the slots that the token sees.
        reads (`torch.Tensor`): `(batch,)` float32, 0 where the memory is still empty.
        closes (`torch.Tensor`): `(batch, 1, 1, 1)` bool, the rows that end a segment here.
        first (`torch.Tensor`): `(batch, 1, 1, 1)` bool, those of them that end their first.
        rope (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines `(batch, 1, head_dim)` of the token.
        overlap_rope (`tuple[torch.Tensor, torch.Tensor]`): `(batch, overlap, head_dim)` of what a segment leaves to
            the next one's overlap.
    """

    config: object
    valid: torch.Tensor | None
    slot: torch.Tensor
    filled: torch.Tensor
    reads: torch.Tensor
    closes: torch.Tensor
    first: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    overlap_rope: tuple[torch.Tensor, torch.Tensor]

    def decode(self, attention, queries, keys, values, layer):
        """What [`InfiniAttention`] does with a token: `(batch, 1, num_heads, head_dim)` and the local weights.

        Args:
            attention ([`InfiniAttention`]): the layer.
            queries (`torch.Tensor`): `(batch, num_heads, 1, head_dim)`, before RoPE.
            keys (`torch.Tensor`): `(batch, num_kv_heads, 1, head_dim)`, before RoPE.
            values (`torch.Tensor`): the same shape.
            layer ([`StaticInfiniLayer`]): its state, changed in place.
        """
        self.append(layer, keys, values)
        local, weights = self.attend_locally(attention, rotate(queries, *self.rope), layer)
        gate = attention.memory_gate
        asked = gate.center_queries(queries)
        retrieved = memory_math.retrieve(asked, layer.memory, layer.memory_norm, self.config.feature_map)
        output = gate(local, retrieved, self.reads.to(queries.device))
        self.write(layer, gate.center_keys(keys), values)
        self.carry(layer)
        layer.tokens.add_(1 if self.valid is None else self.valid.to(layer.tokens.device))
        layer.columns_read.add_(1)
        return output.transpose(1, 2), weights

    def append(self, layer, keys, values):
        """Put the token into its slot; padding goes there too, unseen, and the next token over it."""
        for states, new in ((layer.keys, keys), (layer.values, values), (layer.rotated, rotate(keys, *self.rope))):
            put(states, self.slot, new)

    def attend_locally(self, attention, queries, layer):
        """Softmax attention of one rotated query over the filled slots: eager if it is asked for, else sdpa."""
        filled, options = self.filled.to(queries.device), attention.attention_options()
        if options or attention.config._attn_implementation == "eager":
            mask, scaling = additive(filled, queries.dtype), attention.scaling
            output, weights = attention.eager_attention(
                attention, queries, layer.rotated, layer.values, mask, scaling=scaling, **options
            )
            return output.transpose(1, 2), weights
        # The heads of a group ask the same keys: as rows of one product, so that no key is repeated.
        packed = queries.reshape(queries.shape[0], layer.values.shape[1], -1, queries.shape[-1])
        output = F.scaled_dot_product_attention(
            packed, layer.rotated, layer.values, attn_mask=filled, scale=attention.scaling
        )
        return output.reshape(queries.shape), None

    def write(self, layer, keys, values):
        """Add the token to what its segment will write, and that to the memory where the segment ends."""
        config, closes = self.config, self.closes.to(layer.memory.device)
        state = (layer.memory, layer.memory_norm)
        added = memory_math.contribution(keys, values, *state, config.memory_update, config.feature_map)
        for memory, pending, new in zip(state, (layer.pending, layer.pending_norm), added, strict=True):
            ends = closes.view(-1, *[1] * (memory.ndim - 1))
            if self.valid is not None:
                new = new.masked_fill(~self.valid.to(new.device).view_as(ends), 0.0)
            pending.add_(new)
            memory.add_(pending.masked_fill(~ends, 0.0))
            pending.masked_fill_(ends, 0.0)

    def carry(self, layer):
        """Where a segment ends, its last tokens become the overlap; where it is a row's first, its first the sinks."""
        config, device = self.config, layer.keys.device
        begin, end = config.carried_length(2), config.longest_window
        # Its first tokens, and its last ones at their places in the next window.
        first, last = slice(begin, begin + config.sink_tokens), slice(end - config.overlap, end)
        if config.sink_tokens:
            rows, slots = self.first.to(device), torch.arange(config.sink_tokens, device=device)[None]
            for states in (layer.keys, layer.values, layer.rotated):
                put(states, slots, torch.where(rows, states[:, :, first], states[:, :, : config.sink_tokens]))
        if config.overlap:
            rows, slots = self.closes.to(device), torch.arange(config.sink_tokens, begin, device=device)[None]
            rotated = rotate(layer.keys[:, :, last], *self.overlap_rope)
            for states, new in (
                (layer.rotated, rotated),
                (layer.keys, layer.keys[:, :, last]),
                (layer.values, layer.values[:, :, last]),
            ):
                put(states, slots, torch.where(rows, new, states[:, :, config.sink_tokens : begin]))


def put(states, slots, new):
    """Write `(batch, heads, n, head_dim)` into slots `(1 or batch, n)` of `(batch, heads, slots, head_dim)`.

    In the one form that a compiler writes in place: others have it copy the whole window.
    """
    row = torch.arange(states.shape[0], device=states.device)[:, None, None]
    head = torch.arange(states.shape[1], device=states.device)[None, :, None]
    # Under autocast a token comes in less precision than its slot has.
    states.index_put_((row, head, slots.to(states.device)[:, None]), new.to(states.dtype))


def plan_step(cache, valid=None):
    """The [`StaticStep`] of the next token of a [`StaticInfiniCache`]; `valid` is `(batch,)` bool."""
    config, seen = cache.infini_config, cache.first.tokens
    cos, sin = cache.rope[1]
    open_tokens = seen % config.segment_length
    place = carried_tokens(seen, config) + open_tokens
    _, filled = slot_places(seen, config)
    slot = (config.carried_length(2) + open_tokens)[:, None]
    filled = filled.scatter(1, slot, True)
    closes = open_tokens + 1 == config.segment_length
    if valid is not None:
        closes = closes & valid
    first = closes & (seen < config.segment_length)
    # In the window after this segment.
    shift = config.carried_length(2) - carried_tokens(seen + config.segment_length, config)
    overlap = config.sink_tokens + torch.arange(config.overlap, device=seen.device)[None] - shift[:, None]
    overlap = overlap.clamp_min(0)
    return StaticStep(
        config=config,
        valid=valid,
        slot=slot,
        filled=filled[:, None, None],
        reads=(seen >= config.segment_length).float(),
        closes=closes.view(-1, 1, 1, 1),
        first=first.view(-1, 1, 1, 1),
        rope=(cos[0][place][:, None], sin[0][place][:, None]),
        overlap_rope=(cos[0][overlap], sin[0][overlap]),
    )


def step_arguments(decoder, kwargs, tokens):
    """The arguments of a patched decoder for one token on a [`StaticInfiniCache`].

    Raises:
        ValueError: for a cache of another batch, patch or model, or a mask that does not fit.
        NotImplementedError: for `memory_scale`, or a mask that is not two-dimensional.
    """
    cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
    batch = tokens.shape[0]
    rows = cache.first.tokens.shape[0]
    if rows != batch:
        raise ValueError(f"the cache holds {rows} rows and the call has {batch}: rows of one batch keep their places")
    if not torch.compiler.is_compiling():
        cache.check_owner(decoder)
    if kwargs.pop("memory_scale", None) is not None:
        raise NotImplementedError("memory_scale with a StaticInfiniCache: every segment is written once; leave it out")
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask of {tuple(mask.shape)}: Infini-attention takes a padding mask of two dimensions"
        )
    if mask is not None and mask.shape[0] != batch:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: the call has {batch} rows")
    valid = None if mask is None else mask[:, -1].bool().to(tokens.device)
    kwargs[PLAN] = plan_step(cache, valid)
    kwargs["position_ids"] = cache.first.tokens[:, None].clone()
    kwargs["attention_mask"] = step_masks(decoder, cache, valid)
    return kwargs


def step_masks(decoder, cache, valid):
    """The `attention_mask` argument of the decoder: of four dimensions, so that it makes none of its own."""
    unused = cache.first.tokens.new_ones(1, dtype=torch.bool).expand(cache.first.tokens.shape[0], 1, 1, 1)
    if not cache.fresh:
        return unused
    seen = cache.note_token(valid)[:, None, None]
    if decoder.config._attn_implementation == "eager":
        seen = additive(seen, decoder.get_input_embeddings().weight.dtype)
    return {"full_attention": unused, "sliding_attention": seen}


def additive(mask, dtype):
    """A bool mask as what eager attention adds to its scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def is_step(cache, columns):
    """Whether a call of `columns` on a static cache is one of fixed shapes: one token, after others."""
    return columns == 1 and cache.first.is_initialized


def check_inference(decoder):
    """Raise under autograd or in training."""
    if torch.is_grad_enabled() or decoder.training:
        raise ValueError(IN_PLACE)


def masks_for_generate(attention_mask, is_first_iteration=True, **options):
    """What `generate` makes of its mask for a cache that compiles: none for the tokens it adds, which are all real.

    The mask grows with every token, and what is compiled wants one shape.
    """
    return attention_mask if is_first_iteration else None
