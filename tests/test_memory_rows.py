"""Rows that teach a memory: what they hold, what counts, and who reads on where."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from prose import PROSE
from transformers import AutoTokenizer

from infini_hf.assets import resolve
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.collator import InfiniCollator
from infini_hf.data.memory_row_style import MemoryRowStyle
from infini_hf.data.memory_rows import MemoryRows, sources_of
from infini_hf.data.needles import (
    WORDS,
    brief_fact,
    facts_of_kind,
    is_test_key,
    named_key_fact,
    named_word_fact,
    passkey_fact,
)
from infini_hf.data.ruler_tasks import ruler_facts


@pytest.fixture(scope="module")
def tokenizer(prose_tokenizer):
    return prose_tokenizer


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_memory_rows_are_whole_segments_that_end_with_the_answers(tokenizer, fraction):
    style = MemoryRowStyle(
        least_segments=8, most_segments=20, passkey_fraction=fraction, rows_alike=4, answer_weight=3.0
    )
    rows = MemoryRows([PROSE], tokenizer, 40, 32, style)
    lengths = []
    for index in range(40):
        row = rows[index]
        length = len(row["input_ids"])
        lengths.append(length)
        assert length % 32 == 0
        assert 8 * 32 <= length <= 20 * 32
        assert torch.equal(row["labels"], row["input_ids"])
        marked = row["loss_weights"] > 1
        text, runs = tokenizer.decode(row["input_ids"]), (torch.diff(marked.long()) > 0).cumsum(0)
        # Each run of marked tokens is an answer.
        marks = [torch.cat([torch.zeros(1, dtype=torch.bool), runs == run]) & marked for run in runs.unique()]
        answers = [tokenizer.decode(row["input_ids"][mark]).strip() for mark in marks if mark.any()]
        assert answers
        for answer in answers:
            assert text.count(answer) >= (3 if fraction else 2), (answer, text)
        # All answers together count `answer_weight` times the whole row beside it.
        assert (row["loss_weights"] - 1).sum().item() == pytest.approx(3.0 * length, rel=1e-4)
        assert torch.equal(row["input_ids"], rows[index]["input_ids"])
    groups = [set(lengths[start : start + 4]) for start in range(0, 40, 4)]
    assert all(len(group) == 1 for group in groups)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("kind", [{"passkey_fraction": 1.0}, {"passkey_fraction": 0.0}, {"ruler_fraction": 1.0}])
def test_where_an_answer_ends_counts_and_has_a_source(tokenizer, kind):
    style = MemoryRowStyle(least_segments=10, most_segments=12, rows_alike=4, most_facts=3, **kind)
    plain, marked = (MemoryRows([PROSE], tokenizer, 40, 64, replace(style, mark_ends=ends)) for ends in (False, True))
    for index in range(40):
        before, after = plain[index], marked[index]
        assert torch.equal(before["input_ids"], after["input_ids"])
        more = (after["loss_weights"] > 1) & (before["loss_weights"] == 1)
        # One for each answer, after its last token.
        assert torch.equal(more[1:], (before["loss_weights"][:-1] > 1) & (before["loss_weights"][1:] == 1))
        assert {tokenizer.decode([token]) for token in after["input_ids"][more]} == {"."}
        assert torch.equal(after["sources"][more], before["sources"][more.roll(-1)] + 1)
        assert (before["sources"][more] == -1).all()
        assert (after["loss_weights"] - 1).sum() == pytest.approx(style.answer_weight * len(more), rel=1e-4)


@pytest.mark.parametrize("words", [0.0, 1.0])
def test_rows_in_the_sentences_of_ruler_are_answered_where_they_were_stated(words):
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama-infini"))
    style = MemoryRowStyle(
        least_segments=8,
        most_segments=12,
        ruler_fraction=1.0,
        ruler_word_fraction=words,
        rows_alike=4,
        most_facts=8,
        dense=True,
        dilute_named=False,
    )
    rows, alone, lengths = MemoryRows([PROSE], tokenizer, 40, 64, style), 0, set()
    for index in range(40):
        row = rows[index]
        text, answers = tokenizer.decode(row["input_ids"]), row["loss_weights"] > 1
        values = "words" if words else "numbers"
        stated = re.findall(rf"One of the special magic {values} for ([a-z-]+) is: ([a-z0-9-]+)\.", text)
        asked = re.findall(rf"The special magic {values[:-1]} for ([a-z-]+) is ([a-z0-9-]+)\.", text)
        assert asked
        assert sorted(stated) == sorted(asked)
        assert not any(is_test_key(key) or is_test_key(value) for key, value in stated)
        # Each token of an answer is the token that is told to be its source.
        sources = row["sources"][answers]
        assert (sources >= 0).all()
        assert torch.equal(row["input_ids"][answers], row["input_ids"][sources])
        # One alone is what a long stream has; several would drown each other.
        assert row["dilute"] == (len(stated) == 1)
        alone += len(stated) == 1
        lengths |= {len(value) for _, value in stated}
    # A quarter; the others are dense.
    assert 4 <= alone <= 18
    if not words:
        assert lengths == {5, 6, 7}


@pytest.mark.parametrize("values", ["numbers", "words"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_of_ruler_are_of_their_part_and_as_many_as_one_likes(values, split):
    facts = ruler_facts(np.random.default_rng(0), 80, values, 6, split)
    assert len({fact.name for fact in facts}) == 80
    for fact in facts:
        assert is_test_key(fact.name) == is_test_key(fact.answer) == (split == "test")
        assert fact.statement == f"One of the special magic {values} for {fact.name} is: {fact.answer}."
        assert fact.prompt.endswith(f" The special magic {values[:-1]} for {fact.name} is")
    assert not ruler_facts(np.random.default_rng(0), 1, values, 6, split)[0].name


def test_an_end_that_is_joined_to_what_follows_has_no_source():
    """Tokenizers of Llama 3 have one token for a full stop and the line break after it."""
    question, marks = np.array([7, 1, 2, 9]), np.array([0, 1.0, 1.0, 1.0])
    body = np.array([5, 1, 2, 9, 5, 1, 2, 8])
    assert sources_of(question, marks, body, 0, 4, end=1).tolist() == [-1, 1, 2, 3]
    assert sources_of(question, marks, body, 4, 8, end=1).tolist() == [-1, 5, 6, -1]
    assert sources_of(question, marks, body[:7], 4, 7, end=1).tolist() == [-1, 5, 6, -1]
    # Without an end all that is marked is the answer.
    assert sources_of(question, marks, body, 4, 8).tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize("first", [1.0, 4.0])
def test_the_first_token_of_an_answer_counts_as_told(tokenizer, first):
    style = MemoryRowStyle(least_segments=8, most_segments=8, passkey_fraction=1.0, first_token_weight=first)
    for row in (MemoryRows([PROSE], tokenizer, 8, 32, style)[index] for index in range(8)):
        extra = row["loss_weights"] - 1
        marked = extra[extra > 0]
        answer = tokenizer.decode(row["input_ids"][extra > 0])
        assert answer.isdigit()
        torch.testing.assert_close(marked[0], first * marked[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(marked[1:], marked[1:2].expand(len(marked) - 1), rtol=1e-5, atol=0)


def test_an_only_token_counts_where_first_ones_do_not(tokenizer):
    style = MemoryRowStyle(first_token_weight=0.0, passkey_fraction=0.0, word_fraction=1.0, most_facts=1)
    whole = train_tokenizer([" ".join(f" {word}." for word in WORDS) * 50], vocab_size=2000)
    rows = MemoryRows([PROSE * 4], whole, 16, 64, style)
    counted = [int((rows[index]["loss_weights"] > 1).sum()) for index in range(16)]
    assert all(rows[index]["loss_weights"].isfinite().all() for index in range(16))
    assert min(counted) == 1


def test_filler_between_questions_leaves_room_for_the_facts(tokenizer):
    """A fact that is asked for and stands nowhere would be learned by heart."""
    style = MemoryRowStyle(most_gap=64, passkey_fraction=0.0, word_fraction=0.0, dense=True, grass_fraction=0.0)
    for length in (64, 96):
        rows = MemoryRows([PROSE * 4], tokenizer, 64, length, style)
        for row in (rows[index] for index in range(64)):
            assert len(row["input_ids"]) % length == 0
            assert torch.equal(row["sources"] >= 0, row["loss_weights"] > 1)


def test_a_row_without_room_for_its_question_is_refused(tokenizer):
    """It came out longer than was asked for, and without the fact."""
    style = MemoryRowStyle(passkey_fraction=1.0, least_segments=1, most_segments=1)
    rows = MemoryRows([PROSE * 4], tokenizer, 8, 8, style)
    with pytest.raises(ValueError, match="least_segments=1, segment_length=8: a row of 8 tokens has no room"):
        [rows[index] for index in range(8)]


@pytest.mark.parametrize("kind", ["passkey", "key", "word", "brief"])
def test_sources_are_where_the_answers_were_stated(tokenizer, kind):
    style = MemoryRowStyle(
        least_segments=9,
        most_segments=9,
        passkey_fraction=float(kind == "passkey"),
        word_fraction=float(kind == "word"),
        brief_fraction=float(kind == "brief"),
        grass_fraction=0.0,
    )
    # Answers stand in the text too, where nobody stated them.
    rows = MemoryRows([PROSE + " ".join(WORDS)], tokenizer, 8, 64, style)
    for row in (rows[index] for index in range(8)):
        ids, sources = row["input_ids"], row["sources"]
        assert torch.equal(sources >= 0, row["loss_weights"] > 1)
        token = (sources >= 0).nonzero().flatten()
        assert torch.equal(ids[sources[token]], ids[token])
        assert bool((sources[token] < token).all())
        # The one stated is the one asked for: what is said before both is the same.
        starts = [t for t in token.tolist() if sources[t - 1] < 0]
        for start in starts:
            asked, stated = (tokenizer.decode(ids[:end]).split()[-2:] for end in (start, int(sources[start])))
            assert asked == stated


def test_questions_are_parted_by_filler_when_told(tokenizer):
    common = {"least_segments": 20, "most_segments": 20, "passkey_fraction": 0.0, "word_fraction": 0.0, "dense": True}
    for gap in (0, 12):
        rows = MemoryRows([PROSE], tokenizer, 8, 64, MemoryRowStyle(**common, most_gap=gap))
        gaps = []
        for row in (rows[index] for index in range(8)):
            marked = (row["loss_weights"] > 1).nonzero().flatten().tolist()
            ends = [end for end in marked if end + 1 not in marked]
            text = [tokenizer.decode(row["input_ids"][end + 1 :]) for end in ends[:-1]]
            # What stands between the end of an answer and the next question.
            gaps += [len(after.split("What is the")[0].strip(" .\n")) for after in text]
            token = (row["sources"] >= 0).nonzero().flatten()
            assert torch.equal(row["input_ids"][row["sources"][token]], row["input_ids"][token])
            assert len(row["input_ids"]) == 20 * 64
        assert (max(gaps) == 0) == (gap == 0)
        assert max(gaps) < 12 * 12


def test_rows_end_where_they_are_counted_to(tokenizer):
    """Also where the last rows are no whole batch of one length."""
    rows = MemoryRows([PROSE], tokenizer, 5, 32, MemoryRowStyle(rows_alike=4))
    assert len(list(rows)) == len(rows) == 5
    with pytest.raises(IndexError, match="index=5: there are 5 rows"):
        rows[5]


def test_dense_rows_hold_as_many_facts_as_they_have_room_for(tokenizer):
    common = {"least_segments": 12, "most_segments": 12, "passkey_fraction": 0.0, "most_facts": 5}
    asked = {}
    for dense in (False, True):
        rows = MemoryRows([PROSE], tokenizer, 24, 32, MemoryRowStyle(dense=dense, **common))
        asked[dense] = [tokenizer.decode(rows[index]["input_ids"]).count("What is the") for index in range(24)]
    # 384 tokens have room for five facts.
    assert set(asked[True]) == {5}
    assert len(set(asked[False])) > 2


def test_a_brief_fact_keeps_the_name_and_the_answer():
    for fact in (named_key_fact("Ada", "12345"), named_word_fact("Ada", "amber")):
        brief = brief_fact(fact)
        assert brief.statement == f"Ada is {fact.answer}."
        assert (brief.prompt, brief.answer, brief.name) == ("Ada is", fact.answer, "Ada")
    with pytest.raises(ValueError, match="belongs to nobody"):
        brief_fact(passkey_fact("12345"))


def test_novel_lanes_read_on_where_they_stopped(tokenizer):
    style = MemoryRowStyle(
        least_segments=4, most_segments=8, rows_alike=4, novel_lanes=2, longest_reading=1024, passkey_fraction=1.0
    )
    rows = MemoryRows([PROSE], tokenizer, 80, 32, style)
    novels = torch.from_numpy(rows.novels).long()
    for lane in range(2):
        read, before = [], None
        for batch in range(20):
            row = rows[4 * batch + lane]
            assert not row["dilute"]
            assert (row["loss_weights"] == 1).all()
            if row["part"]:
                assert (row["document"], row["part"]) == (before[0], before[1] + 1)
            else:
                assert before is None or row["document"] != before[0]
                read.append([])
            before = row["document"], row["part"]
            read[-1].append(row["input_ids"])
        assert max(map(len, read)) > 1
        for reading in map(torch.cat, read):
            # Every reading is one stretch of the novels.
            starts = (novels[: len(novels) - len(reading) + 1] == reading[0]).nonzero()[:, 0].tolist()
            assert any(torch.equal(novels[start : start + len(reading)], reading) for start in starts)
    documents = [rows[index]["document"] for index in range(80) if rows[index]["part"] == 0]
    assert len(set(documents)) == len(documents)
    assert all(rows[index]["dilute"] for index in range(80) if index % 4 >= 2)
    batch = InfiniCollator(tokenizer)([rows[index] for index in range(4)])
    assert batch["dilute"].tolist() == [False, False, True, True]
    assert (batch["sources"].amax(1) >= 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"novel_lanes": 16}, "novel_lanes=16: must be from 0 to 15"),
        ({"rows_alike": 0}, "rows_alike=0: must be at least 1"),
        ({"least_segments": 8, "most_segments": 4}, "most_segments=4: must be at least 8"),
        ({"least_segments": 0}, "least_segments=0: must be at least 1"),
        ({"most_digits": 4}, "most_digits=4: must be from 5 to 18"),
        ({"most_digits": 20}, "most_digits=20: must be from 5 to 18"),
        ({"most_facts": 0}, "most_facts=0: must be from 1 to "),
        ({"most_facts": 200}, "most_facts=200: must be from 1 to "),
        ({"passkey_fraction": 1.5}, "passkey_fraction=1.5: must be from 0.0 to 1.0"),
        ({"answer_weight": -1.0}, "answer_weight=-1.0: must be at least 0.0"),
    ],
)
def test_rows_that_nobody_can_draw_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoryRowStyle(**options)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_named_facts_are_words_or_keys_as_told(tokenizer, fraction):
    style = MemoryRowStyle(least_segments=8, passkey_fraction=0.0, word_fraction=fraction)
    rows = MemoryRows([PROSE], tokenizer, 8, 32, style)
    for index in range(8):
        text = tokenizer.decode(rows[index]["input_ids"])
        assert ("secret word" in text) == (fraction == 1.0)
        assert ("pass key of" in text) == (fraction == 0.0)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_keys_of_a_row_are_of_two_digits_as_told(tokenizer, fraction):
    """All keys of such a row together; none of them is one that is kept for tests."""
    common = {"least_segments": 12, "most_segments": 12, "passkey_fraction": 0.0, "word_fraction": 0.0}
    rows = MemoryRows([PROSE], tokenizer, 60, 32, MemoryRowStyle(**common, alike_fraction=fraction))
    alike = 0
    for index in range(60):
        keys = re.findall(r"\d{5,}", tokenizer.decode(rows[index]["input_ids"]))
        assert keys
        assert not any(key[0] == "0" or is_test_key(key) for key in keys)
        alike += len(set("".join(keys))) <= 2
    assert alike == pytest.approx(60 * fraction, abs=15)
    if fraction in (0.0, 1.0):
        assert alike == 60 * fraction


@pytest.mark.parametrize("distinct", [False, True])
def test_no_two_names_of_a_row_have_one_key_when_told(tokenizer, distinct):
    common = {"least_segments": 40, "most_segments": 40, "passkey_fraction": 0.0, "word_fraction": 0.0, "dense": True}
    keys_of_two = {"alike_fraction": 1.0, "most_facts": 12, "most_digits": 5, "distinct_keys": distinct}
    rows = MemoryRows([PROSE * 3], tokenizer, 40, 32, MemoryRowStyle(**common, **keys_of_two))
    same = 0
    for index in range(40):
        text = tokenizer.decode(rows[index]["input_ids"])
        keys = re.findall(r"The pass key of \w+ is (\d{5})\. Remember", text)
        assert len(keys) > 8, text
        same += len(set(keys)) < len(keys)
    assert same == 0 if distinct else same > 10


def test_more_different_keys_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="40 different keys of 5 to 5 digits, of 2 kinds"):
        facts_of_kind(np.random.default_rng(0), "key", 40, "train", 5, [1, 2], distinct=True)


def test_writes_of_rows_with_named_facts_are_scaled_when_told(tokenizer):
    common = {"least_segments": 8, "passkey_fraction": 0.5}
    styles = [MemoryRowStyle(**common, dilute_named=dilute) for dilute in (True, False)]
    scaled, some = ([MemoryRows([PROSE], tokenizer, 16, 32, style)[i] for i in range(16)] for style in styles)
    assert not any("dilute" in row for row in scaled)
    for row in some:
        asked = tokenizer.decode(row["input_ids"])
        assert row["dilute"] == ("What is the pass key?" in asked)
    assert {row["dilute"] for row in some} == {True, False}
    lanes = MemoryRowStyle(passkey_fraction=0.0, rows_alike=4, novel_lanes=1, dilute_named=False)
    rows = MemoryRows([PROSE], tokenizer, 8, 32, lanes)
    assert not any(rows[index]["dilute"] for index in range(8))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_filler_holds_numbers_that_nobody_asks_for_as_told(tokenizer, fraction):
    common = {"least_segments": 8, "most_segments": 8, "passkey_fraction": 1.0, "most_digits": 5}
    prose = re.sub(r"\d", "", PROSE)
    rows, without = (
        MemoryRows([prose], tokenizer, 60, 32, MemoryRowStyle(**common, number_fraction=share))
        for share in (fraction, 0.0)
    )
    with_numbers = 0
    for index in range(60):
        row, plain = rows[index], without[index]
        assert len(row["input_ids"]) == 8 * 32
        numbers, key = (re.findall(r"\d+", tokenizer.decode(ids["input_ids"])) for ids in (row, plain))
        # Of the row without them nothing is a number but its key, and nothing else in the row is as long.
        assert len(set(key)) == 1
        assert {number for number in numbers if len(number) > 4} == set(key)
        told = row["sources"] >= 0
        assert torch.equal(row["input_ids"][told], row["input_ids"][row["sources"][told]])
        with_numbers += set(numbers) != set(key)
    assert with_numbers == pytest.approx(60 * fraction, abs=15)
    if fraction in (0.0, 1.0):
        assert with_numbers == 60 * fraction
