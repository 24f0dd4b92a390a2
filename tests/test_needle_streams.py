"""Streams with needles: exact lengths and places, and forked reading, which is each stream read alone."""

import copy

import numpy as np
import pytest
import torch
from models import build_patched
from prose import PROSE, SEGMENT
from reading import assert_same_state
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm

from infini_hf import prefill
from infini_hf.data.needle_tasks import NamedTask, PasskeyTask
from infini_hf.data.needles import NAMES, PASSKEY_HEADER, is_test_key
from infini_hf.data.task_registry import make_task
from infini_hf.evaluation.needles import questions
from infini_hf.evaluation.needles.forks import fork_points, read_forked, tokens_to_read
from infini_hf.evaluation.needles.runner import describe
from infini_hf.evaluation.needles.streams import Cell, Haystacks


def test_a_stream_begins_as_the_tokenizer_begins_a_text(prose_tokenizer, prose_haystacks, prose_model):
    begun = copy.deepcopy(prose_tokenizer)
    marked = [(begun.eos_token, begun.eos_token_id)]
    begun.backend_tokenizer.post_processor = TemplateProcessing(f"{begun.eos_token} $A", special_tokens=marked)
    cell, haystacks = Cell("novel", 300, 0.5), Haystacks(begun, SEGMENT, PasskeyTask(), [PROSE])
    assert begun("the")["input_ids"] == [begun.eos_token_id, *prose_tokenizer("the")["input_ids"]]
    (ids, trial), (plain, same) = haystacks.stream(cell, 0), prose_haystacks.stream(cell, 0)
    assert trial == same
    assert len(ids) == len(plain) == 300
    assert ids[0] == begun.eos_token_id
    assert list(ids[1 : len(haystacks.header)]) == list(prose_haystacks.header)
    assert begun.eos_token_id not in ids[1:]
    # Samples of the one are none of the other.
    assert describe(prose_model, haystacks) != describe(prose_model, prose_haystacks)


