"""Summaries of texts of any length: the text is streamed into the memory, the summary is generated from it."""

import torch

from ..cache import InfiniCache
from ..data.booksum import DEFAULT_PROMPT, summarization_prompt
from ..streaming import generate, require_patched

# The paper's decoding on BookSum.
PAPER_DECODING = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "max_new_tokens": 1024}
DRAWING = ("temperature", "top_p")


def summarize(model, tokenizer, text, prompt=DEFAULT_PROMPT, max_text_tokens=None, **generation):
    """A summary of a text, read with constant memory.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        text (`str`): the text, of any length.
        prompt (`str`, *optional*): what stands around the text, with `{text}` in its place; that of the training.
        max_text_tokens (`int`, *optional*): leave out what follows in the text.
        generation: options of `generate`; by default the paper's (temperature 0.5, top-p 0.95, 1,024 new tokens).

    Returns:
        `str`: the summary.

    Raises:
        ValueError: when the model is not patched, or the text is empty.
    """
    inner = require_patched(model)
    if not text or text.isspace():
        raise ValueError("the text is empty: there is nothing to summarise, leave it out")
    ids = torch.tensor([summarization_prompt(text, tokenizer, prompt, max_text_tokens)])
    options = {**PAPER_DECODING, **generation}
    if not options["do_sample"]:
        # What says how to draw means nothing where nothing is drawn.
        options = {name: value for name, value in options.items() if name in generation or name not in DRAWING}
    output = generate(model, ids, cache=InfiniCache(inner.config), **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
