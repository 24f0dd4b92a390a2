"""How a program ends: 2 and one line after a refusal, 130 after Ctrl-C, and a traceback of what is a bug."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_scripts import script
from transformers import AutoConfig

from infini_hf import InfiniConfig
from infini_hf.assets import resolve, shipped
from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.documents import load_documents
from infini_hf.data.memory_row_style import MemoryRowStyle
from infini_hf.data.packing import pack_documents
from infini_hf.gate import MemoryGate

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "pretrain" / "tiny_cpu.yaml")


def ended(main, capsys):
    """The exit code of a program, and the one line that it left on stderr behind its progress bars."""
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    lines = capsys.readouterr().err.strip().splitlines()
    said = lines.pop()
    assert all("%|" in line or "examples" in line for line in lines), lines
    return stopped.value.code, said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required: --model, --train_source"),
        (["--config", TINY.replace("tiny_cpu", "tiny_cpv")], "tiny_cpu.yaml or "),
        (["--config", TINY, "--max_stpes", "3"], "unknown option --max_stpes (did you mean --max_steps"),
        (["--config", TINY, "--max-stpes=3"], "unknown option --max-stpes (did you mean --max_steps"),
        (["--config", TINY, "--max_steps", "three"], "invalid int value: 'three'"),
        (["--config", TINY, "more"], "'more': belongs to no option"),
        (["--config"], "expected one argument"),
        (["--config", TINY, "--bptt_segments", "0"], "bptt_segments"),
        (["--config", TINY, "--eval_strategy", "sometimes"], "sometimes"),
        (["--config", TINY, "--model", "tiny-lama"], "(did you mean tiny-llama"),
        (["--config", TINY, "--train_source", "novels/trian"], "novels/trian"),
        (["--config", TINY, "--segment_length", "0"], "segment_length=0: must be at least 1"),
    ],
)
def test_a_refusal_of_a_script_is_one_line(options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = ended(lambda: script("pretrain").main(options), capsys)
    assert code == 2
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [1\n", "is not YAML: expected ',' or ']'"),
        ("model\n", "holds str; write options"),
        ("modell: tiny-llama\n", "unknown options 'modell' (did you mean model?)"),
        ("1: tiny-llama\n", "unknown options '1'; see --help"),
    ],
)
def test_a_config_that_is_broken_is_named(text, said, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    code, line = ended(lambda: parse_arguments((ModelArguments,), "", ["--config", str(path)]), capsys)
    assert code == 2
    assert line.startswith(f"error: --config {path}: ")
    assert said in line


def test_numbers_that_slow_a_cpu_down_are_zero_while_a_script_runs():
    """And not in the process that called it, which may be the user's own."""
    small, found = torch.full((64,), 1e-30), []
    run_script(lambda: found.append((small * 1e-10).count_nonzero().item()))
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU knows no such mode")
    assert found == [0]
    assert (small * 1e-10).count_nonzero() == 64


@pytest.mark.parametrize("option", ["feature_map: softmax", "overlap: 0", "gate: sigmoid"])
def test_a_part_of_a_patch_is_not_dropped(option, tmp_path):
    """It was, where segment_length was left out: another memory was trained than the one asked for."""
    path = tmp_path / "part.yaml"
    path.write_text(f"model: tiny-llama\n{option}\n", encoding="utf-8")
    (args,) = parse_arguments((ModelArguments,), "", ["--config", str(path)])
    name, _, value = option.partition(": ")
    with pytest.raises(ValueError, match=rf"^{name}='?{value}'? without segment_length"):
        args.load()
    (args,) = parse_arguments((ModelArguments,), "", ["--config", str(path), "--segment_length", "64"])
    patch = args.infini_config()
    assert (patch.segment_length, str(getattr(patch, name))) == (64, value)
    (args,) = parse_arguments((ModelArguments,), "", ["--model", "tiny-llama-infini"])
    assert args.infini_config() is None


@pytest.mark.parametrize("option", [{"segment_length": 256}, {"overlap": 8}, {"segment_length": 96, "overlap": 0}])
def test_of_a_patched_checkpoint_only_what_is_asked_for_changes(option):
    """--segment_length alone took the feature map of the checkpoint away, for the default of a first patch."""
    words = [word for name, value in option.items() for word in (f"--{name}", str(value))]
    (args,) = parse_arguments((ModelArguments,), "", ["--model", "tiny-llama-infini", *words])
    stored = infini_config_of(AutoConfig.from_pretrained(resolve("tiny-llama-infini")))
    assert stored.feature_map != InfiniConfig().feature_map
    model, _ = args.load()
    assert infini_config_of(model.config) == dataclasses.replace(stored, **option) != stored
    assert all(module.bias.count_nonzero() for module in model.modules() if isinstance(module, MemoryGate))


def test_a_config_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"wrong\.yaml: is not YAML"):
        parse_arguments((ModelArguments,), "", ["--config", str(path)])


def refuse_in_a_map(folder):
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")
    load_documents(folder, streaming=False)


@pytest.mark.parametrize(
    "main",
    [
        lambda folder: InfiniConfig(segment_length=0),
        lambda folder: (folder / "nothing").read_text(),
        lambda folder: pack_documents("text", None, 8, 2),
        refuse_in_a_map,
    ],
)
def test_refusals_come_from_this_project_and_from_the_system(main, tmp_path, capsys):
    assert ended(lambda: main(tmp_path), capsys)[0] == 2


@pytest.mark.parametrize(
    "main",
    [
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: int("five"),
        lambda: json.loads(""),
        lambda: ModelArguments("tiny-llama").nothing,
        lambda: argparse.ArgumentParser().add_argument(1, 2),
        # A built-in function fails in a line of this package.
        lambda: InfiniConfig.from_dict(5),
    ],
)
def test_a_bug_keeps_its_traceback(main):
    with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError)):
        run_script(main)


@pytest.mark.parametrize(("words", "said"), [((), "stopped"), (("stopped after 3 steps",), "stopped after 3 steps")])
def test_after_an_interruption_one_line_says_how_to_go_on(words, said, capsys):
    def main():
        raise KeyboardInterrupt(*words)

    assert ended(main, capsys) == (130, said)


def test_help_keeps_the_examples_and_shows_defaults_and_what_is_required(capsys):
    description = "What it does.\n\n    python scripts/one.py --model MODEL \\\n        --dtype float32"
    with pytest.raises(SystemExit):
        parse_arguments((ModelArguments,), description, ["--help"])
    shown = capsys.readouterr().out
    assert description in shown
    assert f"({', '.join(shipped())}) (required)" in " ".join(shown.split())
    assert "(default: auto)" in " ".join(shown.split())
    assert "default: None" not in shown


def test_help_takes_what_docstrings_say_of_options_without_a_text(capsys):
    @dataclasses.dataclass(frozen=True)
    class Options(MemoryRowStyle):
        """The rows: see there."""

        depth: int = dataclasses.field(default=1, metadata={"help": "how deep"})

    with pytest.raises(SystemExit):
        parse_arguments((Options,), "", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "how deep (default: 1)" in shown
    # Of two lines, and the last of its docstring.
    assert "the full stop after an answer counts as its last token. Keys of one length end where they always" in shown
    assert "their lengths are log-uniform from the longest row on. (default: 65536)" in shown
