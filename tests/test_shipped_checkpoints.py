"""What ships with a trained memory answers.

The checkpoints, to the passkey prompt in every way that people type it; the adapter, to what they cannot answer.
"""

import functools

import numpy as np
import pytest
from transformers import AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM, generate, prefill
from infini_hf.assets import resolve, shipped, shipped_adapters
from infini_hf.cli.names import find_adapter, find_model
from infini_hf.data.needles import GRASS, PASSKEY_HEADER, draw_key, passkey_fact
from infini_hf.data.ruler_tasks import ruler_facts
from infini_hf.evaluation.controls import closed_memory
from infini_hf.lora import load_adapter

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


@functools.cache
def adapted_model():
    return load_adapter(resolve("tiny-llama-infini"), resolve("tiny-llama-ruler"), dtype="float32").eval()


def rare_fact(kind):
    """A fact unlike those that the checkpoint was trained on."""
    rng = np.random.default_rng(4)
    if kind == "ruler":
        return ruler_facts(rng, 1, "numbers", 5, "test")[0]
    return passkey_fact(draw_key(rng, kind, "test"))


@pytest.mark.parametrize("kind", [6, 8, "ruler"])
def test_the_adapter_finds_what_the_checkpoint_was_not_trained_on(kind):
    model, tokenizer = shipped_model("tiny-llama-infini")
    fact = rare_fact(kind)
    ids, question = (
        tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for words in (f"{fact.statement} {' '.join([GRASS] * 60)}", f" {fact.prompt}")
    )

    def answer(model):
        out = generate(model, question, cache=prefill(model, ids), max_new_tokens=11)
        return tokenizer.decode(out[0, question.shape[1] :]).split(".")[0].strip()

    adapted = adapted_model()
    assert answer(adapted) == fact.answer
    assert answer(model) != fact.answer
    with closed_memory(adapted):
        assert answer(adapted) != fact.answer


def test_adapters_that_ship_are_found_by_name():
    assert shipped_adapters() == ["tiny-llama-ruler"]
    assert find_adapter("tiny-llama-ruler") == resolve("tiny-llama-ruler")
    assert not set(shipped_adapters()) & set(shipped())
    with pytest.raises(ValueError, match=r"adapter 'tiny-llama-rulr': .* \(did you mean tiny-llama-ruler\?\)"):
        find_adapter("tiny-llama-rulr")
    with pytest.raises(ValueError, match="it is a shipped adapter, of tiny-llama-infini; name that one"):
        find_model("tiny-llama-ruler")
