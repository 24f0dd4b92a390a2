"""RULER's needle tasks: what is hidden, what counts as found, distractors that answer nothing, and the baselines."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models import build_patched
from typer.testing import CliRunner

from infini_hf import prefill
from infini_hf.cli.main import app
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.needles import GRASS, is_test_key
from infini_hf.data.ruler_tasks import KINDS, RulerTask
from infini_hf.evaluation.controls import closed_memory, local_attention
from infini_hf.evaluation.needles import questions
from infini_hf.evaluation.needles.runner import describe, run_needles
from infini_hf.evaluation.needles.samples import SampleFile
from infini_hf.evaluation.needles.streams import Cell, Haystacks
from infini_hf.evaluation.needles.tables import result_table

SEGMENT = 16
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def tokenizer():
    # As many tokens as the tiny model has.
    return train_tokenizer([GRASS], vocab_size=300)


@pytest.fixture(scope="module")
def model():
    return build_patched(segment_length=SEGMENT, overlap=5, overrides={"vocab_size": 300, "eos_token_id": 0})


def draw(seed=0, **options):
    return RulerTask(**options).draw(np.random.default_rng(seed))


def test_every_kind_asks_for_what_it_says():
    for kind, needles in KINDS.items():
        trial = draw(kind=kind)
        (question,) = trial.questions
        assert len(trial.needles) == needles
        asked = needles if kind in ("multivalue", "multiquery") else 1
        assert len(set(question.answers)) == asked
        for answer, needle in zip(question.answers, question.needles, strict=True):
            assert trial.needles[needle].endswith(f"is: {answer}.")
        keys = [re.search(r"for ([a-z]+-[a-z]+) is:", needle)[1] for needle in trial.needles]
        assert len(set(keys)) == (1 if kind == "multivalue" else needles)
        named = [key for key in dict.fromkeys(keys) if key in question.prompt]
        assert named == keys[: 1 if kind in ("multikey", "multivalue") else needles]
        assert question.prompt.endswith(" is" if asked == 1 else " are")
        assert not any(answer in question.prompt for answer in question.answers)


@pytest.mark.parametrize(("kind", "form"), [("numbers", r"\d{7}"), ("words", r"[a-z]+-[a-z]+"), ("uuids", UUID)])
def test_values_have_their_form_and_are_of_the_test_part(kind, form):
    for seed in range(20):
        (answer,) = draw(seed, values=kind, digits=7).questions[0].answers
        assert re.fullmatch(form, answer)
        assert kind == "uuids" or is_test_key(answer)
    assert re.search(f"for {UUID} is", draw(keys="uuids").needles[0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 12345.", 2),
        (" 12345, 67890 and", 2),
        (" 67890\n\n12345", 2),
        (" 912345 and 67890", 1),
        (" 12345-67890", 0),
        (" 12345.67 and 3,67890", 0),
        (" 12345,67890", 0),
        ("", 0),
    ],
)
def test_a_value_counts_wherever_it_stands_as_a_whole(text, found):
    answers = ("12345",) if text == " 12345." else ("12345", "67890")
    assert RulerTask().judge(text, answers)[1] == min(found, len(answers))


def test_values_out_of_range_are_refused():
    for options, message in (
        ({"kind": "many"}, "kind='many': must be one of 'single'"),
        ({"keys": "names"}, "keys='names'"),
        ({"values": "keys"}, "values='keys'"),
        ({"needles": 2}, "needles=2: must be from 1 to 1 for the kind 'single'"),
        ({"kind": "multikey", "needles": 65}, "must be from 1 to 64"),
        ({"digits": 1}, "digits=1"),
    ):
        with pytest.raises(ValueError, match=message):
            RulerTask(**options)


@pytest.mark.parametrize("keys", ["words", "uuids"])
def test_a_haystack_of_needles_answers_nothing(tokenizer, keys):
    task = RulerTask("multikey", 4, keys)
    haystacks = Haystacks(tokenizer, SEGMENT, task)
    cell = Cell("needles", 20_000, "spread")
    ids, trial = haystacks.stream(cell, 0)
    assert len(ids) == 20_000
    text = tokenizer.decode(ids)
    assert len(re.findall("One of the special magic numbers for ", text)) > 50
    for needle in trial.needles:
        key, value = re.search(r"for (.*) is: (.*)\.", needle).groups()
        assert text.count(needle) == 1
        assert len(re.findall(rf"(?<![\w-]){key}(?![\w-])", text)) == 1
        assert len(re.findall(rf"(?<![\w-]){value}(?![\w-])", text)) == 1
    assert np.array_equal(haystacks.trunk("needles", 500, 0), haystacks.trunk("needles", 500, 0))
    assert not np.array_equal(haystacks.trunk("needles", 500, 0), haystacks.trunk("needles", 500, 1))


def test_values_found_are_counted_one_by_one(model, tokenizer, tmp_path, monkeypatch):
    """A model that knows half of the values has half of the table."""
    haystacks = Haystacks(tokenizer, SEGMENT, RulerTask("multivalue", 4))
    cell = Cell("grass", 1200, "spread")
    known = [haystacks.layout(cell, number).trial.questions[0].answers for number in range(3)]
    monkeypatch.setattr(questions, "ask", lambda *args: [f" {a[2]}, 1 and {a[0]}" for a in known])
    file = SampleFile(tmp_path / "a.jsonl", describe(model, haystacks))
    run_needles(model, tokenizer, [cell], range(3), haystacks, file, ("memory",), progress=False)
    assert [sample.expected for sample in file.samples] == known
    assert [sample.found for sample in file.samples] == [2, 2, 2]
    assert "| 6 of 12 | **0.50** |" in result_table(file.samples)[2]


def test_baselines_answer_as_if_they_had_read_everything(model, tokenizer, tmp_path):
    haystacks = Haystacks(tokenizer, SEGMENT, RulerTask(values="words"))
    cells = [Cell("grass", tokens, depth) for tokens in (530, 700) for depth in (0.0, 1.0)]
    file = SampleFile(tmp_path / "a.jsonl", describe(model, haystacks))
    ways = ("memory", "window", "local", "txl", "full")
    run_needles(model, tokenizer, cells, range(2), haystacks, file, ways, full_up_to=600, progress=False)
    assert {(s.tokens, s.control) for s in file.samples} == {(530, w) for w in ways} | {(700, w) for w in ways[:-1]}
    told = {}
    for sample in file.samples:
        ids, trial = haystacks.stream(sample.cell, sample.number)
        prompts = [haystacks.encode("\n" + trial.questions[0].prompt)]
        reading = {
            "memory": nullcontext(),
            "window": closed_memory(model),
            "local": local_attention(model),
            "txl": local_attention(model, overlap=SEGMENT),
            "full": local_attention(model, segment_length=1000),
        }
        ids = torch.from_numpy(ids)[None].long()
        with reading[sample.control]:
            texts = questions.ask(model, tokenizer, prefill(model, ids), prompts, haystacks.task.answer_tokens)
        assert sample.answered == haystacks.task.judge(texts[0], sample.expected)[0]
        told.setdefault((sample.cell, sample.number), []).append(sample.answered)
    # They are different models.
    assert any(len(set(answers)) > 2 for answers in told.values())
    # Nothing is asked twice.
    lines = file.path.read_text()
    run_needles(model, tokenizer, cells, range(2), haystacks, file, ways, full_up_to=600, progress=False)
    assert file.path.read_text() == lines


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_runs_every_kind(kind, tmp_path):
    command = ["passkey", "tiny-llama", "--task", f"ruler-{kind}", "--lengths", "600", "--samples", "1"]
    command += ["--fillers", "needles", "--segment-length", "128", "--device", "cpu", "--dtype", "float32"]
    command += ["--controls", "memory,local", "--output", str(tmp_path / "r.jsonl"), "--values", "words"]
    done = CliRunner().invoke(app, command + (["--depths", "0.5"] if kind == "single" else []))
    assert done.exit_code == 0, done.output
    assert "| needles | 600 | memory |" in done.output
    assert "| needles | 600 | local |" in done.output
