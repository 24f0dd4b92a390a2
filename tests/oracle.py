"""Infini-attention once more: float64, one token and one head at a time, from its definition alone.

Slow and plain on purpose. It borrows weights and RoPE frequencies from a model and nothing else: attention, memory,
gate, positions and norms are written out here. Everything is differentiable.
"""

import copy
import math

import torch


def elu_plus_one(state):
    """x + 1 above zero and exp(x) below."""
    return torch.where(state > 0, state + 1, state.clamp(max=0).exp())


def map_key(key, feature_map):
    if feature_map == "softmax":
        total = key.exp().sum(-1, keepdim=True)
        return key.exp() * (math.e**8 / total).clamp(max=1.0)
    return elu_plus_one(key) if feature_map == "elu" else key.clamp(max=8).exp()


def map_query(query, feature_map):
    return elu_plus_one(query) if feature_map == "elu" else (query - query.max()).exp()


def read(mapped, memory, norm):
    """What a mapped query or key `(head_dim,)` finds in one head's memory; zeros where nothing was written."""
    denominator = sum(mapped[i] * norm[i] for i in range(len(norm)))
    if denominator == 0:
        return torch.zeros_like(memory[0])
    return sum(mapped[i] * memory[i] for i in range(len(norm))) / denominator


def write(keys, values, memory, norm, rule, feature_map):
    """One head's memory after a segment of keys and values `(seq_len, head_dim)`, all of which read the old one."""
    new_memory, new_norm = memory, norm
    for key, value in zip(keys, values, strict=True):
        mapped = map_key(key, feature_map)
        if rule == "delta":
            value = value - read(mapped, memory, norm)
        new_memory = new_memory + torch.outer(mapped, value)
        new_norm = new_norm + mapped
    return new_memory, new_norm


def rotate(state, position, frequencies):
    """RoPE on one head's `(head_dim,)`: coordinate i turns with coordinate i + head_dim / 2."""
    left, right = state.chunk(2)
    cos, sin = torch.cos(position * frequencies), torch.sin(position * frequencies)
    return torch.cat([left * cos - right * sin, right * cos + left * sin])


def attend(query, keys, values, positions, scaling, softcap, frequencies):
    """Softmax attention of one query, the last of its keys, each at its position."""
    query = rotate(query, positions[-1], frequencies)
    scores = [scaling * query.dot(rotate(key, place, frequencies)) for key, place in zip(keys, positions, strict=True)]
    scores = torch.stack(scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return sum(weight * value for weight, value in zip(scores.softmax(0), values, strict=True))


class Oracle:
    """A float64 copy of a model, read token by token.

    `model` is the copy: its parameters are the leaves of the graph, so that gradients can be compared by name.
    """

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        self.config = self.model.config
        self.infini = self.config.infini_attention

    def logits(self, ids=None, embeds=None):
        """Float64 logits `(seq_len, vocab)` of one row of ids, or of embeddings `(seq_len, hidden_size)`."""
        decoder = self.model.get_decoder()
        hidden = decoder.embed_tokens(ids) if embeds is None else embeds
        for layer in decoder.layers:
            hidden = self.run_layer(layer, hidden)
        logits = self.model.lm_head(self.normalise(decoder.norm, hidden))
        cap = vars(self.config).get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def run_layer(self, layer, hidden):
        attended = self.run_attention(layer.self_attn, self.normalise(layer.input_layernorm, hidden))
        if "pre_feedforward_layernorm" in layer._modules:
            hidden = hidden + self.normalise(layer.post_attention_layernorm, attended)
            changed = layer.mlp(self.normalise(layer.pre_feedforward_layernorm, hidden))
            return hidden + self.normalise(layer.post_feedforward_layernorm, changed)
        hidden = hidden + attended
        return hidden + layer.mlp(self.normalise(layer.post_attention_layernorm, hidden))

    def normalise(self, norm, states):
        """RMS norm over the last dimension, whose weight counts from zero in every Gemma."""
        weight = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        return weight * states / (states.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def run_attention(self, attention, hidden):
        length, heads = hidden.shape[0], self.config.num_attention_heads
        kv_heads = self.config.num_key_value_heads
        queries = attention.q_proj(hidden).view(length, heads, -1)
        keys = attention.k_proj(hidden).view(length, kv_heads, -1)
        values = attention.v_proj(hidden).view(length, kv_heads, -1)
        if "q_norm" in attention._modules:
            queries = self.normalise(attention.q_norm, queries)
            keys = self.normalise(attention.k_norm, keys)
        run_head = self.run_infini_head if "memory_gate" in attention._modules else self.run_stock_head
        group = heads // kv_heads
        outputs = [
            run_head(attention, head, queries[:, head], keys[:, head // group], values[:, head // group])
            for head in range(heads)
        ]
        return attention.o_proj(torch.cat(outputs, dim=-1))

    def frequencies(self, kind):
        rope = self.model.get_decoder().rotary_emb
        return (
            rope._buffers[f"{kind}_attention_inv_freq"] if self.config.model_type == "gemma3_text" else rope.inv_freq
        )

    def options(self, attention, kind):
        """Scaling, soft cap and RoPE frequencies of a layer."""
        width = vars(self.config).get("query_pre_attn_scalar", self.config.head_dim)
        softcap = self.config.attn_logit_softcapping if self.config.model_type == "gemma2" else None
        return 1 / math.sqrt(width), softcap, self.frequencies(kind)

    def run_stock_head(self, attention, head, queries, keys, values):
        """A layer that the patch left: all earlier tokens, or a sliding window of them, at global positions."""
        kinds = vars(self.config).get("layer_types")
        sliding = kinds is not None and kinds[attention.layer_idx] == "sliding_attention"
        options = self.options(attention, "sliding" if sliding else "full")
        outputs = []
        for now in range(len(queries)):
            seen = range(max(0, now - self.config.sliding_window + 1) if sliding else 0, now + 1)
            outputs.append(attend(queries[now], keys[list(seen)], values[list(seen)], list(seen), *options))
        return torch.stack(outputs)

    def run_infini_head(self, attention, head, queries, keys, values):
        """One query head of a patched layer: window, memory, gate, and the write after the last token of a segment."""
        segment_length, feature_map = self.infini["segment_length"], self.infini["feature_map"]
        bias = attention.memory_gate.bias[head]
        gate = torch.tanh(bias) if self.infini["gate"] == "tanh" else torch.sigmoid(bias)
        options = self.options(attention, "full")
        memory, norm = queries.new_zeros(queries.shape[1], queries.shape[1]), queries.new_zeros(queries.shape[1])
        outputs = []
        for now in range(len(queries)):
            start = now // segment_length * segment_length
            sinks = set(range(min(self.infini["sink_tokens"], now + 1)))
            window = sorted(sinks | set(range(max(0, start - self.infini["overlap"]), now + 1)))
            output = attend(queries[now], keys[window], values[window], list(range(len(window))), *options)
            if start > 0:
                retrieved = read(map_query(queries[now], feature_map), memory, norm)
                output = output + gate * (retrieved - output)
            outputs.append(output)
            if now + 1 == start + segment_length:
                segment = slice(start, now + 1)
                rule = self.infini["memory_update"]
                memory, norm = write(keys[segment], values[segment], memory, norm, rule, feature_map)
        return torch.stack(outputs)
