"""The model families: one short class and one row each. Nothing else in the package names a family."""

from dataclasses import dataclass

from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .attention import InfiniAttention


class NormedProjection:
    """Queries and keys are normalised before RoPE; the memory sees them after the norm."""

    def project(self, hidden_states):
        queries, keys, values = super().project(hidden_states)
        return self.q_norm(queries), self.k_norm(keys), values


class InfiniLlamaAttention(InfiniAttention, modeling_llama.LlamaAttention):
    stock_class = modeling_llama.LlamaAttention
    eager_attention = staticmethod(modeling_llama.eager_attention_forward)


class InfiniMistralAttention(InfiniAttention, modeling_mistral.MistralAttention):
    stock_class = modeling_mistral.MistralAttention
    eager_attention = staticmethod(modeling_mistral.eager_attention_forward)


class InfiniQwen2Attention(InfiniAttention, modeling_qwen2.Qwen2Attention):
    stock_class = modeling_qwen2.Qwen2Attention
    eager_attention = staticmethod(modeling_qwen2.eager_attention_forward)


class InfiniQwen3Attention(NormedProjection, InfiniAttention, modeling_qwen3.Qwen3Attention):
    stock_class = modeling_qwen3.Qwen3Attention
    eager_attention = staticmethod(modeling_qwen3.eager_attention_forward)


class InfiniGemmaAttention(InfiniAttention, modeling_gemma.GemmaAttention):
    stock_class = modeling_gemma.GemmaAttention
    eager_attention = staticmethod(modeling_gemma.eager_attention_forward)


class InfiniGemma2Attention(InfiniAttention, modeling_gemma2.Gemma2Attention):
    stock_class = modeling_gemma2.Gemma2Attention
    eager_attention = staticmethod(modeling_gemma2.eager_attention_forward)

    def attention_options(self):
        return {"softcap": self.attn_logit_softcapping}


class InfiniGemma3Attention(NormedProjection, InfiniAttention, modeling_gemma3.Gemma3Attention):
    stock_class = modeling_gemma3.Gemma3Attention
    eager_attention = staticmethod(modeling_gemma3.eager_attention_forward)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        attention (`type`): the patched attention class; its `stock_class` is what it replaces.
        rope_by_layer_type (`bool`): the decoder keeps one RoPE table for each layer type.
        masks_by_layer_type (`bool`): the decoder takes a dict of masks, one for each layer type.
    """

    attention: type
    rope_by_layer_type: bool = False
    masks_by_layer_type: bool = False


FAMILIES = {
    "llama": Family(InfiniLlamaAttention),
    "mistral": Family(InfiniMistralAttention),
    "qwen2": Family(InfiniQwen2Attention, masks_by_layer_type=True),
    "qwen3": Family(InfiniQwen3Attention, masks_by_layer_type=True),
    "gemma": Family(InfiniGemmaAttention),
    "gemma2": Family(InfiniGemma2Attention, masks_by_layer_type=True),
    "gemma3_text": Family(InfiniGemma3Attention, rope_by_layer_type=True, masks_by_layer_type=True),
}


def family_of(config):
    """The row for a model's config.

    Raises:
        NotImplementedError: names the model type and the supported ones.
    """
    if config.is_encoder_decoder:
        raise NotImplementedError(
            f"{config.model_type!r} is an encoder-decoder model: Infini-attention is for decoders; "
            f"supported are {', '.join(FAMILIES)}"
        )
    if config.model_type not in FAMILIES:
        raise NotImplementedError(
            f"model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(docs/adding_a_family.md has the four steps to add one)"
        )
    return FAMILIES[config.model_type]
