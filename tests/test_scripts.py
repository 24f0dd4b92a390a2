"""The tiny configs run from the data to the tables: pretraining, LoRA, summaries, perplexity and ROUGE."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import assert_equal_tensors, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from infini_hf import AutoInfiniModelForCausalLM, InfiniConfig, InfiniTrainer, patch_model, score
from infini_hf.assets import resolve
from infini_hf.callbacks import gate_values
from infini_hf.cli import run_training
from infini_hf.cli.script_arguments import DocumentArguments, LoraArguments, ModelArguments, command_line
from infini_hf.data.booksum import DEFAULT_PROMPT
from infini_hf.data.documents import load_documents
from infini_hf.data.packing import pack_documents
from infini_hf.evaluation.rouge import rouge_scores
from infini_hf.gate import MemoryGate
from infini_hf.lora import load_adapter

pytest.importorskip("rouge_score")

ROOT = Path(__file__).parent.parent
PATCH = InfiniConfig(segment_length=128, overlap=32, feature_map="exp")
WORDS = "the old house stood at the end of a lane where nobody had lived for many years and rain fell on the river"
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@cache
def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name, config, *options):
    """A script in this process, with a config of the repository and options over it."""
    config = [] if config is None else ["--config", str(ROOT / "configs" / config)]
    return script(name).main([*config, *map(str, options)])


def prose(words, seed):
    """A text that is the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = WORDS.split()
    picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    return " ".join(vocabulary[pick] for pick in picks) + "."


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What `datasets` prepares stays out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of novels and a folder of pairs in the fields of BookSum."""
    folder = tmp_path_factory.mktemp("data")
    for split, count, words in (("train", 3, 900), ("validation", 1, 500)):
        (folder / "novels" / split).mkdir(parents=True)
        for number in range(count):
            text = prose(words, 100 * count + number)
            (folder / "novels" / split / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "pairs").mkdir()
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        rows = [
            {"bid": number, "title": f"Book {number}", "text": prose(400, number), "summary": prose(12, 50 + number)}
            for number in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "pairs" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def pretrain(data, output, *options):
    small = ["--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 2, "--segments_per_row", 3]
    sources = ["--train_source", data / "novels" / "train", "--eval_source", data / "novels" / "validation"]
    return run("pretrain", "pretrain/tiny_cpu.yaml", *sources, *small, "--output_dir", output, *options)


def finetune(data, output, *options):
    small = ["--max_steps", 2, "--save_steps", 2, "--max_text_tokens", 400, "--gradient_accumulation_steps", 1]
    sources = ["--source", data / "pairs", "--output_dir", output]
    return run("finetune_booksum", "lora/tiny_cpu.yaml", *sources, *small, *options)


def summarize(data, output, *options):
    small = ["--source", data / "pairs", "--max_new_tokens", 6, "--output", output]
    run("summarize", "eval/booksum_tiny_cpu.yaml", *small, *options)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """The folder of a run of two steps, and what its `main` returned."""
    output = tmp_path_factory.mktemp("runs") / "pretrained"
    return output, pretrain(data, output)


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "adapted"
    return output, finetune(data, output)


def validation_ids(data, tokens=None):
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    text = (data / "novels" / "validation" / "0.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *ids][:tokens]])


def row_of(card, name):
    """The cells of a row of a markdown table."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# Pretraining.


def test_pretraining_leaves_a_model_that_loads_with_its_gates(pretrained):
    output, _ = pretrained
    model = AutoInfiniModelForCausalLM.from_pretrained(output / "final")
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny-llama"), dtype=torch.float32)
    assert InfiniConfig.from_dict(model.config.infini_attention) == PATCH
    assert all(gates.abs().max() > 0 for gates in gate_values(model).values())
    assert not torch.equal(model.lm_head.weight, stock.lm_head.weight)
    assert AutoTokenizer.from_pretrained(output / "final").vocab_size == model.config.vocab_size
    assert (output / "memory_gates.png").is_file()


