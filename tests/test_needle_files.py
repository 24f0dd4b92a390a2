"""What an evaluation leaves: files of samples, tables and figures, and the command that writes them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from models import build_patched, open_gates
from peft import get_peft_model
from prose import PROSE, SEGMENT
from transformers import AutoTokenizer
from typer.testing import CliRunner

from infini_hf import AutoInfiniModelForCausalLM, InfiniConfig
from infini_hf.assets import resolve
from infini_hf.cli.main import app
from infini_hf.data.needle_tasks import PasskeyTask
from infini_hf.evaluation.needles.report import write_report
from infini_hf.evaluation.needles.runner import describe, run_needles
from infini_hf.evaluation.needles.samples import Sample, SampleFile, merge
from infini_hf.evaluation.needles.streams import DEPTHS, Cell, Haystacks
from infini_hf.evaluation.needles.tables import depth_table, result_table, token_table
from infini_hf.evaluation.reader import reader_of
from infini_hf.lora import lora_config


def test_a_file_of_another_evaluation_is_refused(prose_model, prose_tokenizer, prose_haystacks, tmp_path):
    about, path = describe(prose_model, prose_haystacks), tmp_path / "a.jsonl"
    file = SampleFile(path, about)
    run_needles(
        prose_model,
        prose_tokenizer,
        [Cell("grass", 150, 0.5)],
        range(2),
        prose_haystacks,
        file,
        ("memory",),
        progress=False,
    )
    layer = prose_model.model.layers[0].self_attn.memory_gate
    other = {
        "seed 0 there and 1 here": describe(
            prose_model, Haystacks(prose_tokenizer, SEGMENT, PasskeyTask(), [PROSE], seed=1)
        ),
        "task.digits 5 there and 6 here": describe(
            prose_model, Haystacks(prose_tokenizer, SEGMENT, PasskeyTask(6), [PROSE])
        ),
        "texts .* there and None here": describe(prose_model, Haystacks(prose_tokenizer, SEGMENT, PasskeyTask())),
        "patch.overlap 5 there and 0 here": {**about, "patch": {**about["patch"], "overlap": 0}},
    }
    layer.bias.data.fill_(0.5)
    other["weights "] = describe(prose_model, prose_haystacks)
    layer.bias.data.fill_(1.0)
    for message, theirs in other.items():
        with pytest.raises(ValueError, match=message):
            SampleFile(path, theirs)
    assert SampleFile(path, describe(prose_model, prose_haystacks)).samples == file.samples
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.jsonl: is no text"):
        SampleFile(tmp_path / "binary.jsonl")
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


def test_grass_alone_goes_with_novels_of_any_texts(tmp_path):
    for name, texts, kind in (("a", None, "grass"), ("b", "x", "novel"), ("c", None, "grass"), ("d", "y", "novel")):
        SampleFile(tmp_path / f"{name}.jsonl", {"seed": 0, "texts": texts}).append(
            [sample(haystack=kind, number=ord(name))]
        )
    about, samples = merge([tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"])
    assert (about["texts"], len(samples)) == ("x", 3)
    with pytest.raises(ValueError, match=r"d\.jsonl: holds another evaluation \(texts y there and x here\)"):
        merge([tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "d.jsonl"])


def test_what_answers_beside_the_decoder_belongs_to_an_evaluation():
    tied, own = (build_patched("llama", overrides={"tie_word_embeddings": tie}) for tie in (True, False))
    assert reader_of(tied).keys() == {"model", "patch", "weights"}
    before = reader_of(own)
    with torch.no_grad():
        own.lm_head.weight[0, 0] += 1
    after = reader_of(own)
    assert before.keys() == after.keys() == {"model", "patch", "weights", "head"}
    assert [name for name in before if before[name] != after[name]] == ["head"]
    tied.generation_config.repetition_penalty = 1.5
    assert reader_of(tied)["decoding"] == {"repetition_penalty": 1.5}


def test_token_accuracy_counts_digits_in_their_place():
    def answered(depth, text, **options):
        return replace(sample(depth, **options), answered=text)

    samples = [answered(0.0, "12345"), answered(0.0, "12354", number=1), answered(0.5, "2345"), answered(1.0, "")]
    # Of five digits each: ten of which eight, one that moved all digits by a place, none at all.
    assert token_table(samples)[2:] == ["| grass, memory | 80/0/0 |"]
    assert token_table([*samples, answered(0.5, "123456", number=1)])[2:] == ["| grass, memory | 80/50/0 |"]
    # The three depths of the paper or nothing.
    assert token_table(samples[:3]) == []
    # The text around a number is no digit out of place, and a word has no digits.
    said = [replace(row, answered=f"is {row.answered}.") for row in samples]
    assert token_table(said) == token_table(samples)
    assert token_table([replace(row, expected=("amber",), answered="amber") for row in samples]) == []


def test_a_line_that_lost_its_end_alone_is_whole(tmp_path):
    """As a kill between a line and its newline leaves it: nothing is written behind it on the same line."""
    file = SampleFile(tmp_path / "a.jsonl", {"seed": 0})
    file.append([sample(number=n) for n in range(2)])
    file.path.write_text(file.path.read_text().removesuffix("\n"))
    SampleFile(file.path).append([sample(number=2)])
    assert [row.number for row in SampleFile(file.path).samples] == [0, 1, 2]


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


def test_names_with_a_dot_keep_reports_of_their_own(tmp_path):
    for name in ("llama-3.1", "llama-3.2", "plain"):
        write_report([sample()], tmp_path / name, name)
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}")
    assert (tmp_path / "llama-3.1.md").read_text().startswith("# llama-3.1")


def test_a_report_of_baselines_alone_is_one_too(tmp_path):
    pytest.importorskip("matplotlib")
    lines, _ = write_report([sample(control="txl")], tmp_path / "a.jsonl")
    assert len(lines) == 3
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(ValueError, match="no samples: the controls asked for need more than one stream"):
        write_report([], tmp_path / "b.jsonl")


def test_full_attention_beyond_the_positions_of_the_model_is_noted(tmp_path):
    samples = [sample(control="full", tokens=tokens) for tokens in (512, 640, 4096)] + [sample(tokens=32768)]
    about = {"model": {"max_position_embeddings": 640}}
    lines, _ = write_report(samples, tmp_path / "a.jsonl", about=about)
    assert lines[-1].startswith("note: `full` at 640, 4,096 tokens reads beyond the 640 positions")
    assert lines[-1] in (tmp_path / "a.md").read_text()
    for known in ({"model": {"max_position_embeddings": 8192}}, None):
        assert "note" not in "".join(write_report(samples, tmp_path / "a.jsonl", about=known)[0])


def test_without_matplotlib_the_tables_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    _, note = write_report([sample()], tmp_path / "a.jsonl")
    assert (tmp_path / "a.md").is_file()
    assert "pip install matplotlib" in note


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


def test_an_adapter_is_asked_as_the_merged_model_is(tmp_path):
    base = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama"), InfiniConfig(64), dtype=torch.float32)
    options = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"]}
    model = get_peft_model(open_gates(base), lora_config(base, **options))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(resolve("tiny-llama")).save_pretrained(tmp_path / "merged")
    options = ["--lengths", "300", "--depths", "0.5", "--samples", "1", "--device", "cpu", "--dtype", "float32"]
    adapter = ["--adapter", tmp_path / "adapter"]
    done = invoke("passkey", "tiny-llama", *adapter, *options, "--output", tmp_path / "p.jsonl")
    assert done.exit_code == 0, done.output
    before = (tmp_path / "p.jsonl").read_text()
    # A file goes on with the same weights only, and has every sample.
    assert invoke("passkey", tmp_path / "merged", *options, "--output", tmp_path / "p.jsonl").exit_code == 0
    assert (tmp_path / "p.jsonl").read_text() == before
    other = invoke("passkey", "tiny-llama", *adapter, *options, "--segment-length", "32")
    assert "was trained with 64, and an adapter brings its own patch" in str(other.exception)


def test_a_length_that_fits_the_window_is_said(tmp_path):
    arguments = ["--segment-length", "256", "--overlap", "32", "--samples", "1", "--depths", "0.5", "--device", "cpu"]
    done = invoke("passkey", "tiny-llama", "--lengths", "280", "--output", tmp_path / "p.jsonl", *arguments)
    assert done.exit_code == 0, done.output
    assert "note: 280 tokens fit in one local window of 288" in done.output
    assert "note: a stream alone in its batch" in done.output
    # Nobody asked for a depth that such a stream does not have.
    arguments = [part for part in arguments if part not in ("--depths", "0.5")]
    options = ["--lengths", "250", "--controls", "memory", "--output", tmp_path / "all.jsonl"]
    done = invoke("passkey", "tiny-llama", *options, *arguments)
    assert done.exit_code == 0, done.output
    assert "note: in 250 tokens not every needle can straddle a boundary: that depth is left out" in done.output
    assert {found.depth for found in SampleFile(tmp_path / "all.jsonl").samples} == set(DEPTHS)


PATCH = ["--segment-length", "64", "--device", "cpu"]


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
        (["--output", "."], "output='.': is a folder"),
        (["--output", "run.md"], "output='run.md': a .md file is written beside the output"),
        (["--output", "run.png"], "output='run.png': a .png file is written beside the output"),
        (["--task", "named", "--needles", "98", "--digits", "3", *PATCH], "98 different values were asked for, and"),
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
