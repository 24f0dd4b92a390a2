"""ROUGE against hand counts, and summaries against plain generation from the same tokens."""

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import gate_parameters
from peft import get_peft_model
from transformers import AutoModelForCausalLM, set_seed, tokenization_utils_base
from transformers.generation import stopping_criteria

from infini_hf import InfiniConfig, patch_model
from infini_hf.assets import resolve
from infini_hf.data.booksum import summarization_prompt, summarization_rows
from infini_hf.evaluation import summaries
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.rouge import rouge_scores
from infini_hf.evaluation.summaries import PAPER_DECODING, summarize
from infini_hf.lora import lora_config

SEGMENT = 64
TEXT = "The old house stood at the end of the lane, and nobody had lived there for 12 years. " * 12
GREEDY = {"do_sample": False, "max_new_tokens": 12}


# ROUGE.


def test_scores_are_what_one_counts_by_hand():
    pytest.importorskip("rouge_score")
    # Of 3 and 6 words 3 in common, of 2 and 5 pairs 2, a common subsequence of 3.
    scores = rouge_scores(["the cat sat"], ["the cat sat on the mat"])
    precision, recall = 1.0, {"rouge1": 3 / 6, "rouge2": 2 / 5, "rougeL": 3 / 6}
    for kind, share in recall.items():
        assert scores[kind] == pytest.approx(100 * 2 * precision * share / (precision + share))


def test_order_matters_to_pairs_and_subsequences_alone():
    pytest.importorskip("rouge_score")
    scores = rouge_scores(["mat the on sat"], ["sat on the mat"])
    assert scores["rouge1"] == pytest.approx(100)
    assert scores["rouge2"] == 0
    assert scores["rougeL"] == pytest.approx(25)
    assert scores["overall"] == 0


def test_scores_are_means_of_what_the_package_says_with_stems():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], True)
    said = ["The houses were standing empty for years.", "He walked into town", ""]
    right = ["A house stood empty for many years.", "She walks to the town every day.", "Nobody came."]
    scores = rouge_scores(said, right)
    for kind in ("rouge1", "rouge2", "rougeL"):
        parts = [scorer.score(target, text)[kind].fmeasure for text, target in zip(said, right, strict=True)]
        assert scores[kind] == pytest.approx(100 * sum(parts) / 3)
    assert rouge_scores(["houses"], ["house"])["rouge1"] == pytest.approx(100)


def test_overall_is_the_geometric_mean_of_the_paper(monkeypatch):
    """Table 4 of the paper: 40.0, 8.8 and 17.9 are 18.5 overall."""
    shares = {"rouge1": 0.400, "rouge2": 0.088, "rougeL": 0.179}

    class Scorer:
        def __init__(self, kinds, use_stemmer):
            assert (set(kinds), use_stemmer) == (set(shares), True)

        def score(self, target, prediction):
            assert (target, prediction) == ("reference", "summary")
            return {kind: SimpleNamespace(fmeasure=share) for kind, share in shares.items()}

    monkeypatch.setitem(sys.modules, "rouge_score", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", SimpleNamespace(RougeScorer=Scorer))
    scores = rouge_scores(["summary"], ["reference"])
    assert [round(value, 1) for value in scores.values()] == [40.0, 8.8, 17.9, 18.5]


@pytest.mark.parametrize(
    ("said", "right", "message"),
    [
        ([], [], "0 predictions and 0 references"),
        (["a"], [], "1 predictions and 0 references"),
        (["a"], ["b", "c"], "1 predictions and 2 references"),
        (["a", "b", "c"], ["a", " ", ""], r"references \[1, 2\] are empty"),
    ],
)
def test_what_cannot_be_compared_is_refused(said, right, message):
    with pytest.raises(ValueError, match=message):
        rouge_scores(said, right)


def test_without_the_package_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install"):
        rouge_scores(["a"], ["a"])


# Summaries.


@pytest.fixture(scope="module")
def model():
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny-llama"), dtype=torch.float32).eval()
    model = patch_model(stock, InfiniConfig(SEGMENT, overlap=8, feature_map="exp"))
    with torch.no_grad():
        for bias in gate_parameters(model).values():
            bias.fill_(0.7)
    return model


def by_hand(model, tokenizer, ids, **options):
    """The stock loop on the whole prompt at once, with a cache that `generate` makes for itself."""
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def test_a_summary_is_what_the_model_generates_after_the_prompt(model, tokenizer):
    ids = summarization_prompt(TEXT, tokenizer)
    assert len(ids) > 4 * SEGMENT
    said = summarize(model, tokenizer, TEXT, **GREEDY)
    assert said == by_hand(model, tokenizer, ids, **GREEDY)
    with closed_memory(model):
        assert summarize(model, tokenizer, TEXT, **GREEDY) != said
    # Nothing is left of the first text when the next one is read.
    assert summarize(model, tokenizer, TEXT, **GREEDY) == said


def test_a_long_text_and_a_prompt_of_ones_own(model, tokenizer):
    prompt = "{text} In short:"
    long = summarize(model, tokenizer, TEXT * 10, prompt, max_text_tokens=1000, **GREEDY)
    ids = summarization_prompt(TEXT * 10, tokenizer, prompt, 1000)
    assert len(ids) == 1000 + 1 + len(tokenizer(" In short:")["input_ids"])
    assert long == by_hand(model, tokenizer, ids, **GREEDY)


def test_decoding_is_that_of_the_paper_unless_told(model, tokenizer, monkeypatch):
    asked, stream = [], summaries.generate

    def noted(*args, **options):
        asked.append({name: value for name, value in options.items() if name != "cache"})
        return stream(*args, **options)

    monkeypatch.setattr(summaries, "generate", noted)
    set_seed(3)
    first = summarize(model, tokenizer, TEXT, max_new_tokens=8)
    set_seed(3)
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 0, "max_new_tokens": 8}
    assert first == by_hand(model, tokenizer, summarization_prompt(TEXT, tokenizer), **sampled)
    greedy = {"do_sample": False, "max_new_tokens": 1}
    summarize(model, tokenizer, TEXT, **greedy)
    assert asked == [sampled, greedy]
    assert {**sampled, "max_new_tokens": 1024} == PAPER_DECODING


