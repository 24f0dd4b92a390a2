"""Facts in filler and rows for the base model: what is hidden can be found, and rows do not depend on the order."""

import numpy as np
import pytest
import torch

from infini_hf.data.base_rows import END_OF_TEXT, BaseRows, read_texts, train_tokenizer
from infini_hf.data.needles import (
    GRASS,
    PASSKEY_HEADER,
    RecallStyle,
    draw_facts,
    draw_key,
    grass_filler,
    hide,
    is_test_key,
    named_key_fact,
    passkey_fact,
    recall_document,
)

PROSE = "The old house stood at the end of the lane, and nobody had lived there for 12 years. " * 80


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROSE, GRASS], vocab_size=300)


def test_the_passkey_prompt_is_that_of_the_benchmark():
    fact = passkey_fact("12345")
    assert fact.statement == "The pass key is 12345. Remember it. 12345 is the pass key."
    assert fact.prompt == "What is the pass key? The pass key is"
    assert PASSKEY_HEADER.startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert grass_filler(2 * len(GRASS) + 2) == f"{GRASS} {GRASS} "


@pytest.mark.parametrize("offset", [0, 1, 50, 89, 90, 1000])
def test_grass_filler_has_the_length_asked_for_from_any_offset(offset):
    filler = grass_filler(333, offset)
    assert len(filler) == 333
    assert filler == grass_filler(333 + offset % (len(GRASS) + 1))[offset % (len(GRASS) + 1) :]


def test_training_and_test_keys_never_meet(rng):
    train = {draw_key(rng, 5, "train") for _ in range(500)}
    test = {draw_key(rng, 5, "test") for _ in range(500)}
    assert not train & test
    assert all(is_test_key(key) for key in test)
    assert all(len(key) == 5 and key[0] != "0" for key in train | test)


def test_hiding_takes_nothing_from_the_filler_and_keeps_the_order():
    filler = "abcdefghijklmnopqrstuvwxyz"
    facts = [named_key_fact("Ada", "11111"), named_key_fact("Ben", "22222")]
    text = hide(facts, filler, [0.75, 0.25], joiner="\n")
    parts = text.split("\n")
    assert [parts[1], parts[3]] == [facts[1].statement, facts[0].statement]
    assert parts[0] + parts[2] + parts[4] == filler
    assert hide(facts[:1], filler, [0.0]).startswith(facts[0].statement)
    assert hide(facts[:1], filler, [1.0]).endswith(facts[0].statement)


def test_several_facts_have_different_names_and_values(rng):
    for _ in range(50):
        facts = draw_facts(rng, 4)
        assert len({fact.prompt for fact in facts}) == 4
        assert all(fact.answer in fact.statement for fact in facts)


def test_every_question_of_a_document_is_answered_by_the_document(rng):
    asked = 0
    for _ in range(200):
        document = recall_document(rng, PROSE, 900, RecallStyle(repeat_fraction=0.0))
        for question in document.split("What is the ")[1:]:
            # "…pass key of Ada? The pass key of Ada is 12345."
            answer = question.split(" is ")[1].split(".")[0]
            assert document.index(answer) < document.index(f"What is the {question[:20]}")
            asked += 1
    assert asked > 200


def test_a_repeated_passage_stands_twice(rng):
    document = recall_document(rng, PROSE, 400, RecallStyle(repeat_fraction=1.0))
    passage = document.split("\n\n")[0]
    assert len(passage) >= 40
    assert document.endswith(passage)


def test_digits_are_tokens_and_a_text_is_the_sum_of_its_parts(tokenizer):
    ids = tokenizer("key 90210.")["input_ids"]
    assert [tokenizer.decode(token) for token in ids][-6:] == ["9", "0", "2", "1", "0", "."]
    first, second = "The old house stood", " at the end, in 1841.\n"
    assert tokenizer(first)["input_ids"] + tokenizer(second)["input_ids"] == tokenizer(first + second)["input_ids"]
    assert tokenizer.decode(tokenizer(PROSE)["input_ids"]) == PROSE
    assert END_OF_TEXT not in tokenizer.decode(tokenizer("text")["input_ids"])


def test_rows_are_reproducible_by_index_and_windows_cover_the_books(tokenizer):
    rows = BaseRows([PROSE], tokenizer, 50, 64, recall_fraction=0.0, seed=3)
    again = BaseRows([PROSE], tokenizer, 50, 64, recall_fraction=0.0, seed=3)
    for index in (0, 7, 49):
        assert torch.equal(rows[index]["input_ids"], again[index]["input_ids"])
        assert torch.equal(rows[index]["input_ids"], rows[index]["labels"])
    assert all(rows[index]["input_ids"].shape == (64,) for index in range(len(rows)))
    covered = torch.cat([rows[index]["input_ids"] for index in range(rows.windows)])
    start = int(np.random.default_rng([3, 1, 0]).integers(0, 64))
    expected = torch.from_numpy(rows.tokens[start : start + rows.windows * 64].astype(np.int64))
    assert torch.equal(covered, expected)


def test_a_share_of_rows_is_recall(tokenizer):
    rows = BaseRows([PROSE], tokenizer, 400, 64, recall_fraction=0.25, seed=0)
    texts = [tokenizer.decode(rows[index]["input_ids"]) for index in range(400)]
    share = sum(END_OF_TEXT in text or "pass key" in text or "secret word" in text for text in texts) / 400
    assert 0.15 < share < 0.35


def test_folders_without_books_and_books_too_short_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        read_texts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: is not UTF-8 text"):
        read_texts(tmp_path)
    (tmp_path / "latin.txt").write_text("\ufeffcafé", encoding="utf-8")
    assert read_texts(tmp_path) == ["café"]
    with pytest.raises(ValueError, match="row_length=4096: the books hold"):
        BaseRows(["A short one."], tokenizer, 10, 4096)
