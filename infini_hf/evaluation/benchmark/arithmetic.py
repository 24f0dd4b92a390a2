"""FLOPs and bytes of a layer and of a whole model, from its shape alone: what a measurement is held against.

A multiplication with its addition counts as two FLOPs. Matrix products are counted, and of the memory's own work the
element-wise steps too; norms, RoPE and softmax are not, which every way to read has in common.
"""

from dataclasses import dataclass

FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Args:
        layers (`int`), width (`int`): decoder layers, and the size of a hidden state.
        heads (`int`), kv_heads (`int`), head_dim (`int`): of attention.
        intermediate (`int`): the inner size of the gated MLP.
        vocab_size (`int`): of the head.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int

    @property
    def projection_weights(self):
        """`int`: weights of q, k, v and o of one layer."""
        return 2 * self.width * (self.heads + self.kv_heads) * self.head_dim

    @property
    def mlp_weights(self):
        """`int`: weights of the gate, up and down projections of one layer."""
        return 3 * self.width * self.intermediate

    @property
    def read_weights(self):
        """`int`: weights that a decoded token needs: all but the table of embeddings, of which it needs a row."""
        layer = self.projection_weights + self.mlp_weights + 2 * self.width
        return self.layers * layer + self.width + self.width * self.vocab_size

    @property
    def parameters(self):
        """`int`: of the whole model, with embeddings that are not tied to the head."""
        return self.read_weights + self.width * self.vocab_size


LLAMA_3_8B = Shape(32, 4096, 32, 8, 128, 14336, 128_256)


@dataclass(frozen=True)
class Part:
    """What one part of a layer does for one token: matrix and other work, and the bytes that it moves at the least."""

    flops: float
    bytes: float


def mean_keys(segment_length, carried=0):
    """Keys that a token of a segment attends to on average, with so many carried over from earlier ones."""
    return (segment_length + 1) / 2 + carried


def layer_parts(shape, segment_length, carried=0, rule="linear", number=FLOAT32, chunk=None):
    """What each part of one layer does for one token of a long stream, forward.

    Bytes are those of every product's operands read once and its result written once, with element-wise steps that
    follow one another as one step; what tokens share, weights, M and z, counts once for all of them.

    Args:
        shape ([`Shape`]): the model.
        segment_length (`int`): tokens of a segment.
        carried (`int`, *optional*, defaults to 0): sinks and overlap.
        rule (`str`, *optional*, defaults to `"linear"`): `"linear"` or `"delta"`.
        number (`int`, *optional*, defaults to 4): bytes of a weight or an activation.
        chunk (`int`, *optional*): tokens of a forward; those of a segment by default.

    Returns:
        `dict[str, Part]`: projections, MLP, local attention, retrieval, gate, write.
    """
    chunk = chunk or segment_length
    dim, heads, kv_heads, inner = shape.head_dim, shape.heads, shape.kv_heads, shape.intermediate
    queries, keys = heads * dim, kv_heads * dim
    state = FLOAT32 * kv_heads * (dim * dim + dim) / segment_length
    seen = mean_keys(segment_length, carried)
    known = kv_heads * (2 * dim * dim + 4 * dim) if rule == "delta" else 0
    projected = 4 * shape.width + 2 * (queries + keys)
    return {
        "projections": Part(2 * shape.projection_weights, number * (projected + shape.projection_weights / chunk)),
        "MLP": Part(2 * shape.mlp_weights, number * (3 * shape.width + 6 * inner + shape.mlp_weights / chunk)),
        "local attention": Part(
            4 * queries * seen, number * (2 * queries + 2 * keys * (1 + carried / segment_length))
        ),
        # The feature map (two operations for ELU + 1), numerator, denominator and quotient of every query head.
        "retrieval": Part(heads * (2 * dim * dim + 5 * dim), number * queries + FLOAT32 * queries + state),
        # A difference, a product and a sum.
        "gate": Part(3 * queries, 2 * number * queries + FLOAT32 * queries),
        # The feature map, σ(K)ᵀ V, Σ σ(K) and, for the delta rule, what is known already.
        "write": Part(kv_heads * (2 * dim * dim + 3 * dim) + known, 2 * number * keys + 2 * state),
    }


MEMORY_PARTS = ("retrieval", "gate", "write")


def forward_flops(shape, keys, memory=None, reading=1.0):
    """FLOPs of one token through all layers, without the head.

    Args:
        shape ([`Shape`]): the model.
        keys (`float`): keys that a token attends to on average.
        memory (`str`, *optional*): the update rule of a memory, if there is one.
        reading (`float`, *optional*, defaults to 1.0): the share of tokens that read the memory, all but those of the
            first segment.
    """
    parts = {name: part.flops for name, part in layer_parts(shape, 1, keys - 1, memory or "linear").items()}
    if memory is None:
        parts = {name: flops for name, flops in parts.items() if name not in MEMORY_PARTS}
    else:
        parts |= {name: reading * parts[name] for name in ("retrieval", "gate")}
    return shape.layers * sum(parts.values())


def head_flops(shape):
    """FLOPs of the logits of one token."""
    return 2 * shape.width * shape.vocab_size


def state_bytes(shape):
    """Bytes of M and z of all layers, for one row."""
    return FLOAT32 * shape.layers * shape.kv_heads * (shape.head_dim**2 + shape.head_dim)


def window_bytes(shape, tokens, number=FLOAT32):
    """Bytes of the keys and values of so many tokens in all layers, for one row."""
    return 2 * number * shape.layers * shape.kv_heads * shape.head_dim * tokens


def predicted_overhead(shape, segment_length, carried=0, rule="linear"):
    """FLOPs of Infini-attention over those of independent blocks of a segment, prefill."""
    blocks = forward_flops(shape, mean_keys(segment_length))
    return forward_flops(shape, mean_keys(segment_length, carried), rule) / blocks


def predicted_speedup(shape, segment_length, tokens, carried=0, rule="linear"):
    """FLOPs of full attention over an input of so many tokens, over those of Infini-attention."""
    infini = forward_flops(shape, mean_keys(segment_length, carried), rule)
    return forward_flops(shape, mean_keys(tokens)) / infini


def predicted_crossover(shape, segment_length, carried=0, rule="linear"):
    """`int`: the length in tokens from which full attention costs more FLOPs than Infini-attention."""
    infini = forward_flops(shape, mean_keys(segment_length, carried), rule)
    slope = 2 * shape.layers * shape.heads * shape.head_dim
    return round(segment_length + (infini - forward_flops(shape, mean_keys(segment_length))) / slope)


def decode_bytes(shape, segment_length, context, number=FLOAT32, carried=0):
    """Bytes that one decoded token moves in the middle of a segment.

    Returns:
        `dict[str, float]`: of the weights, of the keys and values of the local window, of M and z, and of the keys and
        values of `context` tokens under full attention.
    """
    return {
        "weights": number * shape.read_weights,
        "window": window_bytes(shape, segment_length // 2 + carried, number),
        "memory": state_bytes(shape),
        "full cache": window_bytes(shape, context, number),
    }
