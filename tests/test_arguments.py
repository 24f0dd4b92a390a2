"""Options of the scripts: a value of a YAML file is taken, or refused, as if it had been typed."""

from dataclasses import dataclass, field

import pytest

from infini_hf import InfiniTrainingArguments
from infini_hf.assets import resolve
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.script_arguments import LoraArguments, ModelArguments

KINDS = (ModelArguments, LoraArguments, InfiniTrainingArguments)


@dataclass
class Lists:
    """Options that take several words."""

    source: str = field(metadata={"help": "a name"})
    ways: list[str] = field(default_factory=lambda: ["memory"])
    layers: list[int] | None = None


def parsed(tmp_path, text, kinds=KINDS, *words):
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    given = ["--model", "tiny-llama", "--use_cpu"] if kinds is KINDS else []
    return parse_arguments(kinds, "", ["--config", str(path), *given, *words])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bptt_segments: 1.5", "bptt_segments=1.5: invalid int value: '1.5'"),
        ("max_steps: true", "max_steps=True: invalid int value: 'true'"),
        ("max_steps: 2.0", "max_steps=2.0: invalid int value: '2.0'"),
        ("per_device_train_batch_size: 2.0", "per_device_train_batch_size=2.0: invalid int value"),
        ("lora_r: 2.0", "lora_r=2.0: invalid int value"),
        ("lora_r: [2]", r"lora_r=\[2\]: must be a word or a number"),
        ("learning_rate: yes", "learning_rate=True: invalid float value: 'true'"),
        ("retrieval_layers: [1, two]", r"retrieval_layers=\[1, 'two'\]: invalid int value: 'two'"),
        ("retrieval_layers: [1, null]", r"retrieval_layers=\[1, None\]: must be a word or a number"),
        ("save_strategy: sometimes", "save_strategy='sometimes': invalid choice: 'sometimes'"),
        ("save_strategy: yes", "save_strategy=True: invalid choice: 'true'"),
        ("bf16: perhaps", "bf16='perhaps': Truthy value expected"),
        ("run_name: no", "run_name=False: is how YAML reads a bare yes, no, on or off; put the word in quotes"),
    ],
)
def test_a_value_that_nobody_could_type_is_refused_with_file_and_key(tmp_path, line, said):
    with pytest.raises(ValueError, match=rf"--config .*options\.yaml: {said}.*; see --help"):
        parsed(tmp_path, line)


def test_values_are_what_they_would_be_on_the_command_line(tmp_path):
    lines = ["save_strategy: no", "eval_strategy: no", "retrieval_layers: 1", "learning_rate: 1e-4", "max_steps: '7'"]
    lines += ["run_name: 12e4567", "bf16_full_eval: no", "max_grad_norm: 1", "bptt_segments: null", "logging_steps: 5"]
    _, lora, args = parsed(tmp_path, "\n".join([*lines, "lora_target_modules: q_proj"]))
    assert (args.save_strategy, args.eval_strategy) == ("no", "no")
    assert (args.retrieval_layers, args.learning_rate, args.max_steps) == ([1], 1e-4, 7)
    assert (args.run_name, args.bf16_full_eval, args.max_grad_norm) == ("12e4567", False, 1.0)
    *_, nobody = parsed(tmp_path, "report_to: null")
    assert nobody.report_to == []
    assert (args.bptt_segments, lora.lora_target_modules) == (None, ["q_proj"])
    (lists,) = parsed(tmp_path, "source: a\nways: memory\nlayers: 1", (Lists,))
    assert (lists.ways, lists.layers) == (["memory"], [1])
    (lists,) = parsed(tmp_path, "source: a\nways: memory\nlayers: 1", (Lists,), "--ways", "closed", "hard")
    assert lists.ways == ["closed", "hard"]


def test_what_only_a_file_can_give_is_taken(tmp_path):
    lines = "lr_scheduler_kwargs: {num_cycles: 2, min_lr: 1e-6, name: 1e6x, quoted: '12e45'}\nreport_to: [none]"
    *_, args = parsed(tmp_path, f"\ufeff{lines}\nresume_from_checkpoint: true")
    # YAML 1.1 reads a number with an exponent and no point as a word.
    assert args.lr_scheduler_kwargs == {"num_cycles": 2, "min_lr": 1e-6, "name": "1e6x", "quoted": "12e45"}
    assert (args.report_to, args.resume_from_checkpoint) == ([], True)


def test_a_truth_value_may_be_typed_for_a_checkpoint_and_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word, expected in (("true", True), ("False", False), ("no", False), ("run/checkpoint-1", "run/checkpoint-1")):
        *_, args = parsed(tmp_path, "", KINDS, "--resume_from_checkpoint", word)
        assert args.resume_from_checkpoint == expected
        *_, args = parsed(tmp_path, f"resume_from_checkpoint: {word}")
        assert args.resume_from_checkpoint == expected
    *_, args = parsed(tmp_path, "", KINDS, "--resume_from_checkpoint", "")
    assert args.resume_from_checkpoint is None
    (tmp_path / "true").mkdir()
    *_, args = parsed(tmp_path, "", KINDS, "--resume_from_checkpoint", "true")
    assert args.resume_from_checkpoint == "true"


@pytest.mark.parametrize("name", ["memory_gate_learning_rate", "retrieval_weight", "learning_rate", "lora_alpha"])
def test_nothing_is_no_value_of_a_number(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=None: null is no value of it; leave the option out"):
        parsed(tmp_path, f"{name}: null")


@pytest.mark.parametrize("value", ["true", "false", "[full_shard]"])
def test_an_option_that_may_stand_alone_takes_a_truth_value(tmp_path, value, monkeypatch):
    """As transformers asks for FSDP; what a trainer makes of it is its own."""

    @dataclass
    class Sharded:
        fsdp: str | None = field(default=None, metadata={"nargs": "?", "const": True})

    (found,) = parsed(tmp_path, f"fsdp: {value}", (Sharded,))
    assert found.fsdp == {"true": True, "false": False}.get(value, ["full_shard"])


def test_an_option_that_must_be_given_is_not_given_by_nothing(tmp_path):
    with pytest.raises(ValueError, match="required: --source"):
        parsed(tmp_path, "source: null", (Lists,))


@pytest.mark.parametrize("text", ["lora_target_modules: all-linear", "lora_target_modules: [all-linear]", ""])
def test_adapters_can_go_on_all_linear_layers(tmp_path, text):
    words = [] if text else ["--lora_target_modules", "all-linear"]
    model, lora, _ = parsed(tmp_path, f"lora_r: 2\n{text}", KINDS, "--segment_length", "64", *words)
    adapted, _ = model.load()
    names = {name.split(".")[-2] for name, _ in lora.wrap(adapted).named_modules() if name.endswith("lora_A")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_dtype_that_is_none_is_refused_before_anything_is_read(tmp_path):
    model, *_ = parsed(tmp_path, "dtype: foo")
    for refused in (model.check, model.load):
        with pytest.raises(ValueError, match="dtype='foo': must be one of 'auto', 'float32', 'bfloat16', 'float16'"):
            refused()
    model, *_ = parsed(tmp_path, f"dtype: bf16\nsegment_length: 64\nmodel: {resolve('tiny-llama')}")
    assert str(model.load()[0].dtype) == "torch.bfloat16"
