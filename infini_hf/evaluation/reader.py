"""Who answered: all of a model that its answers and summaries depend on, more than a memory has to know."""

import json

from ..fingerprint import digest_weights, fingerprint
from ..streaming import require_patched

# Settings of generation that no evaluation gives itself, and that change what is said.
DECODING = (
    "bad_words_ids begin_suppress_tokens encoder_repetition_penalty length_penalty min_length min_new_tokens min_p "
    "no_repeat_ngram_size num_beams repetition_penalty sequence_bias suppress_tokens typical_p"
).split()


def has_adapter(head):
    """Whether PEFT has put weights beside those of an output head."""
    return head is not None and "merged_adapters" in vars(head)


def reader_of(model):
    """What must be the same for two answers to be by one reader, as a dict that JSON can hold.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.

    Returns:
        `dict`: the [`infini_hf.fingerprint.fingerprint`]; `head`, a digest, where the output head has weights of its
        own; `decoding`, where the model's settings of generation change what it says.

    Raises:
        ValueError: when the model is not patched.
    """
    inner = require_patched(model)
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    # By name, not by identity: offloaded weights are stand-ins, of which no two are the same.
    tied = inner.config.get_text_config(decoder=True).tie_word_embeddings and not has_adapter(head)
    has_own = head is not None and not tied
    # As JSON gives it back.
    settings = json.loads(json.dumps(inner.generation_config.to_diff_dict(), default=str))
    decoding = {name: settings[name] for name in DECODING if settings.get(name) is not None}
    return {
        **fingerprint(decoder),
        **({"head": digest_weights(head)} if has_own else {}),
        **({"decoding": decoding} if decoding else {}),
    }
