"""From hidden states to logits, for as many positions as fit: with a vocabulary of 128k that is no long row."""

import torch


def logits_of(model, hidden):
    """What the supported families make of the last hidden states of their decoder.

    Args:
        model (`PreTrainedModel`): a causal language model.
        hidden (`torch.Tensor`): `(..., hidden_size)`.

    Returns:
        `torch.Tensor`: `(..., vocab_size)` float32.
    """
    logits = model.get_output_embeddings()(hidden)
    # What Gemma 2 does to its logits.
    softcap = vars(model.config.get_text_config(decoder=True)).get("final_logit_softcapping")
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).float()