def test_the_results_are_those_of_the_model_that_was_saved(pretrained, data):
    output, returned = pretrained
    results = json.loads((output / "final" / "results.json").read_text(encoding="utf-8"))
    assert results == returned
    model = AutoInfiniModelForCausalLM.from_pretrained(output / "final").eval()
    # Rows of documents end with EOS.
    row = pack_documents(
        load_documents(data / "novels" / "validation", streaming=False),
        AutoTokenizer.from_pretrained(output / "final"),
        128,
        128,
    )
    ids = torch.tensor(row["input_ids"])
    assert results["with memory"]["tokens"] == ids.shape[1] - 1
    assert results["with memory"]["loss"] == pytest.approx(score(model, ids).mean().item(), rel=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.memory_gate.bias.zero_()
    closed = score(model, ids).mean().item()
    assert results["memory closed"]["loss"] == pytest.approx(closed, rel=1e-5)
    assert results["memory closed"]["loss"] != results["with memory"]["loss"]


def test_the_model_card_says_what_was_done_and_found(pretrained, data):
    output, results = pretrained
    card = (output / "final" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# pretrained" in card
    assert "all weights" in card
    assert f"- data: {data / 'novels' / 'train'}" in card
    assert "- steps: 2 of 2" in card
    assert "- `carry_memory`: True" in card
    assert "- `learning_rate`: 0.0001" in card
    assert "- `segment_length`: 128" in card
    for name in ("with memory", "memory closed"):
        assert row_of(card, name) == [f"{results[name]['loss']:.4f}", f"{results[name]['tokens']:,}"]
    model = AutoInfiniModelForCausalLM.from_pretrained(output / "final")
    for index, gates in gate_values(model).items():
        assert row_of(card, index) == [f"{value:.3f}" for value in (gates.mean(), gates.min(), gates.max())]
    command = re.search(r"- command: `(.*)`", card)[1]
    assert command.startswith("python scripts/pretrain.py --config ")


def test_a_run_that_was_interrupted_goes_on_from_the_last_whole_checkpoint(pretrained, data, tmp_path, caplog):
    output, _ = pretrained
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    before = AutoInfiniModelForCausalLM.from_pretrained(output / "final")
    pretrain(data, tmp_path / "run")
    assert "checkpoint-2 was not written to its end" in caplog.text
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2
    after = AutoInfiniModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert_equal_tensors(weights_of(after), weights_of(before))


@pytest.mark.parametrize("steps", [["--max_steps", 2], ["--max_steps", -1, "--num_train_epochs", 0.1]])
def test_a_finished_run_trains_no_further_and_keeps_its_card(pretrained, data, tmp_path, capsys, steps):
    output, results = pretrained
    shutil.copytree(output, tmp_path / "run")
    final = tmp_path / "run" / "final"
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in final.iterdir()}
    again = pretrain(data, tmp_path / "run", "--learning_rate", 0.5, "--weight_decay", 0.1, *steps)
    assert again == results
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in final.iterdir()} == before
    told = capsys.readouterr().out
    # Where the number of steps is given, nothing is loaded into the trainer first.
    assert ("resumed from" in told) == ("-1" in map(str, steps))
    place = re.escape(str(tmp_path / "run"))
    assert re.search(
        rf"already complete: 2 of [12] steps in {place}; give another output_dir, or more max_steps", told
    )


