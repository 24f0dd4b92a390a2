"""The measurements: intervals, edges, and a recall test that a perfect copier passes and a blind one fails."""

import pytest
import torch

from infini_hf.evaluation.perplexity import doubling_edges
from infini_hf.evaluation.recall import context_recall, first_answer, wilson_interval

TEXT = "The rain had fallen all night, and the river stood high between the meadows. " * 60


class Copier:
    """Answers with what stands behind the prompt's last words where they stood first; blind, it says 0."""

    def __init__(self, tokenizer, blind=False):
        self.tokenizer, self.blind = tokenizer, blind

    def generate(self, ids, **options):
        text = self.tokenizer.decode(ids[0])
        subject = text.rsplit("The ", 1)[1]
        place = text.index(f"The {subject}") + len(f"The {subject}")
        answer = " 0." if self.blind else text[place : place + 12]
        return torch.cat([ids, self.tokenizer(answer, return_tensors="pt")["input_ids"]], dim=1)


def test_recall_is_complete_for_a_copier_and_none_for_a_blind_one(tokenizer):
    for blind, expected in ((False, 1.0), (True, 0.0)):
        results = context_recall(Copier(tokenizer, blind), tokenizer, TEXT, 200, samples=2)
        assert len(results) == 2 * 3 * 2 * 5
        assert sum(sample.correct for sample in results) / len(results) == expected


def test_among_several_facts_the_one_asked_for_is_expected(tokenizer):
    results = context_recall(Copier(tokenizer), tokenizer, TEXT, 300, samples=2, kinds=("key", "word"), facts=4)
    assert all(sample.correct for sample in results)


def test_without_the_statement_only_chance_is_left(tokenizer):
    results = context_recall(Copier(tokenizer), tokenizer, TEXT, 200, samples=2, state=False)
    assert sum(sample.correct for sample in results) == 0


def test_prompts_have_about_the_length_asked_for(tokenizer):
    results = context_recall(Copier(tokenizer), tokenizer, TEXT, 400, samples=1)
    assert all(250 < sample.tokens < 500 for sample in results)


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [(" 48213. 9", "passkey", "48213"), ("\nnone", "key", ""), (" river, and", "word", "river"), ("12", "word", "")],
)
def test_first_answer(text, kind, answer):
    assert first_answer(text, kind) == answer


def test_wilson_interval_against_the_closed_form():
    low, high = wilson_interval(18, 20)
    assert low == pytest.approx(0.6990, abs=1e-4)
    assert high == pytest.approx(0.9721, abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)


def test_edges_double_up_to_the_end():
    assert doubling_edges(5000) == [0, 1024, 2048, 4096, 5000]
    assert doubling_edges(1024) == [0, 1024]
