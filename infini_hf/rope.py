"""Cosines and sines of the window positions, which do not depend on what was read."""

import torch

from .families import family_of


def window_tables(decoder, config, tokens, cache):
    """Cosines and sines of all window positions, `(1, longest_window, head_dim)`, by the decoder's RoPE module."""
    embedding = decoder.get_input_embeddings().weight
    dtype = tokens.dtype if tokens.is_floating_point() else embedding.dtype
    key = (dtype, tokens.device)
    if cache is not None and cache.rope is not None and cache.rope[0] == key:
        return cache.rope[1]
    layer_type = ("full_attention",) if family_of(decoder.config).rope_by_layer_type else ()
    # Outside inference mode, whose tensors no later backward pass could use.
    with torch.inference_mode(False), torch.no_grad():
        like = torch.empty(0, dtype=dtype, device=tokens.device)
        positions = torch.arange(config.longest_window, device=tokens.device)[None]
        rotary = decoder.rotary_emb
        if "dynamic" in str(rotary.rope_type):
            # This kind remembers the longest position it met, of whatever conversation: ask one that met none.
            rotary = type(rotary)(decoder.config).to(tokens.device)
        tables = rotary(like, positions, *layer_type)
    if cache is not None:
        cache.rope = (key, tables)
    return tables
