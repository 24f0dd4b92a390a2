"""Tiny random models of every family, wide enough in their weights that every token matters."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infini_hf import InfiniConfig, patch_model
from infini_hf.calibration import add_memory_projections
from infini_hf.gate import MemoryGate

VOCABULARY = 97
# Short, so that rows of twenty tokens leave it.
SLIDING_WINDOW = 6

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Tied random embeddings make a tiny model repeat one token.
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Values of a family that differ from the shape; "llama3" is a Llama with the RoPE scaling of Llama 3.
FAMILIES = {
    "llama": {},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
        # Low enough to bend the scores and logits of a tiny model.
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
    },
}
HYBRID = ("gemma2", "gemma3_text")
GLOBAL = tuple(family for family in FAMILIES if family not in HYBRID)


def build(family="llama", attention="eager", seed=0, **overrides):
    """A model of `family` in evaluation mode, the same for the same seed; `overrides` are values of its config."""
    values = {**SHAPE, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(values.pop("model_type", family), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms and biases are ones and zeros, which hide that they are left out.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gate_parameters(model):
    """The gate logits of every patched layer, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("memory_gate.bias")}


def open_gates(model, seed=0):
    """Give every gate a random logit, so that nothing hides behind a neutral one; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in gate_parameters(model).values():
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return model


def build_patched(family="llama", attention="eager", seed=0, overrides=None, **infini):
    """A patched model with open gates; `infini` are options of [`InfiniConfig`]."""
    model = patch_model(build(family, attention, seed, **(overrides or {})), InfiniConfig(**infini))
    return open_gates(model, seed)


def add_moved_projections(model, size, seed=0, mix_heads=False):
    """Projections of the memory's own, so far from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    add_memory_projections(model, mix_heads=mix_heads)
    for gate in (module for module in model.modules() if isinstance(module, MemoryGate)):
        for projection in (gate.query_projection, gate.key_projection):
            projection.weight.data += size * torch.randn(projection.weight.shape, generator=generator)
    return model


def random_ids(batch, length, seed=0):
    """Token ids `(batch, length)`, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected):
    """The largest difference over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
