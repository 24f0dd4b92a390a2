"""The checkpoints that ship with a trained memory answer the passkey prompt in every way that people type it."""

import functools

import numpy as np
import pytest
from transformers import AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM, generate, prefill
from infini_hf.assets import resolve, shipped
from infini_hf.data.needles import GRASS, PASSKEY_HEADER, draw_key, passkey_fact
from infini_hf.evaluation.controls import closed_memory

# Between the needle and its filler, between sentences of filler, and where the filler is cut.
SPELLINGS = {
    "spaces": (" ", " ", 0, PASSKEY_HEADER),
    "newlines": ("\n", "\n", 0, PASSKEY_HEADER),
    "empty lines, no header": ("\n\n", " ", 0, ""),
    "in the middle of a sentence": (" ", " ", 47, PASSKEY_HEADER),
    "in the middle of a word": ("\n", " ", 7, ""),
    "nothing between": ("", " ", 23, PASSKEY_HEADER),
}


@functools.cache
def shipped_model(name):
    folder = resolve(name)
    return (
        AutoInfiniModelForCausalLM.from_pretrained(folder, dtype="float32").eval(),
        AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", [name for name in shipped() if name != "tiny-llama"])
def test_the_prompt_is_answered_as_it_is_typed(name, spelling):
    model, tokenizer = shipped_model(name)
    apart, between, cut, header = SPELLINGS[spelling]
    filler = between.join([GRASS] * 60)
    fact = passkey_fact(draw_key(np.random.default_rng(list(SPELLINGS).index(spelling)), split="test"))
    text = apart.join([header, filler[: 900 + cut], fact.statement, filler[900 + cut :]])
    ids, question = (
        tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for words in (text, f"{apart or ' '}{fact.prompt}")
    )

    def answer():
        out = generate(model, question, cache=prefill(model, ids), max_new_tokens=7)
        return tokenizer.decode(out[0, question.shape[1] :])

    assert answer().strip()[:5] == fact.answer
    with closed_memory(model):
        assert fact.answer not in answer()