def test_the_tokens_are_those_before_the_summary_in_a_training_row(model, tokenizer, monkeypatch):
    pairs = Dataset.from_list([{"id": "1", "text": TEXT, "summary": "An empty house."}])
    row = summarization_rows(pairs, tokenizer, max_text_tokens=150)[0]
    prefix = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    given = []
    monkeypatch.setattr(summaries, "prefill", lambda model, ids: given.append(ids))
    monkeypatch.setattr(summaries, "generate", lambda model, ids, **options: given.append(ids) or ids)
    assert summarize(model, tokenizer, TEXT, max_text_tokens=150) == ""
    assert torch.cat(given, dim=1).tolist() == [prefix]
    assert row["input_ids"][: len(prefix)] == prefix


def test_a_text_beyond_the_positions_of_the_model_is_summarised_without_a_warning(model, tokenizer, monkeypatch):
    """What one may be told once in a process is counted here, so that no earlier test has used it up."""
    warned = []
    for logger in (stopping_criteria.logger, tokenization_utils_base.logger):
        for name in ("warning", "warning_once"):
            monkeypatch.setattr(logger, name, lambda message, *args, **options: warned.append(message))
    assert len(summarization_prompt(TEXT * 3, tokenizer)) > model.config.max_position_embeddings
    summarize(model, tokenizer, TEXT * 3, max_new_tokens=3)
    assert not warned
    by_hand(model, tokenizer, summarization_prompt(TEXT * 3, tokenizer), max_new_tokens=3)
    assert warned


def test_an_adapted_model_summarises_like_the_merged_one(tokenizer):
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny-llama"), dtype=torch.float32).eval()
    base = patch_model(stock, InfiniConfig(SEGMENT, feature_map="exp"))
    config = lora_config(base, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "memory_gate.modules_to_save" in name:
                parameter.fill_(0.5)
    said = summarize(peft_model, tokenizer, TEXT, **GREEDY)
    with peft_model.disable_adapter():
        assert summarize(peft_model, tokenizer, TEXT, **GREEDY) != said
    assert summarize(peft_model.merge_and_unload(), tokenizer, TEXT, **GREEDY) == said


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(text, model, tokenizer):
    with pytest.raises(ValueError, match="the text is empty"):
        summarize(model, tokenizer, text)


def test_a_model_without_memory_is_refused(tokenizer):
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny-llama"))
    with pytest.raises(ValueError, match="not patched"):
        summarize(stock, tokenizer, TEXT)
