"""A text that is not like the grass, its tokenizer, and a tiny model of both for streams with needles."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_hf import InfiniConfig, patch_model
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.needles import GRASS

PROSE = "".join(
    f"Chapter {n}. The house at the end of the lane had {n * 7} windows, and nobody lived there. " for n in range(200)
)
SEGMENT = 16


def build_tokenizer():
    """320 tokens, of the text, the grass and a question."""
    return train_tokenizer([PROSE, GRASS, "What is the pass key? The pass key is 12345. Remember it."], vocab_size=320)


def build_model(vocab_size):
    """A patched Llama of two layers with open gates."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, initializer_range=0.4, **shape)
    model = patch_model(LlamaForCausalLM(config).eval(), InfiniConfig(SEGMENT, overlap=5))
    for layer in model.model.layers:
        layer.self_attn.memory_gate.bias.data.fill_(1.0)
    return model