def test_a_finished_run_whose_last_checkpoint_is_gone_is_finished(pretrained, data, tmp_path, capsys):
    """As where the best one is kept, and it is another."""
    output, results = pretrained
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert pretrain(data, tmp_path / "run") == results
    told = capsys.readouterr().out
    assert "already complete: 2 of 2 steps" in told
    assert "resumed from" not in told
    # So is one that kept none, and a new beginning has to be asked for.
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    assert pretrain(data, tmp_path / "run") == results
    assert "already complete: 2 of 2 steps" in capsys.readouterr().out
    pretrain(data, tmp_path / "run", "--resume_from_checkpoint", "false")
    assert "trained     2 of 2 steps" in capsys.readouterr().out
    # Checkpoints of two runs side by side would be taken for each other's.
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=False with .*checkpoint-2 of another run"):
        pretrain(data, tmp_path / "run", "--resume_from_checkpoint", "false")
    # One that is asked for by name is gone on from.
    pretrain(data, tmp_path / "run", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-1")
    assert "resumed from" in capsys.readouterr().out


def test_a_run_that_goes_on_says_so_on_its_card(pretrained, data, tmp_path, capsys):
    output, results = pretrained
    shutil.copytree(output, tmp_path / "run")
    again = pretrain(data, tmp_path / "run", "--max_steps", 3, "--weight_decay", 0.1)
    told, bars = capsys.readouterr()
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert "- steps: 3 of 3, the first 2 of them before this command went on with these options" in card
    assert "- `weight_decay`: 0.1" in card
    assert again["with memory"]["loss"] != results["with memory"]["loss"]
    assert f"resumed from {tmp_path / 'run' / 'checkpoint-2'}, after 2 steps" in told
    # The end of the run in four lines, and what each bar counts.
    assert re.search(r"^trained     3 of 3 steps, 2 of them before, \d+ s$", told, re.MULTILINE)
    losses = ", ".join(f"{again[name]['loss']:.4f} {name}" for name in ("with memory", "memory closed"))
    assert f"evaluation  loss {losses} ({again['with memory']['tokens']:,} tokens)" in told
    assert f"model       {tmp_path / 'run' / 'final'}\ncard        {tmp_path / 'run' / 'final' / 'README.md'}" in told
    assert "training: " in bars
    assert "evaluation: " in bars


def test_a_run_that_was_stopped_before_its_card_is_described_when_it_is_started_again(
    pretrained, data, tmp_path, monkeypatch
):
    output, results = pretrained
    shutil.copytree(output, tmp_path / "run")

    def stop(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_training, "evaluate_with_control", stop)
        message = r"stopped after 3 of 3 steps: the same command goes on from .*checkpoint-3"
        with pytest.raises(KeyboardInterrupt, match=message):
            pretrain(data, tmp_path / "run", "--max_steps", 3)
    # The card of the first two steps does not pass for that of all three.
    assert pretrain(data, tmp_path / "run", "--max_steps", 3) != results
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert "- steps: 3 of 3, the first 3 of them before" in card


def test_a_run_stopped_before_its_first_checkpoint_says_that_it_begins_again(data, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(InfiniTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt, match="after 0 of 2 steps, before the first checkpoint"):
        pretrain(data, tmp_path / "run")


def test_fewer_documents_than_carried_memories_are_refused_before_training(data, tmp_path):
    message = r"train_source='.*': 3 documents, and carry_memory reads 4 at once.*per_device_train_batch_size 3"
    with pytest.raises(ValueError, match=message):
        pretrain(data, tmp_path / "run", "--per_device_train_batch_size", 4)


def test_without_evaluation_data_the_card_says_so(data, tmp_path):
    small = ["--max_steps", 1, "--per_device_train_batch_size", 1, "--segments_per_row", 2, "--save_strategy", "no"]
    output = tmp_path / "run"
    sources = ["--train_source", data / "novels" / "train", "--output_dir", output]
    results = run("pretrain", "pretrain/tiny_cpu.yaml", *sources, *small, "--plot_memory_gates", "false")
    assert results == {}
    assert "Not evaluated" in (output / "final" / "README.md").read_text(encoding="utf-8")
    assert not (output / "memory_gates.png").exists()


# Fine-tuning.


def test_lora_leaves_an_adapter_that_knows_its_patch(adapted):
    output, results = adapted
    model = load_adapter(resolve("tiny-llama"), output / "final", dtype=torch.float32)
    assert InfiniConfig.from_dict(model.config.infini_attention) == PATCH
    assert all(gates.abs().max() > 0 for gates in gate_values(model).values())
    moved = [parameter.abs().max() for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 16
    assert all(moved)
    assert not (output / "final" / "model.safetensors").exists()
    card = (output / "final" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "LoRA adapters and gates" in card
    assert results["with memory"]["tokens"] == results["memory closed"]["tokens"] > 0


@pytest.mark.parametrize("way", ["option", "file"])
def test_without_lora_all_weights_are_trained(way, data, tmp_path):
    output, options = tmp_path / "full", ["--lora_r", 0]
    if way == "file":
        text = (ROOT / "configs" / "lora" / "tiny_cpu.yaml").read_text(encoding="utf-8")
        (tmp_path / "full.yaml").write_text(text.replace("lora_r: 8", "lora_r: null"), encoding="utf-8")
        options = ["--config", tmp_path / "full.yaml"]
        small = ["--max_steps", 2, "--save_strategy", "no", "--max_text_tokens", 200, "--source", data / "pairs"]
        run("finetune_booksum", None, *options, *small, "--output_dir", output)
    else:
        finetune(data, output, *options)
    model = AutoInfiniModelForCausalLM.from_pretrained(output / "final")
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny-llama"), dtype=torch.float32)
    weights = weights_of(model)
    assert all(not torch.equal(weights[name], weight) for name, weight in stock.named_parameters() if weight.ndim == 2)
    assert "all weights" in (output / "final" / "README.md").read_text(encoding="utf-8")


def test_adapters_that_are_none_and_four_bits_without_them_are_refused():
    """Before a base is loaded for them."""
    for options, message in (
        ({"lora_r": -1}, "lora_r=-1: must be at least 1"),
        ({"lora_dropout": 2.0}, r"lora_dropout=2\.0: must be from 0 to below 1"),
        ({"lora_target_modules": []}, "lora_target_modules: name the layers"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraArguments(**options)
    with pytest.raises(ValueError, match="load_in_4bit needs lora_r"):
        LoraArguments(load_in_4bit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per_device_train_batch_size", 4], "3 documents for 4 lanes"),
        (["--join", "true"], "join with streaming and carry_memory: joined rows are one document"),
    ],
)
def test_a_stream_that_lanes_cannot_read_is_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pretrain(data, tmp_path, "--streaming", "true", "--carry_memory", "true", *options)
    assert not (tmp_path / "final").exists()


def test_a_run_without_a_step_is_not_published(data, tmp_path, monkeypatch):
    nothing = SimpleNamespace(metrics={"train_runtime": 0.0, "train_loss": 0.0})
    monkeypatch.setattr(run_training.InfiniTrainer, "train", lambda *args, **options: nothing)
    with pytest.raises(ValueError, match="max_steps=2: no step was trained"):
        pretrain(data, tmp_path)
    assert not (tmp_path / "final").exists()


EPOCHS, SEEDS = [(0, epoch) for epoch in range(6)], [(seed, 0) for seed in range(6)]


def test_a_stream_is_shuffled_anew_in_every_pass(data):
    """Rows of a document stay together; what it is evaluated on keeps the order of the source."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    novels = str(data / "novels" / "train")
    options = {"eval_source": novels, "streaming": True, "segments_per_row": 2}
    given = DocumentArguments(novels, **options, shuffle_buffer=0)
    in_order = [row["input_ids"] for row in given.rows(tokenizer, 64)]
    orders = {}
    for seed, epoch in {*EPOCHS, *SEEDS}:
        stream = DocumentArguments(novels, **options).rows(tokenizer, 64, seed=seed)
        stream.set_epoch(epoch)
        rows = list(stream)
        assert sorted(row["input_ids"] for row in rows) == sorted(in_order)
        assert all(b["part"] in (0, a["part"] + 1) for a, b in pairwise(rows))
        orders[seed, epoch] = [row["input_ids"] for row in rows]
    epochs, seeds = ([str(orders[place]) for place in places] for places in (EPOCHS, SEEDS))
    assert len(set(epochs)) > 1
    assert len(set(seeds)) > 1
    again = DocumentArguments(novels, **options).rows(tokenizer, 64, seed=0)
    again.set_epoch(3)
    assert [row["input_ids"] for row in again] == orders[0, 3]
    whole = DocumentArguments(novels, eval_source=novels)
    evaluated = given.eval_rows(tokenizer, 64)
    assert evaluated[:] == whole.eval_rows(tokenizer, 64)[:]
    # Not in memory: books may be many.
    assert evaluated.cache_files
    with pytest.raises(ValueError, match="keeps none of its rows"):
        DocumentArguments(novels, **options, where="text=nothing").eval_rows(tokenizer, 64)
    with pytest.raises(ValueError, match="shuffle_buffer=-1: must be at least 0"):
        DocumentArguments(novels, shuffle_buffer=-1)


def test_adapters_can_be_pretrained(data, tmp_path):
    results = pretrain(data, tmp_path, "--lora_r", 4, "--memory_gate_learning_rate", 0.1)
    model = load_adapter(resolve("tiny-llama"), tmp_path / "final", dtype="float32")
    assert all(gates.any() for gates in gate_values(model).values())
    card = (tmp_path / "final" / "README.md").read_text(encoding="utf-8")
    block = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "final"))
    exec(block, found := {})
    assert_equal_tensors(
        weights_of(found["model"]), weights_of(load_adapter(resolve("tiny-llama"), tmp_path / "final"))
    )
    assert results["with memory"]["loss"] != results["memory closed"]["loss"]


def test_the_hub_gets_the_folder_with_its_card_when_all_is_written(data, tmp_path, monkeypatch):
    """The trainer would have uploaded the output_dir, with a card of its own, before this one was written."""
    pushed = []

    def named(trainer):
        trainer.hub_model_id = "someone/model"

    def uploaded(repo_id, folder_path, **options):
        pushed.append((repo_id, options["token"], sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(InfiniTrainer, "init_hf_repo", lambda trainer, *args, **options: named(trainer))
    monkeypatch.setattr(InfiniTrainer, "_push_from_checkpoint", lambda trainer, folder: None)
    monkeypatch.setattr(InfiniTrainer, "push_to_hub", lambda *args, **options: pytest.fail("pushed by the trainer"))
    monkeypatch.setattr(run_training, "upload_folder", uploaded)
    options = ["--push_to_hub", "true", "--hub_token", "hf_secret"]
    pretrain(data, tmp_path, *options)
    ((name, token, files),) = pushed
    assert (name, token) == ("someone/model", "hf_secret")
    assert {"README.md", "model.safetensors", "results.json", "tokenizer.json", "training.json"} <= set(files)
    card = tmp_path / "final" / "README.md"
    said = card.read_text(encoding="utf-8")
    assert 'model = AutoInfiniModelForCausalLM.from_pretrained("someone/model")' in said
    assert "base_model" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    # What could not be uploaded is with the same command; the card of a run without a name gets one.
    card.write_text(said.replace("someone/model", "FOLDER"), encoding="utf-8")
    pretrain(data, tmp_path, *options)
    assert pushed[1] == pushed[0]
    assert card.read_text(encoding="utf-8") == said


# Summaries.


def test_summaries_are_written_one_line_a_text_and_not_twice(adapted, data, tmp_path, monkeypatch, capsys):
    output, adapter = tmp_path / "memory.jsonl", adapted[0] / "final"
    rows = summarize(data, output, "--adapter", adapter)
    first = output.read_text(encoding="utf-8").splitlines()[0]
    assert [row["id"] for row in rows] == ["0:Book 0", "1:Book 1"]
    assert [row["reference"] for row in rows] == [prose(12, 50), prose(12, 51)]
    assert all(row["summary"] for row in rows)
    reader = {"model": "tiny-llama", "adapter": str(adapter), "closed": False, "source": str(data / "pairs")}
    reader |= {"split": "test", "level": None, "prompt": DEFAULT_PROMPT, "max_text_tokens": None, "seed": 0}
    reader |= {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 0, "max_new_tokens": 6}
    for row in rows:
        assert len(row["reader"].pop("weights")) == 16
        assert row["reader"] == reader
    assert "0 of 2 summaries already there" in capsys.readouterr().out
    output.write_text(first + "\n", encoding="utf-8")
    said = []
    monkeypatch.setattr(script("summarize"), "summarize", lambda *args, **options: said.append(args[2]) or "again")
    again = summarize(data, output, "--adapter", adapter)
    assert said == [prose(400, 1)]
    assert [row["summary"] for row in again] == [rows[0]["summary"], "again"]
    told = capsys.readouterr().out
    assert f"{output}: 1 of 2 summaries already there" in told
    assert f"{output}: 1 summaries written, 2 in all" in told


def test_a_resumed_file_holds_what_an_uninterrupted_one_does(adapted, data, tmp_path):
    options = ["--adapter", adapted[0] / "final"]
    whole = summarize(data, tmp_path / "whole.jsonl", *options)
    summarize(data, tmp_path / "parts.jsonl", *options, "--limit", 1)
    assert summarize(data, tmp_path / "parts.jsonl", *options) == whole


def test_a_patch_that_an_adapter_was_not_trained_under_is_refused(adapted, data, tmp_path):
    """It was left out without a word."""
    folder = adapted[0] / "final"
    with pytest.raises(ValueError, match=r"^overlap=7: '.*final' was trained with 32, and an adapter brings its own"):
        summarize(data, tmp_path / "said.jsonl", "--adapter", folder, "--overlap", 7)
    assert not (tmp_path / "said.jsonl").exists()
    # What it was trained with may be said, and is no first patch of the base.
    model, _ = ModelArguments("tiny-llama", overlap=32).load(folder)
    assert InfiniConfig.from_dict(model.config.infini_attention) == PATCH


def test_the_adapter_and_the_memory_matter_to_a_summary(adapted, data, tmp_path, monkeypatch):
    """The script reads with the adapter, and with every gate closed when that is asked for."""
    seen = []

    def noted(model, *args, **options):
        gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
        is_open = any(gate.bias.any().item() and not gate.closed for gate in gates)
        seen.append((type(model).__name__, is_open, args[3], options))
        return "said"

    monkeypatch.setattr(script("summarize"), "summarize", noted)
    summarize(data, tmp_path / "open.jsonl", "--limit", 1, "--adapter", adapted[0] / "final")
    closed = ["--adapter", adapted[0] / "final", "--closed", "--temperature", 0, "--max_text_tokens", 77]
    summarize(data, tmp_path / "closed.jsonl", "--limit", 1, *closed)
    summarize(data, tmp_path / "base.jsonl", "--limit", 1)
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 0, "max_new_tokens": 6}
    greedy = {"do_sample": False, "max_new_tokens": 6}
    assert seen == [
        ("PeftModelForCausalLM", True, None, sampled),
        ("PeftModelForCausalLM", False, 77, greedy),
        ("LlamaForCausalLM", False, None, sampled),
    ]


def test_a_file_of_another_reader_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(script("summarize"), "summarize", lambda *args, **options: "said")
    output = tmp_path / "said.jsonl"
    summarize(data, output)
    shutil.copytree(data / "pairs", tmp_path / "pairs")
    for option, value, said in (
        ("closed", True, "closed False there and True here"),
        ("source", tmp_path / "pairs", r"source '.*' there and '.*' here"),
        ("split", "validation", "split 'test' there"),
        ("temperature", 0, r"do_sample True there and False here"),
        ("temperature", 0.7, r"temperature 0\.5 there and 0\.7 here"),
        ("max_new_tokens", 7, "max_new_tokens 6 there and 7 here"),
        ("max_text_tokens", 100, "max_text_tokens None there and 100 here"),
        ("prompt", "{text}", "prompt 'Read"),
        ("seed", 1, "seed 0 there and 1 here"),
        ("segment_length", 64, "weights '"),
    ):
        with pytest.raises(ValueError, match=rf"line 1 is by another reader \(.*{said}.*\): name another output"):
            summarize(data, output, f"--{option}", value)
    with output.open("a", encoding="utf-8") as file:
        file.write('{"id": "2:Bo')
    with pytest.raises(ValueError, match="line 3 was not written to its end"):
        summarize(data, output)


def test_summaries_of_an_adapter_that_was_trained_again_or_of_another_text_are_refused(
    adapted, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(script("summarize"), "summarize", lambda *args, **options: "said")
    output, adapter, pairs = tmp_path / "said.jsonl", tmp_path / "adapter", tmp_path / "pairs"
    shutil.copytree(adapted[0] / "final", adapter)
    shutil.copytree(data / "pairs", pairs)
    given = ["--adapter", adapter, "--source", pairs]
    summarize(data, output, *given)
    weights = load_file(adapter / "adapter_model.safetensors")
    before = {name: weight.clone() for name, weight in weights.items()}
    gate = next(name for name in weights if "memory_gate" in name)
    weights[gate] += 0.1
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"weights '\w+' there and '\w+' here"):
        summarize(data, output, *given)
    save_file(before, adapter / "adapter_model.safetensors")
    assert len(summarize(data, output, *given)) == 2
    test = pairs / "test.jsonl"
    test.write_text(test.read_text(encoding="utf-8").replace(prose(12, 51), "Another summary."), encoding="utf-8")
    with pytest.raises(ValueError, match="its summary of '1:Book 1' is of another text, or has another reference"):
        summarize(data, output, *given)


def test_an_interrupted_file_of_summaries_says_how_far_it_is(data, tmp_path, monkeypatch):
    texts = []

    def interrupted(*args, **options):
        texts.append(args[2])
        if len(texts) == 2:
            raise KeyboardInterrupt
        return "said"

    monkeypatch.setattr(script("summarize"), "summarize", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped: 1 of 2 summaries are in .*said\.jsonl; the same command"):
        summarize(data, tmp_path / "said.jsonl")
    assert len(summarize(data, tmp_path / "said.jsonl")) == 2
    assert len(texts) == 3


def test_one_text_file_can_be_summarised(data, tmp_path):
    text, output = data / "novels" / "validation" / "0.txt", tmp_path / "said.jsonl"
    options = ["--model", "tiny-llama", "--max_new_tokens", 3, "--device", "cpu", "--segment_length", 128]
    run("summarize", None, "--text_file", text, "--output", output, *options)
    assert json.loads(output.read_text(encoding="utf-8"))["id"] == str(text)
    for wrong in ([], ["--source", "pairs", "--text_file", text]):
        with pytest.raises(ValueError, match=r"source .* or text_file"):
            run("summarize", None, "--output", tmp_path / "none.jsonl", *options, *wrong)
    with pytest.raises(ValueError, match="max_text_tokens=0: must be at least 1"):
        run("summarize", None, "--output", tmp_path / "none.jsonl", *options, "--max_text_tokens", 0)
    with pytest.raises(ValueError, match=r"text .*/0\.tx: there is no such file \(did you mean .*/0\.txt\?\)"):
        run("summarize", None, "--text_file", text.with_suffix(".tx"), "--output", tmp_path / "none.jsonl", *options)


def test_an_adapter_is_loaded_as_the_model_arguments_say(adapted):
    """Precision and attention are those asked for, the patch is the adapter's."""
    arguments = ModelArguments("tiny-llama", dtype="float32", attn_implementation="eager")
    model, _ = arguments.load(adapted[0] / "final")
    assert model.config._attn_implementation == "eager"
    assert InfiniConfig.from_dict(model.config.infini_attention) == PATCH
    assert next(model.parameters()).dtype == torch.float32


# Tables.


def perplexity(data, *options):
    source = data / "novels" / "validation"
    small = ["--first_edge", 64, "--ways", "memory", "closed", "full:window=300"]
    # The config's own output is in the place of the user's.
    output = [] if "--output" in options else ["--output", data / "perplexity.md"]
    return run("evaluate", "eval/perplexity_tiny_cpu.yaml", "--source", source, *small, *output, *options)


def test_perplexity_with_an_adapter_is_that_of_the_merged_model(adapted, data, tmp_path):
    folder = adapted[0] / "final"
    merged = load_adapter(resolve("tiny-llama"), folder, dtype="float32").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(resolve("tiny-llama")).save_pretrained(tmp_path / "merged")
    expected = perplexity(data, "--model", tmp_path / "merged", "--dtype", "float32")
    found = perplexity(data, "--model", "tiny-llama", "--adapter", folder, "--dtype", "float32", "--overlap", 32)
    base = perplexity(data, "--model", "tiny-llama", "--dtype", "float32")
    assert found["losses"] == expected["losses"] != base["losses"]
    assert found["adapter"] == str(folder)


def test_the_perplexity_table_holds_the_means_of_score(pretrained, data, tmp_path):
    folder, output = pretrained[0] / "final", tmp_path / "tables" / "perplexity.md"
    numbers = perplexity(data, "--model", folder, "--output", output)
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == numbers
    ids = validation_ids(data)
    total = ids.shape[1] - 1
    edges = numbers["edges"]
    assert edges == [0, 64, 128, 256, 512, total]
    spans = list(pairwise(edges))
    assert numbers["tokens"] == [stop - start for start, stop in spans]
    model = AutoInfiniModelForCausalLM.from_pretrained(folder).eval()
    opened = score(model, ids)[0]
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    fresh = score(patch_model(AutoModelForCausalLM.from_pretrained(folder).eval(), PATCH), ids)[0]
    # Full attention in a window of 300 tokens that moves on by half of it.
    full = []
    for done, stop in ((0, 300), *((start, min(total, start + 150)) for start in range(300, total, 150))):
        start = max(0, stop - 300)
        # The beginning-of-text token stays, in place of the oldest.
        read = torch.cat([ids[:, :1], ids[:, start + 1 : stop]], dim=1)
        with torch.no_grad():
            logits = stock(read).logits[0, done - start :]
        full.append(torch.nn.functional.cross_entropy(logits, ids[0, done + 1 : stop + 1], reduction="none"))
    for name, losses in (("memory", opened), ("closed", fresh), ("full:window=300", torch.cat(full))):
        expected = [losses[start:stop].mean().item() for start, stop in spans]
        assert numbers["losses"][name] == pytest.approx(expected, rel=1e-5)
    table = output.read_text(encoding="utf-8")
    assert row_of(table, "memory")[0] == f"{opened[:64].mean().exp():.2f}"
    assert row_of(table, "tokens") == [f"{count:,}" for count in numbers["tokens"]]


def test_inside_the_first_segment_the_ways_to_read_agree(pretrained, data):
    losses = perplexity(data, "--model", pretrained[0] / "final", "--max_tokens", 129)["losses"]
    assert losses["memory"] == pytest.approx(losses["closed"], rel=1e-6)
    assert losses["memory"] == pytest.approx(losses["full:window=300"], rel=1e-5)


def test_texts_count_by_their_tokens(tmp_path):
    for number, words in enumerate((100, 300)):
        (tmp_path / f"{number}.txt").write_text(prose(words, number), encoding="utf-8")
    ways = ["--ways", "memory", "closed", "--output", tmp_path / "out" / "table.md"]
    numbers = run("evaluate", "eval/perplexity_tiny_cpu.yaml", "--source", tmp_path, "--limit", 2, *ways)
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    lengths = [len(tokenizer(prose(words, number))["input_ids"]) for number, words in enumerate((100, 300))]
    edges = numbers["edges"]
    spans = list(pairwise(edges))
    counts = [sum(max(0, min(stop, length) - start) for length in lengths) for start, stop in spans]
    assert numbers["tokens"] == counts
    assert set(numbers["losses"]) == {"memory", "closed"}


def write_said(path, summaries, references):
    path.parent.mkdir(exist_ok=True)
    pairs = zip(summaries, references, strict=True)
    rows = [{"id": str(index), "summary": said, "reference": right} for index, (said, right) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_rouge_table_holds_the_scores_of_every_file(tmp_path):
    references = ["The house is old.", "Nobody lives there."]
    files = {
        "lora": write_said(tmp_path / "lora.jsonl", ["The house is very old.", "Nobody is there."], references),
        "base": write_said(tmp_path / "base.jsonl", ["A lane.", "Nobody knows the house there."], references),
    }
    output = tmp_path / "rouge.md"
    numbers = run("evaluate", None, "--task", "rouge", "--predictions", *files.values(), "--output", output)
    for name, path in files.items():
        said = [json.loads(line)["summary"] for line in path.read_text(encoding="utf-8").splitlines()]
        expected = rouge_scores(said, references)
        assert numbers[name] == {**expected, "texts": 2}
        cells = [f"{expected[kind]:.2f}" for kind in ("rouge1", "rouge2", "rougeL", "overall")]
        assert row_of(output.read_text(encoding="utf-8"), name) == [*cells, "2"]
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == numbers


def test_files_of_one_name_stay_apart_in_the_table(tmp_path):
    paths = [write_said(tmp_path / folder / "said.jsonl", [folder], ["a text"]) for folder in ("text", "lane")]
    numbers = run("evaluate", None, "--task", "rouge", "--predictions", *paths)
    assert list(numbers) == [str(path) for path in paths]
    assert numbers[str(paths[0])]["rouge1"] > numbers[str(paths[1])]["rouge1"] == 0


def test_a_summary_that_was_cut_is_named(tmp_path):
    path = write_said(tmp_path / "said.jsonl", ["a"], ["b"])
    path.write_text(path.read_text(encoding="utf-8") + '{"id": "1", "summ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"said\.jsonl: line 2 was not written to its end"):
        run("evaluate", None, "--task", "rouge", "--predictions", path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "recall"], "task='recall': must be perplexity or rouge"),
        (["--task", "rouge"], "predictions: name the JSONL files"),
        ([], "source: name the texts"),
    ],
)
def test_evaluation_says_what_is_missing(options, message):
    with pytest.raises(ValueError, match=message):
        run("evaluate", None, *options)


# All scripts.


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script(name).main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown
    # The lines of the docstring, whose commands are copied from there.
    assert script(name).__doc__.strip() in shown


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("pretrain", ("ModelArguments", "DocumentArguments", "InfiniTrainingArguments")),
        ("finetune_booksum", ("ModelArguments", "LoraArguments", "PairArguments", "InfiniTrainingArguments")),
        ("summarize", ("ModelArguments", "SummaryArguments")),
        ("evaluate", ("OptionalModel", "EvaluationArguments")),
    ],
)
def test_every_option_has_its_line_of_help(name, classes, capsys):
    with pytest.raises(SystemExit):
        run(name, None, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    stock = {item.name for item in fields(TrainingArguments)}
    options = [item for kind in classes for item in fields(vars(script(name))[kind]) if item.name not in stock]
    assert len(options) > 15
    for item in options:
        words = item.metadata.get("help")
        assert words, f"--{item.name} has no help"
        assert f"--{item.name}" in shown
        assert " ".join(words.split()) in shown


@pytest.mark.slow
def test_a_script_runs_from_the_command_line(data, tmp_path):
    options = ["--task", "rouge", "--predictions", write_said(tmp_path / "said.jsonl", ["a lane"], ["a lane"])]
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| said | 100.00 |" in done.stdout


def test_the_command_in_a_card_can_be_typed_and_tells_no_secret():
    words = ["--prompt", "Read {text} and go on", "--hub_token", "hf_secret", "--hub-token=hf_other", "--seed", "1"]
    said = command_line("scripts/pretrain.py", words)
    assert said == (
        "python scripts/pretrain.py --prompt 'Read {text} and go on' --hub_token HUB_TOKEN --hub-token=HUB_TOKEN "
        "--seed 1"
    )
