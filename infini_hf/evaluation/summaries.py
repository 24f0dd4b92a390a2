"""Summaries of texts of any length: the text is streamed into the memory, the summary is generated from it."""

import torch

from ..data.booksum import DEFAULT_PROMPT, summarization_prompt
from ..streaming import generate, prefill, require_patched

# The paper's decoding on BookSum; transformers would draw from the 50 likeliest tokens alone.
PAPER_DECODING = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 0, "max_new_tokens": 1024}
DRAWING = ("temperature", "top_p", "top_k")


def summarize(model, tokenizer, text, prompt=DEFAULT_PROMPT, max_text_tokens=None, **generation):
    """A summary of a text, read with constant memory.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        text (`str`): the text, of any length.
        prompt (`str`, *optional*): what stands around the text, with `{text}` in its place; that of the training.
        max_text_tokens (`int`, *optional*): leave out what follows in the text.
        generation: options of `generate`; by default the paper's (temperature 0.5, top-p 0.95, 1,024 new tokens).
            Those that look at earlier tokens (penalties, n-grams that may not repeat) see the summary, not the text.

    Returns:
        `str`: the summary.

    Raises:
        ValueError: when the model is not patched, or the text is empty.
    """
    require_patched(model)
    if not text or text.isspace():
        raise ValueError("the text is empty: there is nothing to summarise, leave it out")
    ids = torch.tensor([summarization_prompt(text, tokenizer, prompt, max_text_tokens)])
    options = {**PAPER_DECODING, **generation}
    if not options["do_sample"]:
        # What says how to draw means nothing where nothing is drawn.
        options = {name: value for name, value in options.items() if name in generation or name not in DRAWING}
    # Generation is given the last token alone: to the stock loop a whole book would be a prompt beyond the model's
    # positions, to warn of and to carry along at every token.
    cache = prefill(model, ids[:, :-1])
    output = generate(model, ids[:, -1:], cache=cache, **options)
    return tokenizer.decode(output[0, 1:], skip_special_tokens=True).strip()