@pytest.mark.parametrize("kind", ["grass", "novel"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, "straddling"])
def test_a_stream_has_its_length_and_the_needle_at_its_depth(prose_haystacks, prose_tokenizer, kind, depth):
    cell = Cell(kind, 1500, depth)
    for number in range(6):
        ids, trial = prose_haystacks.stream(cell, number)
        assert len(ids) == 1500
        key = trial.questions[0].answers[0]
        assert is_test_key(key)
        statement = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert prose_tokenizer.decode(ids).count(statement) == 1
        needle = prose_haystacks.encode(f"\n{statement}\n")
        start = next(i for i in range(len(ids)) if np.array_equal(ids[i : i + len(needle)], needle))
        header = len(prose_haystacks.encode(PASSKEY_HEADER + "\n"))
        if depth == "straddling":
            boundary = -(-start // SEGMENT) * SEGMENT if start % SEGMENT else start + SEGMENT
            assert start < boundary < start + len(needle)
            assert abs(start - 750) < 200
        else:
            assert start == header + round(depth * (1500 - header - len(needle)))
            assert prose_haystacks.layout(cell, number).place(0) == pytest.approx(depth, abs=1e-3)
    again, _ = prose_haystacks.stream(cell, 5)
    assert np.array_equal(again, ids)


@pytest.mark.parametrize("kind", ["grass", "novel"])
def test_depths_share_their_filler_and_nothing_else(prose_haystacks, kind):
    keys = set()
    for depth in (0.0, 0.3, 1.0, "straddling"):
        layout = prose_haystacks.layout(Cell(kind, 1500, depth), 2)
        ids, trunk = layout.fill(prose_haystacks.trunk(kind, 1500, 2)), prose_haystacks.trunk(kind, 1500, 2)
        assert np.array_equal(ids[: layout.shared], trunk[: layout.shared])
        after = layout.shared + len(layout.needles[0])
        assert np.array_equal(ids[after:], trunk[layout.shared : layout.shared + 1500 - after])
        keys.add(layout.trial.questions[0].answers)
    assert len(keys) == 4
    assert not np.array_equal(prose_haystacks.trunk(kind, 1500, 3), trunk)


def test_named_needles_lie_anywhere_and_each_is_asked_for(prose_tokenizer):
    haystacks = Haystacks(prose_tokenizer, SEGMENT, NamedTask(needles=64), [PROSE])
    cell = Cell("novel", 9000, "spread")
    layout = haystacks.layout(cell, 0)
    ids, trial = haystacks.stream(cell, 0)
    text = prose_tokenizer.decode(ids)
    assert len(ids) == 9000
    assert len({question.answers for question in trial.questions}) == 64
    places = [text.index(statement) / len(text) for statement in trial.needles]
    for index, question in enumerate(trial.questions):
        assert question.needles == (index,)
        assert question.answers[0] in trial.needles[index]
        assert is_test_key(question.answers[0])
        # Characters are not tokens, and needles are not filler.
        assert places[index] == pytest.approx(layout.place(index), abs=0.15)
    assert np.std(places) > 0.2
    with pytest.raises(ValueError, match=r"depth=0\.5: 64 needles in a stream lie at random"):
        haystacks.layout(Cell("novel", 9000, 0.5), 0)


def test_tasks_refuse_what_they_do_not_take():
    for options, message in (
        ({"name": "nothing"}, "task='nothing': must be one of"),
        ({"name": "passkey", "needles": 2}, "needles=2: the passkey of the benchmark is alone"),
        ({"name": "named", "needles": 101}, f"must be from 1 to {len(NAMES)}"),
        ({"name": "named", "digits": 2}, "digits=2: must be from 3 to 18"),
        ({"name": "passkey", "digits": 20}, "digits=20: must be from 3 to 18"),
        ({"name": "ruler-single", "digits": 19}, "digits=19: must be from 3 to 18"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(**options)


def test_streams_longer_than_the_texts_go_on_with_them(prose_haystacks):
    ids, _ = prose_haystacks.stream(Cell("novel", 40_000, 0.5), 0)
    assert len(ids) == 40_000


def test_a_stream_too_short_for_its_needle_is_refused(prose_haystacks, prose_tokenizer):
    with pytest.raises(ValueError, match="a stream of 20 tokens has no room"):
        prose_haystacks.stream(Cell("grass", 20, 0.5), 0)
    for tokens in (SEGMENT, SEGMENT + 1):
        long = Haystacks(prose_tokenizer, 30 * SEGMENT, PasskeyTask())
        with pytest.raises(ValueError, match="the needle cannot straddle a boundary of segments of"):
            long.layout(Cell("grass", 20 * SEGMENT + tokens, "straddling"), 0)
    with pytest.raises(ValueError, match="haystack='novel': name a folder"):
        Haystacks(prose_tokenizer, SEGMENT, PasskeyTask()).stream(Cell("novel", 1000, 0.5), 0)


# Forked reading.

DEPTHS = (1.0, 0.0, 0.3, "straddling")


def batch_of(haystacks, depths=DEPTHS, tokens=333, numbers=(0, 1, 2)):
    cells = [Cell("novel", tokens, depth) for depth in depths]
    trunk = np.stack([haystacks.trunk("novel", tokens, number) for number in numbers])
    return trunk, {cell: [haystacks.layout(cell, number) for number in numbers] for cell in cells}


@pytest.mark.parametrize("task", [PasskeyTask(), NamedTask(3)], ids=["passkey", "named"])
def test_a_fork_is_the_stream_read_alone(prose_model, prose_tokenizer, task):
    """All that a cache holds, and what is answered from it, for every depth and row."""
    haystacks = Haystacks(prose_tokenizer, SEGMENT, task, [PROSE])
    trunk, batches = batch_of(haystacks, DEPTHS if task.needles == 1 else ("spread",))
    prompts = [haystacks.encode(text) for text in ("What is the key?", "The pass key is", "What is the key?")]
    met = []
    for cell, cache in read_forked(prose_model, trunk, batches, chunk_size=37):
        met.append(cell)
        answers = questions.ask(prose_model, prose_tokenizer, cache, prompts, 6)
        for row in range(3):
            ids = torch.from_numpy(haystacks.stream(cell, row)[0])[None].long()
            alone = prefill(prose_model, ids)
            assert_same_state(cache, alone, 1e-5, row=row, expected_row=0)
            assert questions.ask(prose_model, prose_tokenizer, alone, prompts[row : row + 1], 6) == [answers[row]]
    assert set(met) == set(batches)
    assert met == list(fork_points(batches))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_forks_of_a_model_with_sliding_layers_too(family, prose_haystacks):
    model = build_patched(family, segment_length=SEGMENT, overrides={"vocab_size": 320})
    trunk, batches = batch_of(prose_haystacks)
    for cell, cache in read_forked(model, trunk, batches, chunk_size=37):
        for row in range(3):
            alone = prefill(model, torch.from_numpy(prose_haystacks.stream(cell, row)[0])[None].long())
            assert_same_state(cache, alone, 1e-5, row=row, expected_row=0)


def test_what_is_shared_is_read_once(prose_model, prose_haystacks):
    trunk, batches = batch_of(prose_haystacks)
    points = list(fork_points(batches).values())
    assert points == sorted(points)
    assert points[0] == len(prose_haystacks.header)
    with tqdm(disable=True) as bar:
        counted = []
        bar.update = counted.append
        for _ in read_forked(prose_model, trunk, batches, bar, chunk_size=64):
            pass
    assert sum(counted) == tokens_to_read(batches) == 3 * (max(points) + sum(333 - point for point in points))
    assert sum(counted) < 0.7 * 3 * 333 * len(DEPTHS)
