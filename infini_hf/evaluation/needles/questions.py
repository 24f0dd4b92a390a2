"""Questions asked of a cache that has read its streams: with its memory, with it closed, with another stream's."""

import copy

import torch

from ...streaming import generate
from ..controls import closed_memory

# What can be asked of one reading; the baselines read on their own.
ASKED_ALIKE = ("memory", "closed", "other")


def ask(model, tokenizer, cache, prompts, max_new_tokens):
    """Continue one prompt for each row of a cache, greedily, from a copy.

    Args:
        model (`PreTrainedModel`): a patched model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        cache ([`InfiniCache`]): what was read; it stays as it is.
        prompts (`list[numpy.ndarray]`): ids `(tokens,)`, one for each row.
        max_new_tokens (`int`): tokens to generate.

    Returns:
        `list[str]`: the new text of each row.
    """
    texts = [""] * len(prompts)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    # Rows of one length at a time: no padding, which stock sliding layers would count.
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        part = select_rows(cache, rows)
        ids = torch.stack([torch.from_numpy(prompts[row]) for row in rows]).long()
        out = generate(model, ids, cache=part, **options)
        new = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        for row, text in zip(rows, new, strict=True):
            texts[row] = text
    return texts


def select_rows(cache, rows):
    """A copy of a cache with some of its rows."""
    twin = copy.copy(cache)
    twin.batch_select_indices(torch.tensor(rows))
    return twin


def with_memory_of_another(cache):
    """A copy of a cache whose rows have the memory of the row before: their own window, another stream's past."""
    twin = copy.copy(cache)
    for layer in twin.infini_layers.values():
        layer.memory, layer.memory_norm = layer.memory.roll(1, dims=0), layer.memory_norm.roll(1, dims=0)
    return twin


def ask_with(control, model, tokenizer, cache, prompts, max_new_tokens):
    """The answers under one of `"memory"`, `"closed"`, `"other"`; see [`ask`].

    The reading is the same for all: what the memory gave to the keys and values of the window above the first layer
    stays in them when the gates are shut for the question.
    """
    if control == "closed":
        with closed_memory(model):
            return ask(model, tokenizer, cache, prompts, max_new_tokens)
    asked = with_memory_of_another(cache) if control == "other" else cache
    return ask(model, tokenizer, asked, prompts, max_new_tokens)
