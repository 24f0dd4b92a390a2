"""The scripts that train and publish a memory: what ships is what was trained, and the card tells its measurements."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from models import build_patched
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM, InfiniConfig, patch_model
from infini_hf.assets import resolve
from infini_hf.calibration import add_memory_projections, calibrate_memory
from infini_hf.cli.memory_arguments import MemoryArguments
from infini_hf.evaluation.needles.samples import Sample, SampleFile
from infini_hf.fingerprint import fingerprint
from infini_hf.gate import MemoryGate
from infini_hf.lora import load_adapter

ROOT = Path(__file__).parent.parent
STAGE = ROOT / "configs" / "pretrain" / "tiny_llama_infini_2_novels.yaml"


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def precision():
    """A script sets the precision of products for its process, which here is that of all other tests."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def novels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("novels")
    for number in range(2):
        lines = [f"In the year {year} the house number {number} was sold again. " for year in range(900)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The base, patched and calibrated, with gates that are open a little and without projections."""
    folder, patch = tmp_path_factory.mktemp("calibrated"), InfiniConfig(128, overlap=32, feature_map="exp")
    model = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama"), infini_config=patch, dtype="float32")
    calibrate_memory(model, torch.arange(2, 1026)[None], progress=False)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("memory_gate.bias"):
                bias.fill_(0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny-llama")).save_pretrained(folder)
    return folder


def test_a_stage_trains_and_keeps_the_centers_it_began_with(novels, calibrated, tmp_path):
    options = ["--model", str(calibrated), "--train_folder", str(novels), "--output_dir", str(tmp_path)]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "1"]
    # Calibrating once more would move what the weights have learned with.
    more = ["--calibration_tokens", "512", "--disable_tqdm", "true", "--save_steps", "2", "--longest_reading", "1280"]
    script("finetune_memory").main(["--config", str(STAGE), *options, *small, *more])
    before = load_file(calibrated / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    shifts = [name for name in before if name.endswith("_shift")]
    assert len(shifts) == 8
    for name in shifts:
        assert torch.equal(before[name], after[name])
    gates = [name for name in before if name.endswith("memory_gate.bias")]
    assert any(not torch.equal(before[name], after[name]) for name in gates)


def test_a_folder_without_novels_is_refused(tmp_path):
    options = [
        "--config",
        str(STAGE),
        "--model",
        "tiny-llama",
        "--output_dir",
        str(tmp_path / "out"),
        "--train_folder",
    ]
    with pytest.raises(ValueError, match="novels': there is no such folder; name one of plain-text books"):
        script("finetune_memory").main([*options, str(tmp_path / "novels")])
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        script("finetune_memory").main([*options, str(tmp_path)])


def test_resting_layers_stay_as_they_are_and_projections_of_all_heads_learn(novels, tmp_path):
    options = ["--model", "tiny-llama", "--train_folder", str(novels), "--output_dir", str(tmp_path)]
    patch = ["--segment_length", "128", "--feature_map", "softmax", "--calibration_tokens", "512"]
    more = ["--memory_projections", "--mix_heads", "--projected_layers", "2", "--resting_layers", "2"]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "1"]
    rest = ["--disable_tqdm", "true", "--save_steps", "2", "--longest_reading", "1280", "--warmup_steps", "0"]
    given = [*options, *patch, *more, *small, *rest, "--matmul_precision", "high"]
    script("finetune_memory").main(["--config", str(STAGE), *given])
    assert torch.get_float32_matmul_precision() == "high"
    before = load_file(Path(resolve("tiny-llama")) / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    for name, weight in before.items():
        moved = not torch.equal(weight.float(), after[name])
        assert moved == ("layers.2" in name or "layers.3" in name or name == "model.norm.weight"), name
    projections = [name for name in after if name.endswith("query_projection.weight")]
    assert projections == ["model.layers.2.self_attn.memory_gate.query_projection.weight"]
    weight = after[projections[0]]
    assert weight.shape == (8, 8 * 64 + 1, 64)
    # Of other heads a head begins with nothing.
    assert all(weight[head, 64 * other : 64 * (other + 1)].any() for head in range(8) for other in range(8))
    gates = [after[f"model.layers.{index}.self_attn.memory_gate.bias"].any().item() for index in range(4)]
    assert gates == [False, False, True, True]
    with pytest.raises(ValueError, match=r"matmul_precision='low': must be one of \('highest', 'high', 'medium'\)"):
        script("finetune_memory").main(["--config", str(STAGE), *options, "--matmul_precision", "low"])
    told = ["--resting_layers", "2", "--retrieval_weight", "1", "--recompute_segments", "false"]
    with pytest.raises(ValueError, match=r"retrieval_layers=\[1, 3\] with resting_layers=2: \[1\] would be told"):
        script("finetune_memory").main(["--config", str(STAGE), *options, *told, "--retrieval_layers", "1", "3"])
    with pytest.raises(ValueError, match=r"retrieval_layers=None with resting_layers=2: \[0, 1\] would be told"):
        script("finetune_memory").main(["--config", str(STAGE), *options, *told])
    again = ["--resting_layers", "2", "--recall_weight", "1", "--recompute_segments", "false"]
    with pytest.raises(ValueError, match=r"recall_layers=\[1\] with resting_layers=2: \[1\] would be told"):
        script("finetune_memory").main(["--config", str(STAGE), *options, *again, "--recall_layers", "1"])
    # Nothing is told.
    MemoryArguments(resting_layers=2).check_told(0.0, [1])
    MemoryArguments(resting_layers=2).check_told(1.0, [2, 3])
    with pytest.raises(ValueError, match="resting_layers=4: must be from 0 to 3"):
        script("finetune_memory").main(["--config", str(STAGE), *options, "--resting_layers", "4"])


def test_the_memory_alone_learns(novels, tmp_path):
    options = ["--model", "tiny-llama-infini", "--train_folder", str(novels), "--output_dir", str(tmp_path)]
    small = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "1"]
    rest = ["--disable_tqdm", "true", "--longest_reading", "1280", "--warmup_steps", "0", "--calibration_tokens", "0"]
    script("finetune_memory").main(["--config", str(STAGE), *options, *small, *rest, "--memory_only", "true"])
    before = load_file(Path(resolve("tiny-llama-infini")) / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight.float(), after[name].float())}
    # Shifts are no parameters.
    learn = {name for name in before if "memory_gate" in name and "shift" not in name}
    assert moved == learn
    assert any("key_projection" in name for name in learn)
    with pytest.raises(
        ValueError, match="memory_only=True with closed_memory=True: the gates would rest with all else"
    ):
        MemoryArguments(memory_only=True, closed_memory=True)


def test_an_adapter_learns_from_the_rows_and_the_rest_of_the_model_rests(novels, tmp_path):
    options = ["--model", "tiny-llama-infini", "--train_folder", str(novels), "--output_dir", str(tmp_path)]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "0"]
    rest = ["--disable_tqdm", "true", "--warmup_steps", "0", "--calibration_tokens", "0", "--carry_memory", "false"]
    told = ["--retrieval_weight", "1", "--retrieval_layers", "2", "3", "--ruler_fraction", "1", "--lora_r", "2"]
    segments = ["--least_segments", "8", "--most_segments", "10", "--recompute_segments", "false"]
    given = ["--config", str(STAGE), *options, *small, *rest, *told, *segments]
    script("finetune_memory").main(given)
    base = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama-infini"), dtype="float32")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = load_adapter(base, tmp_path / "final").merge_and_unload().state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, merged[name])}
    learn = {name for name in before if "memory_gate" in name and "shift" not in name}
    adapted = {f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(4) for kind in "qkvo"}
    assert moved == learn | adapted
    for name in ("closed_memory", "memory_only"):
        with pytest.raises(ValueError, match=f"{name}=True with lora_r=2: beside adapters all weights rest"):
            script("finetune_memory").main([*given, f"--{name}", "true", "--retrieval_weight", "0"])
    with pytest.raises(ValueError, match="resting_layers=2 with lora_r=2: beside adapters all weights rest"):
        MemoryArguments(resting_layers=2).check_adapted(2)


def with_gates(folder, value, target):
    """The model of `folder` with all its gates at `value`, in `target`."""
    model = AutoInfiniModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MemoryGate):
                module.bias.fill_(value)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return str(target)


def test_the_control_with_a_closed_memory_trains_all_but_its_memory(novels, calibrated, tmp_path):
    open_gates, shut = with_gates(calibrated, 0.5, tmp_path / "open"), with_gates(calibrated, 0.0, tmp_path / "shut")
    options = ["--config", str(STAGE), "--train_folder", str(novels), "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "1", "--save_steps", "2"]
    options += ["--disable_tqdm", "true", "--longest_reading", "1280", "--warmup_steps", "0"]
    # A clipped gradient would count that of the gates, which only the other model has.
    options += ["--max_grad_norm", "0"]
    closed = ["--model", open_gates, "--closed_memory", "true", "--output_dir", str(tmp_path / "closed")]
    resting = ["--model", shut, "--memory_gate_learning_rate", "0", "--output_dir", str(tmp_path / "resting")]
    script("finetune_memory").main([*options, *closed])
    script("finetune_memory").main([*options, *resting])
    folders = Path(open_gates), tmp_path / "closed" / "final", tmp_path / "resting" / "final"
    before, after, oracle = (load_file(folder / "model.safetensors") for folder in folders)
    assert oracle.keys() == after.keys()
    for name, weight in after.items():
        torch.testing.assert_close(weight, oracle[name], atol=1e-6, rtol=0, msg=name)
        if name.endswith("memory_gate.bias"):
            assert not weight.any()
        elif "memory_gate" in name:
            assert torch.equal(weight, before[name])
        else:
            assert not torch.equal(weight, before[name]), name
    # What is stored needs no memory to be what it is.
    ids = torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "closed" / "final", dtype="float32")
    patched_again = AutoInfiniModelForCausalLM.from_pretrained(tmp_path / "closed" / "final", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(patched_again(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
    again = ["--model", open_gates, "--output_dir", str(tmp_path / "closed"), "--max_steps", "3"]
    with pytest.raises(ValueError, match=r"parameters, as .*memory_gate.* rest in the other"):
        script("finetune_memory").main([*options, *again])
    with pytest.raises(ValueError, match=r"retrieval_weight=1.0 with closed_memory=True: nothing is read"):
        MemoryArguments(closed_memory=True).check_told(1.0, None)
    with pytest.raises(ValueError, match=r"closed_memory=True: nothing is read .* give recall_weight=0"):
        MemoryArguments(closed_memory=True).check_told(1.0, None, "recall")
    patch_model(stock, InfiniConfig(segment_length=128, gate="sigmoid"))
    with pytest.raises(ValueError, match="gate='sigmoid': at zero it is half open"):
        MemoryArguments(closed_memory=True).close(stock)


def test_projections_are_fitted_stored_and_reported(novels, calibrated, tmp_path, capsys):
    model = add_memory_projections(AutoInfiniModelForCausalLM.from_pretrained(calibrated, dtype="float32"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(calibrated).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "fitted")]
    small = ["--rows", "17", "--steps", "4", "--batch_size", "2", "--start_steps", "2", "--most_segments", "4"]
    config = ROOT / "configs" / "pretrain" / "tiny_llama_facts_8_fit.yaml"
    more = ["--least_segments", "3", "--train_folder", str(novels)]
    report = script("fit_projections").main(["--config", str(config), *options, *small, *more])
    cells = [report[when][name] for name in ("votes", "tokens") for when in ("before", "after")]
    assert "| together | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "fitted"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("query_projection", "key_projection")
    assert moved == {f"model.layers.{i}.self_attn.memory_gate.{part}.weight" for i in (2, 3) for part in parts}


def changed(folder, target, change, **patch):
    """The model of `folder`, asked for another patch and then changed, in `target`."""
    infini = InfiniConfig(128, overlap=32, feature_map="exp", **patch)
    model = AutoInfiniModelForCausalLM.from_pretrained(folder, infini_config=infini, dtype="float32")
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return str(target)


def test_a_mean_of_weights_lies_between_the_two_and_keeps_the_window_of_the_first(calibrated, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)

    def drift(model):
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.01)

    other = changed(calibrated, tmp_path / "other", drift)
    options = ["--model", str(calibrated), "--segment_length", "64", "--overlap", "16", "--dtype", "float32"]
    given = [*options, "--other", other, "--output_dir", str(tmp_path / "mean")]
    script("average_weights").main([*given, "--share", "0.75"])
    assert f"mean    0.75 of {calibrated}, 0.25 of {other}" in capsys.readouterr().out
    folders = calibrated, tmp_path / "other", tmp_path / "mean"
    first, second, mean = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys() == mean.keys()
    for name, weight in mean.items():
        expected = 0.75 * first[name].double() + 0.25 * second[name].double()
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-6, msg=name)
        assert torch.equal(first[name], second[name]) == name.endswith("_shift"), name
    model = AutoInfiniModelForCausalLM.from_pretrained(tmp_path / "mean")
    assert model.config.infini_attention["segment_length"] == 64
    assert model.config.infini_attention["overlap"] == 16
    # The head is the embedding in a tied model, and still is.
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for share in ("0", "1", "1.5"):
        with pytest.raises(ValueError, match=f"share={float(share)}: is the part of `model`"):
            script("average_weights").main([*given, "--share", share])


def shift(model):
    model.model.layers[1].self_attn.memory_gate.key_shift.add_(0.5)


@pytest.mark.parametrize(
    ("change", "patch", "message"),
    [
        (shift, {}, r"layers\.1\.self_attn\.memory_gate\.key_shift differs: the memories were calibrated apart"),
        (add_memory_projections, {}, r"projection.* is missing in the model and \(.*\) in the other"),
        (lambda model: None, {"layers": [0, 1, 2]}, r"layers is None in the model and \[0, 1, 2\] in the other"),
        # Weights of the same shapes, in another function.
        (lambda model: model.config.update({"rms_norm_eps": 1e-3}), {}, r"rms_norm_eps is 1e-06 in .* 0.001 in the"),
    ],
)
def test_a_mean_of_other_than_two_states_of_one_training_is_refused(change, patch, message, calibrated, tmp_path):
    other = changed(calibrated, tmp_path / "other", change, **patch)
    with pytest.raises(ValueError, match=message):
        script("average_weights").main(["--model", str(calibrated), "--other", other, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("options", [[], ["--num_train_epochs", "2"]])
def test_rows_are_drawn_for_a_number_of_steps(options, novels):
    given = ["--model", "tiny-llama-infini", "--train_folder", str(novels), "--output_dir", "unused", *options]
    with pytest.raises(ValueError, match=r"^max_steps=-1: must be at least 1"):
        script("finetune_memory").main(given)


STAGE_LANES = {
    ("--carry_memory", "false"): "novel_lanes=1 with carry_memory=False",
    ("--train_sampling_strategy", "random"): "novel_lanes=1 with train_sampling_strategy='random'",
    ("--rows_alike", "4"): "novel_lanes=1 with batches of 2 rows",
}


@pytest.mark.parametrize(("option", "message"), STAGE_LANES.items())
def test_lanes_of_novels_need_the_batches_they_are_drawn_for(option, message, tmp_path):
    """Before a model or a text is looked for."""
    given = ["--model", "nowhere", "--train_folder", "nowhere", "--output_dir", str(tmp_path), "--max_steps", "2"]
    lanes = ["--per_device_train_batch_size", "2", "--rows_alike", "2", "--novel_lanes", "1", "--carry_memory", "true"]
    with pytest.raises(ValueError, match=re.escape(message)):
        script("finetune_memory").main([*given, *lanes, *option])


def test_a_fit_refuses_before_it_reads(novels, tmp_path):
    given = ["--model", "tiny-llama-infini", "--train_folder", str(novels)]
    with pytest.raises(ValueError, match="resting_layers=1: all weights rest in a fit"):
        script("fit_projections").main([*given, "--resting_layers", "1"])
    with pytest.raises(ValueError, match="memory_only=True: a fit is of the projections alone"):
        script("fit_projections").main([*given, "--memory_only", "true"])
    with pytest.raises(ValueError, match="closed_memory=True: a fit is of what the memory reads"):
        script("fit_projections").main([*given, "--closed_memory", "true"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file: is a file"):
        script("fit_projections").main([*given, "--output_dir", str(tmp_path / "file")])
    with pytest.raises(ValueError, match=r"layers=\[9\]"):
        script("fit_projections").main([*given, "--output_dir", str(tmp_path), "--layers", "9"])


def test_projections_of_each_head_do_not_become_those_of_all():
    asked = MemoryArguments(memory_projections=True, mix_heads=True, calibration_tokens=0)
    model, mixed = (build_patched(segment_length=8, feature_map="exp") for _ in range(2))
    add_memory_projections(model)
    with pytest.raises(ValueError, match="has projections of each head alone"):
        asked.prepare(model, None, [])
    for _ in range(2):
        # The second time there is nothing to add.
        asked.prepare(mixed, None, [])
    # Of one KV head a map of each head alone is one of all heads.
    single = build_patched(segment_length=8, feature_map="exp", overrides={"num_key_value_heads": 1})
    for _ in range(2):
        asked.prepare(single, None, [])


@pytest.mark.parametrize(("length", "texts", "asked"), [(20_000, 2, 512), (900, 3, 300), (2000, 700, 256)])
def test_a_memory_is_calibrated_on_the_inside_of_every_text(length, texts, asked):
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    ids = MemoryArguments(calibration_tokens=asked).pieces(
        tokenizer, ["It was a dark night. " * (length // 21)] * texts
    )
    assert 0.9 * asked <= ids.shape[1] <= asked
    assert ids.dtype == torch.int64
    with pytest.raises(ValueError, match=r"calibration_tokens=9000: 2 texts, of 4500 tokens each, gave \d+"):
        MemoryArguments(calibration_tokens=9000).pieces(tokenizer, ["It was a dark night. " * 9] * 2)


def test_what_is_published_is_the_model_and_its_card_counts_the_samples(tmp_path):
    shipped = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama-infini"), dtype="float32")
    of = {"task": {"name": "passkey", "digits": 5}, "seed": 3, **fingerprint(shipped.get_decoder())}
    files = {
        weights: SampleFile(tmp_path / f"{weights}.jsonl", {**of, "weights": weights})
        for weights in (of["weights"], "other")
    }
    for file in files.values():
        file.append(
            [
                Sample("grass", 4096, 0.5, number, 0, 0.5, "memory", ("12345",), answered, int(answered == "12345"))
                for number, answered in enumerate(["12345", "12345", "54321"])
            ]
        )
    samples = files[of["weights"]]
    output = tmp_path / "published"
    fit = ROOT / "configs" / "pretrain" / "tiny_llama_facts_4_fit.yaml"
    before = fit.with_name("tiny_llama_facts_3_memory.yaml")
    last = fit.with_name("tiny_llama_recall.yaml")
    alone, mean = (fit.with_name(f"tiny_llama_half_{name}.yaml") for name in ("2_facts", "3_average"))
    options = ["--configs", *map(str, (STAGE, before, fit, alone, mean, last)), "--samples", str(samples.path)]
    script("publish_memory").main(["--model", "tiny-llama-infini", "--output", str(output), *options])
    with pytest.raises(ValueError, match=r"other\.jsonl': of other weights than the model in output"):
        script("publish_memory").main(["--output", str(output), "--samples", str(files["other"].path)])
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| grass | 4,096 | memory | 2 of 3 | **0.67** |" in card
    assert "| `tiny_llama_infini_2_novels` | `outputs/tiny-llama-infini-1/final` | 16 × 640 tokens | 160 |" in card
    row = (
        "| `tiny_llama_facts_4_fit` | `outputs/tiny-llama-facts-3/checkpoint-300` | 480 × 768 to 1,024 tokens | 360 |"
    )
    assert f"{row} the memory's projections of layers 2, 3, with the weights at rest |" in card
    assert f"    python scripts/fit_projections.py --config {fit} " in card
    # The next stage goes on from the middle of it.
    assert (
        "| `tiny_llama_facts_3_memory` | `outputs/tiny-llama-facts-2` | 32 × 256 to 768 tokens | 300 of 600 |" in card
    )
    told = "layers 2, 3 told where what comes next came before; 5 rows read novels on with the memory carried "
    assert f"passkeys in 15% of the rows with facts; {told}" in card
    assert "told where answers were stated; " not in card[card.index("| `tiny_llama_recall` |") :]
    assert "with facts; the gates and the memory's projections alone learn; layers 2, 3 told" in card
    assert f"    python scripts/average_weights.py --config {mean}\n" in card
    of_mean = "mean of the weights: 75% of these, the rest of `tiny-llama-facts`"
    assert f"| `tiny_llama_half_3_average` | `outputs/tiny-llama-half-2/final` | – | – | {of_mean} |" in card
    assert "### passkey in grass, digits 5, seed 3" in card
    ids = torch.arange(2, 302)[None]
    logits = [
        AutoInfiniModelForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits
        for folder in (resolve("tiny-llama-infini"), output)
    ]
    # The checkpoint is stored in bfloat16 already.
    assert torch.equal(*logits)


def test_the_recipe_of_a_lora_says_what_its_rows_hold_and_what_learns():
    lines = script("publish_memory").recipe([str(ROOT / "configs" / "lora" / "tiny_llama_ruler.yaml")])
    # A fifth of those that are not in the sentences of RULER.
    assert "passkeys in 10% of the rows with facts; facts in the sentences of RULER in 50%; a LoRA of rank 32" in lines


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-facts", "tiny-llama-infini"])
def test_every_config_that_a_card_names_is_there(name):
    card = (Path(resolve(name)) / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"configs/pretrain/\w+\.yaml", card)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
