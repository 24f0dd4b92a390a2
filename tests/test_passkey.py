"""Needles in streams: exact lengths and places, forked reading, questions under every control, runs that go on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from models import build_patched
from reading import assert_same_state
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from infini_hf import InfiniCache, InfiniConfig, patch_model, prefill
from infini_hf.cli.main import app
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.needle_tasks import NamedTask, PasskeyTask
from infini_hf.data.needles import GRASS, NAMES, PASSKEY_HEADER, is_test_key
from infini_hf.data.task_registry import make_task
from infini_hf.evaluation.needles import jobs, questions, runner
from infini_hf.evaluation.needles.forks import fork_points, read_forked, tokens_to_read
from infini_hf.evaluation.needles.report import write_report
from infini_hf.evaluation.needles.runner import describe, run_needles
from infini_hf.evaluation.needles.samples import Sample, SampleFile, merge
from infini_hf.evaluation.needles.streams import Cell, Haystacks
from infini_hf.evaluation.needles.tables import depth_table, result_table, token_table

PROSE = "".join(
    f"Chapter {n}. The house at the end of the lane had {n * 7} windows, and nobody lived there. " for n in range(200)
)
SEGMENT = 16


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROSE, GRASS, "What is the pass key? The pass key is 12345. Remember it."], vocab_size=320)


@pytest.fixture(scope="module")
def haystacks(tokenizer):
    return Haystacks(tokenizer, SEGMENT, PasskeyTask(), [PROSE])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.4, **shape)
    model = patch_model(LlamaForCausalLM(config).eval(), InfiniConfig(SEGMENT, overlap=5))
    for layer in model.model.layers:
        layer.self_attn.memory_gate.bias.data.fill_(1.0)
    return model


# Streams.


@pytest.mark.parametrize("kind", ["grass", "novel"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, "straddling"])
def test_a_stream_has_its_length_and_the_needle_at_its_depth(haystacks, tokenizer, kind, depth):
    cell = Cell(kind, 1500, depth)
    for number in range(6):
        ids, trial = haystacks.stream(cell, number)
        assert len(ids) == 1500
        key = trial.questions[0].answers[0]
        assert is_test_key(key)
        statement = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert tokenizer.decode(ids).count(statement) == 1
        needle = haystacks.encode(f"\n{statement}\n")
        start = next(i for i in range(len(ids)) if np.array_equal(ids[i : i + len(needle)], needle))
        header = len(haystacks.encode(PASSKEY_HEADER + "\n"))
        if depth == "straddling":
            boundary = -(-start // SEGMENT) * SEGMENT if start % SEGMENT else start + SEGMENT
            assert start < boundary < start + len(needle)
            assert abs(start - 750) < 200
        else:
            assert start == header + round(depth * (1500 - header - len(needle)))
            assert haystacks.layout(cell, number).place(0) == pytest.approx(depth, abs=1e-3)
    again, _ = haystacks.stream(cell, 5)
    assert np.array_equal(again, ids)


@pytest.mark.parametrize("kind", ["grass", "novel"])
def test_depths_share_their_filler_and_nothing_else(haystacks, kind):
    keys = set()
    for depth in (0.0, 0.3, 1.0, "straddling"):
        layout = haystacks.layout(Cell(kind, 1500, depth), 2)
        ids, trunk = layout.fill(haystacks.trunk(kind, 1500, 2)), haystacks.trunk(kind, 1500, 2)
        assert np.array_equal(ids[: layout.shared], trunk[: layout.shared])
        after = layout.shared + len(layout.needles[0])
        assert np.array_equal(ids[after:], trunk[layout.shared : layout.shared + 1500 - after])
        keys.add(layout.trial.questions[0].answers)
    assert len(keys) == 4
    assert not np.array_equal(haystacks.trunk(kind, 1500, 3), trunk)


def test_named_needles_lie_anywhere_and_each_is_asked_for(tokenizer):
    haystacks = Haystacks(tokenizer, SEGMENT, NamedTask(needles=64), [PROSE])
    cell = Cell("novel", 9000, "spread")
    layout = haystacks.layout(cell, 0)
    ids, trial = haystacks.stream(cell, 0)
    text = tokenizer.decode(ids)
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
        ({"name": "named", "digits": 2}, "digits=2: must be at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(**options)


def test_streams_longer_than_the_texts_go_on_with_them(haystacks):
    ids, _ = haystacks.stream(Cell("novel", 40_000, 0.5), 0)
    assert len(ids) == 40_000


def test_a_stream_too_short_for_its_needle_is_refused(haystacks, tokenizer):
    with pytest.raises(ValueError, match="a stream of 20 tokens has no room"):
        haystacks.stream(Cell("grass", 20, 0.5), 0)
    with pytest.raises(ValueError, match="haystack='novel': name a folder"):
        Haystacks(tokenizer, SEGMENT, PasskeyTask()).stream(Cell("novel", 1000, 0.5), 0)


# Forked reading.

DEPTHS = (1.0, 0.0, 0.3, "straddling")


def batch_of(haystacks, depths=DEPTHS, tokens=333, numbers=(0, 1, 2)):
    cells = [Cell("novel", tokens, depth) for depth in depths]
    trunk = np.stack([haystacks.trunk("novel", tokens, number) for number in numbers])
    return trunk, {cell: [haystacks.layout(cell, number) for number in numbers] for cell in cells}


@pytest.mark.parametrize("task", [PasskeyTask(), NamedTask(3)], ids=["passkey", "named"])
def test_a_fork_is_the_stream_read_alone(model, tokenizer, task):
    """All that a cache holds, and what is answered from it, for every depth and row."""
    haystacks = Haystacks(tokenizer, SEGMENT, task, [PROSE])
    trunk, batches = batch_of(haystacks, DEPTHS if task.needles == 1 else ("spread",))
    prompts = [haystacks.encode(text) for text in ("What is the key?", "The pass key is", "What is the key?")]
    met = []
    for cell, cache in read_forked(model, trunk, batches, chunk_size=37):
        met.append(cell)
        answers = questions.ask(model, tokenizer, cache, prompts, 6)
        for row in range(3):
            ids = torch.from_numpy(haystacks.stream(cell, row)[0])[None].long()
            alone = prefill(model, ids)
            assert_same_state(cache, alone, 1e-5, row=row, expected_row=0)
            assert questions.ask(model, tokenizer, alone, prompts[row : row + 1], 6) == [answers[row]]
    assert set(met) == set(batches)
    assert met == list(fork_points(batches))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_forks_of_a_model_with_sliding_layers_too(family, haystacks):
    model = build_patched(family, segment_length=SEGMENT, overrides={"vocab_size": 320})
    trunk, batches = batch_of(haystacks)
    for cell, cache in read_forked(model, trunk, batches, chunk_size=37):
        for row in range(3):
            alone = prefill(model, torch.from_numpy(haystacks.stream(cell, row)[0])[None].long())
            assert_same_state(cache, alone, 1e-5, row=row, expected_row=0)


def test_what_is_shared_is_read_once(model, haystacks):
    trunk, batches = batch_of(haystacks)
    points = list(fork_points(batches).values())
    assert points == sorted(points)
    assert points[0] == len(haystacks.header)
    with tqdm(disable=True) as bar:
        counted = []
        bar.update = counted.append
        for _ in read_forked(model, trunk, batches, bar, chunk_size=64):
            pass
    assert sum(counted) == tokens_to_read(batches) == 3 * (max(points) + sum(333 - point for point in points))
    assert sum(counted) < 0.7 * 3 * 333 * len(DEPTHS)


# Questions.


def test_each_control_asks_another_state(model, tokenizer, haystacks, monkeypatch, tmp_path):
    """What reaches the question: the memory, no memory through shut gates, and the memory of the row before."""
    met = []

    def note(asked, tokenizer, cache, prompts, max_new_tokens):
        met.append((asked.model.layers[0].self_attn.memory_gate.bias[0].item(), cache.infini_layers[0]))
        return ["0"] * len(prompts)

    monkeypatch.setattr(questions, "ask", note)
    cell = Cell("grass", 200, 0.5)
    layouts = {cell: [haystacks.layout(cell, n) for n in range(3)]}
    job = jobs.Job("grass", 200, [0, 1, 2], layouts, questions.ASKED_ALIKE)
    streams = torch.from_numpy(np.stack([haystacks.stream(cell, n)[0] for n in range(3)])).long()
    file = SampleFile(tmp_path / "a.jsonl", {})
    runner.NeedleRun(model, tokenizer, haystacks, file).ask(job, cell, prefill(model, streams))
    samples = file.samples
    assert [(s.control, s.number) for s in samples] == [(c, n) for c in questions.ASKED_ALIKE for n in range(3)]
    alone = [prefill(model, streams[row : row + 1]).infini_layers[0] for row in range(3)]
    for (gate, layer), control in zip(met, questions.ASKED_ALIKE, strict=True):
        assert gate == (0.0 if control == "closed" else 1.0)
        for row in range(3):
            past = alone[row - 1 if control == "other" else row]
            for actual, expected in (
                (layer.memory, past.memory),
                (layer.memory_norm, past.memory_norm),
                (layer.keys, alone[row].keys),
            ):
                torch.testing.assert_close(actual[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0].memory, alone[1].memory, rtol=1e-2)


def test_asking_leaves_the_cache_as_it_was(model, tokenizer):
    cache = prefill(model, torch.randint(0, 300, (2, 40)), cache=InfiniCache(model.config))
    before = cache.tensors()
    prompts = [np.arange(3, 8, dtype=np.int32), np.arange(3, 6, dtype=np.int32)]
    for control in questions.ASKED_ALIKE:
        questions.ask_with(control, model, tokenizer, cache, prompts, 3)
    assert all(one is two for one, two in zip(cache.tensors(), before, strict=True))


# Files.


def test_a_run_goes_on_where_it_was_cut(model, tokenizer, haystacks, tmp_path, monkeypatch):
    cells = [Cell("grass", 200, depth) for depth in (0.0, "straddling")]
    about = describe(model, haystacks)

    def run(path, **options):
        file = SampleFile(path, about)
        run_needles(model, tokenizer, cells, range(3), haystacks, file, progress=False, **options)
        return SampleFile(path, about).samples

    whole = run(tmp_path / "a.jsonl")
    assert len(whole) == 2 * 3 * 3
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    # The last cell is gone, but for two samples and a line that a kill cut short.
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:12]) + "\n" + lines[12][:20])
    read, original = [], runner.read_forked
    monkeypatch.setattr(runner, "read_forked", lambda *args: read.extend(args[2]) or original(*args))
    again = run(tmp_path / "b.jsonl")
    assert read == cells[1:]
    assert sorted(map(str, again)) == sorted(map(str, whole))
    read.clear()
    assert run(tmp_path / "b.jsonl") == again
    assert read == []
    assert run(tmp_path / "b.jsonl", controls=("memory", "closed")) == again


def test_a_batch_that_would_be_alone_takes_one_more():
    assert jobs.batches_of(range(17), 8) == [[*range(8)], [*range(8, 15)], [15, 16]]
    assert jobs.batches_of([5], 8) == [[5]]
    assert jobs.batches_of(range(3), 1) == [[0], [1], [2]]


def test_a_file_of_another_evaluation_is_refused(model, tokenizer, haystacks, tmp_path):
    about, path = describe(model, haystacks), tmp_path / "a.jsonl"
    file = SampleFile(path, about)
    run_needles(model, tokenizer, [Cell("grass", 150, 0.5)], range(2), haystacks, file, ("memory",), progress=False)
    layer = model.model.layers[0].self_attn.memory_gate
    other = {
        "seed 0 there and 1 here": describe(model, Haystacks(tokenizer, SEGMENT, PasskeyTask(), [PROSE], seed=1)),
        "task.digits 5 there and 6 here": describe(model, Haystacks(tokenizer, SEGMENT, PasskeyTask(6), [PROSE])),
        "texts .* there and None here": describe(model, Haystacks(tokenizer, SEGMENT, PasskeyTask())),
        "patch.overlap 5 there and 0 here": {**about, "patch": {**about["patch"], "overlap": 0}},
    }
    layer.bias.data.fill_(0.5)
    other["weights "] = describe(model, haystacks)
    layer.bias.data.fill_(1.0)
    for message, theirs in other.items():
        with pytest.raises(ValueError, match=message):
            SampleFile(path, theirs)
    assert SampleFile(path, describe(model, haystacks)).samples == file.samples
    (tmp_path / "old.jsonl").write_text(json.dumps({"haystack": "grass"}) + "\n")
    with pytest.raises(ValueError, match="does not begin with what it is about"):
        SampleFile(tmp_path / "old.jsonl", about)


# Tables and figures.


def sample(depth=0.5, found=1, control="memory", number=0, tokens=4096, haystack="grass", place=0.5):
    return Sample(haystack, tokens, depth, number, 0, place, control, ("12345",), "12345" if found else "", found)


def test_files_of_two_processes_make_one_table(tmp_path):
    one = SampleFile(tmp_path / "a.jsonl", {"seed": 0})
    one.append([sample(number=n, found=n % 2) for n in range(4)])
    two = SampleFile(tmp_path / "b.jsonl", {"seed": 0})
    two.append([sample(number=n) for n in range(2, 6)])
    about, samples = merge([one.path, two.path])
    assert about == {"seed": 0}
    # Numbers 2 and 3 are in both files and count once, as the first has them.
    assert result_table(samples)[2:] == ["| grass | 4,096 | memory | 4 of 6 | **0.67** | 0.30–0.90 |"]
    SampleFile(tmp_path / "c.jsonl", {"seed": 1}).append([sample()])
    with pytest.raises(ValueError, match=r"c\.jsonl: holds another evaluation \(seed 1 there and 0 here\)"):
        merge([one.path, tmp_path / "c.jsonl"])


def test_token_accuracy_counts_digits_in_their_place():
    def answered(depth, text, **options):
        return replace(sample(depth, **options), answered=text)

    samples = [answered(0.0, "12345"), answered(0.0, "12354", number=1), answered(0.5, "2345"), answered(1.0, "")]
    # Of five digits each: ten of which eight, one that moved all digits by a place, none at all.
    assert token_table(samples)[2:] == ["| grass, memory | 80/0/0 |"]
    assert token_table([*samples, answered(0.5, "123456", number=1)])[2:] == ["| grass, memory | 80/50/0 |"]
    # The three depths of the paper or nothing.
    assert token_table(samples[:3]) == []


def test_tables_count_values_by_depth_and_length():
    samples = [
        sample(0.0, 1),
        sample("straddling", 0),
        sample(1.0, 0),
        sample(1.0, 1, number=1),
        sample(0.0, 1, tokens=32768),
        sample(0.0, 0, "closed"),
        # Needles that lie at random count in the nearest tenth.
        sample("spread", 1, haystack="novel", place=0.34),
    ]
    assert depth_table(samples) == [
        "| grass, memory: depth | 4k | 32k |",
        "|---|---|---|",
        "| 0.0 | 1 of 1 | 1 of 1 |",
        "| 1.0 | 1 of 2 | – |",
        "| straddling | 0 of 1 | – |",
        "",
        "| novel, memory: depth | 4k |",
        "|---|---|",
        "| 0.3 | 1 of 1 |",
    ]
    assert len(result_table(samples)) == 2 + 4
    two = replace(sample(), expected=("1", "2", "3"), found=2)
    assert "2 of 3" in result_table([two])[2]


def test_a_report_is_written_beside_the_samples(tmp_path):
    pytest.importorskip("matplotlib")
    samples = [sample(depth, control=control) for depth in (0.0, 1.0) for control in ("memory", "closed")]
    lines, note = write_report(samples, tmp_path / "a.jsonl", "name")
    assert (tmp_path / "a.md").read_text().splitlines() == ["# name", "", *lines]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "a.png") in note


def test_a_report_of_baselines_alone_is_one_too(tmp_path):
    pytest.importorskip("matplotlib")
    lines, _ = write_report([sample(control="txl")], tmp_path / "a.jsonl")
    assert len(lines) == 4
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(ValueError, match="no samples: the controls asked for need more than one stream"):
        write_report([], tmp_path / "b.jsonl")


def test_without_matplotlib_the_tables_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    _, note = write_report([sample()], tmp_path / "a.jsonl")
    assert (tmp_path / "a.md").is_file()
    assert "pip install infini_hf[plot]" in note


# The command.


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_writes_its_samples_and_prints_the_table(tmp_path):
    patch = ["--segment-length", "64", "--device", "cpu", "--dtype", "float32"]
    arguments = ["passkey", "tiny-llama", "--depths", "0.5,straddling", "--samples", "2", *patch]
    done = invoke(*arguments, "--lengths", "300", "--output", tmp_path / "p.jsonl")
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 1 + 2 * 2 * 3
    assert "| grass | 300 | memory |" in done.output
    assert "fit in one local window" not in done.output
    assert (tmp_path / "p.md").is_file()
    # The same evaluation in another file, of other streams.
    more = [*arguments, "--lengths", "300,64", "--first", "2", "--output", tmp_path / "q.jsonl"]
    refused = invoke(*more)
    assert "no room" in str(refused.exception)
    more[more.index("300,64")] = "300"
    assert invoke(*more).exit_code == 0
    both = invoke("tables", tmp_path / "p.jsonl", tmp_path / "q.jsonl", "--output", tmp_path / "both")
    assert both.exit_code == 0, both.output
    assert both.output.count(" of 8 ") == 3
    assert (tmp_path / "both.md").is_file()
    again = invoke(*arguments, "--lengths", "300", "--output", tmp_path / "p.jsonl", "--seed", "1")
    assert "seed 0 there and 1 here" in str(again.exception)


def test_a_length_that_fits_the_window_is_said(tmp_path):
    arguments = ["--segment-length", "256", "--overlap", "32", "--samples", "1", "--depths", "0.5", "--device", "cpu"]
    done = invoke("passkey", "tiny-llama", "--lengths", "280", "--output", tmp_path / "p.jsonl", *arguments)
    assert done.exit_code == 0, done.output
    assert "note: 280 tokens fit in one local window of 288" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "2"], "--depths 2: must be between 0 and 1"),
        (["--depths", "deep"], "--depths 'deep': give numbers"),
        (["--lengths", "4q"], "--lengths '4q': give numbers"),
        (["--lengths", "0"], "--lengths '0': give numbers"),
        (["--controls", "memory,closd"], "--controls 'closd': must be of memory"),
        (["--task", "passkey", "--values", "words"], "values='words': the task 'passkey' has none to choose"),
        (["--fillers", "sand"], "--fillers 'sand': must be of grass, novel, needles"),
        (["--fillers", "novel"], "--fillers novel: name a folder of texts"),
        (["--fillers", "needles"], "--fillers needles: the task passkey has none"),
        (["--task", "key"], "task='key': must be one of"),
        (["--task", "named", "--depths", "0.5"], "--depths 0.5: 8 needles in a stream lie at random"),
        ([], "tiny-llama: is not patched; name a patched checkpoint, or give --segment-length"),
    ],
)
def test_refusals_come_before_any_reading(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused = invoke("passkey", "tiny-llama", *arguments)
    assert isinstance(refused.exception, ValueError)
    assert message in str(refused.exception)


def test_the_page_lists_the_options_of_the_command():
    page = (Path(__file__).parent.parent / "docs" / "needles.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(--[\w-]+)`.*? \| (.*?) \|", page, flags=re.MULTILINE))
    parameters = typer.main.get_command(app).commands["passkey"].params
    options = {p.opts[0]: p.default for p in parameters if p.param_type_name == "option" and p.name != "help"}
    assert {*shown, "--device", "--threads"} == {*options, "--task"}
    for name, default in shown.items():
        if re.fullmatch(r"\d+|passkey\S*", default):
            assert str(options[name]) == default, name
