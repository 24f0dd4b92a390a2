"""`InfiniTrainer` trains what the stock trainer trains, keeps what it can do, and says what it cannot."""

import copy
import dataclasses
import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from models import FAMILIES, build, gate_parameters, random_ids
from peft import LoraConfig, get_peft_model
from reading import assert_close, read_whole
from training import (
    CARRY,
    SEGMENT,
    StubTokenizer,
    assert_equal_tensors,
    assert_same_gradients,
    first_gradients,
    logged,
    losses_of,
    make_trainer,
    tiny_model,
    uneven_rows,
    weights_of,
)
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator

from infini_hf import InfiniConfig, InfiniTrainingArguments, patch_model, score
from infini_hf.callbacks import MemoryGateCallback, gate_values
from infini_hf.data.collator import InfiniCollator
from infini_hf.trainer_checks import refuse_what_cannot_work

# Gradients as the optimizer would see them without clipping.
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}
IGNORED = -100

# Its older name is deprecated in newer versions of transformers.
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"


def equal_rows(count=4, length=40):
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(count, length).tolist()]


# The same gradients


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_four_rows_at_once_are_four_rows_accumulated(tmp_path, family):
    at_once = first_gradients(
        make_trainer(tmp_path, tiny_model(family, **CARRY), uneven_rows(), per_device_train_batch_size=4, **ONE_STEP)
    )
    accumulated = first_gradients(
        make_trainer(
            tmp_path,
            tiny_model(family, **CARRY),
            uneven_rows(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            **ONE_STEP,
        )
    )
    assert_same_gradients(accumulated, at_once)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_are_those_of_the_stock_trainer(tmp_path, family, checkpointing):
    options = {"gradient_accumulation_steps": 2, **ONE_STEP}
    ours = first_gradients(make_trainer(tmp_path, tiny_model(family, **CARRY), uneven_rows(), **options))
    if checkpointing is not None:
        options |= {
            CHECKPOINTING: True,
            f"{CHECKPOINTING}_kwargs": {"use_reentrant": checkpointing},
        }
    stock = make_trainer(tmp_path, tiny_model(family, **CARRY), uneven_rows(), kind=Trainer, **options)
    assert_same_gradients(ours, first_gradients(stock))
    assert any(layer.gradient_checkpointing for layer in stock.model.model.layers) is (checkpointing is not None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_at_padding_are_learned_and_counted_as_by_the_stock_trainer(tmp_path, side):
    rows = []
    for number, length in enumerate((20, 11)):
        ids, mask = random_ids(1, length, seed=number)[0].tolist(), [1] * length
        padding = [0] * (6 * SEGMENT - length)
        pieces = (ids + padding, mask + padding) if side == "right" else (padding + ids, padding + mask)
        rows.append({"input_ids": pieces[0], "labels": pieces[0], "attention_mask": pieces[1]})
    options = {"parts": {"data_collator": default_data_collator}, **ONE_STEP}
    ours = make_trainer(tmp_path, tiny_model(), rows, **options)
    stock = make_trainer(tmp_path, tiny_model(), rows, kind=Trainer, **options)
    assert_same_gradients(first_gradients(ours), first_gradients(stock))
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    ours.args.per_device_eval_batch_size = 1
    alone = ours.evaluate(Dataset.from_list(rows))
    ours.args.per_device_eval_batch_size = 2
    together = ours.evaluate(Dataset.from_list(rows))
    assert alone["eval_tokens"] == together["eval_tokens"] == 2 * (6 * SEGMENT - 1)
    assert alone["eval_loss"] == pytest.approx(together["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_smoothed_labels_give_the_loss_of_the_stock_trainer(tmp_path, family):
    options = {"label_smoothing_factor": 0.2, **ONE_STEP}
    ours = make_trainer(tmp_path, tiny_model(family), uneven_rows(), **options)
    stock = make_trainer(tmp_path, tiny_model(family), uneven_rows(), kind=Trainer, **options)
    assert_same_gradients(first_gradients(ours), first_gradients(stock))
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    plain = make_trainer(tmp_path, tiny_model(family), uneven_rows(), max_steps=1)
    assert losses_of(plain)[0] != pytest.approx(logged(ours, "loss")[0], rel=1e-3)


def test_truncation_and_offloading_are_what_the_arguments_say(tmp_path):
    def gradients(**options):
        return first_gradients(make_trainer(tmp_path, tiny_model(**CARRY), uneven_rows(), **ONE_STEP, **options))

    exact = gradients()
    assert_equal_tensors(gradients(recompute_segments=False), exact)
    assert_equal_tensors(gradients(offload_memory_states=True), exact)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (gradients(bptt_segments=1)[name] - exact[name]).abs().max() > 0.01 * exact[name].abs().max()


def test_a_batch_in_which_nothing_is_learned_has_loss_zero(tmp_path):
    rows = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in uneven_rows()[:2]]
    trainer = make_trainer(tmp_path, rows=[*rows, *uneven_rows()[:2]])
    losses = losses_of(trainer)
    assert losses[0] == 0.0
    assert losses[1] > 1
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_a_loss_that_is_asked_for_alone_is_the_mean_over_its_tokens(tmp_path):
    rows, model = uneven_rows()[:3], tiny_model()
    trainer = make_trainer(tmp_path, model)
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(scored_alone(model, rows).mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves_in_one_step(tmp_path, family):
    model = tiny_model(family)
    before = weights_of(model)
    make_trainer(tmp_path, model, equal_rows(), max_steps=1).train()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


# The gates


def groups_of(trainer):
    """Names, learning rate and decay of every group of the optimizer."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return [([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["memory_gate"]))


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
def test_the_gates_have_a_group_of_their_own(tmp_path, wrap):
    options = {"weight_decay": 0.1, "memory_gate_learning_rate": 0.03}
    trainer = make_trainer(tmp_path, wrap(tiny_model()), **options)
    groups = groups_of(trainer)
    names, rate, decay = groups[-1]
    assert len(names) == 2
    assert all("memory_gate" in name and name.endswith("bias") for name in names)
    assert (rate, decay) == (0.03, 0.0)
    assert not any("memory_gate" in name for names, _, _ in groups[:-1] for name in names)
    assert {rate for _, rate, _ in groups[:-1]} == {1e-3}
    assert {decay for names, _, decay in groups[:-1] if names} <= {0.1, 0.0}
    everything = [name for names, _, _ in groups for name in names]
    assert sorted(everything) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_lora_trains_adapters_and_gates_and_nothing_else(tmp_path):
    model = lora(tiny_model())
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, equal_rows(), memory_gate_learning_rate=0.1)
    trainer.train()
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("memory_gate" in name for name in moved)
    assert logged(trainer, "memory_gate_moved")[-1] > 0


def test_frozen_gates_make_no_group(tmp_path):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory_gate" not in name)
    groups = groups_of(make_trainer(tmp_path, model, equal_rows()))
    assert not any("memory_gate" in name for names, _, _ in groups for name in names)


def test_the_schedule_scales_both_rates(tmp_path):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 6, "max_grad_norm": 0.5}
    trainer, rates = make_trainer(tmp_path, rows=uneven_rows(), **options), []
    trainer.add_callback(NoteRates(rates))
    trainer.train()
    shares = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert [rate for rate, _ in rates] == pytest.approx([1e-3 * share for share in shares])
    assert [gates for _, gates in rates] == pytest.approx([1e-2 * share for share in shares])
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3 * share for share in shares])


class NoteRates(MemoryGateCallback):
    """Keeps the learning rates of the first and of the last group before every step."""

    def __init__(self, rates):
        super().__init__(plot=False)
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.rates.append((groups[0]["lr"], groups[-1]["lr"]))


def test_the_log_has_every_layer_and_the_console_does_not(tmp_path, capsys):
    for tqdm in (True, False):
        trainer = make_trainer(tmp_path, rows=uneven_rows(), disable_tqdm=not tqdm, memory_gate_learning_rate=0.5)
        start = gate_values(trainer.model)
        trainer.train()
        shown = capsys.readouterr().out
        assert "memory_gate_moved" in shown
        assert "memory_gate/" not in shown
        assert "'loss'" in shown
        entry = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
        gates = gate_values(trainer.model)
        for layer in range(2):
            name = f"memory_gate/layer_{layer}/"
            assert entry[f"{name}mean"] == pytest.approx(gates[layer].mean().item())
            assert entry[f"{name}min"] == pytest.approx(gates[layer].min().item())
            assert entry[f"{name}max"] == pytest.approx(gates[layer].max().item())
            moved = ((gates[layer] - start[layer]).abs() > 0.01).float().mean().item()
            assert entry[f"{name}moved"] == pytest.approx(moved)
            assert entry[f"{name}memory_norm"] > 0
        assert entry["memory_gate_moved"] > 0


def test_the_gradient_that_reaches_the_writes_is_logged(tmp_path):
    names = [f"memory_gate/layer_{layer}/write_gradient" for layer in range(2)]
    exact = make_trainer(tmp_path, rows=uneven_rows())
    exact.train()
    assert all(len(logged(exact, name)) == 2 and min(logged(exact, name)) > 0 for name in names)
    cut = make_trainer(tmp_path, rows=uneven_rows(), bptt_segments=1)
    cut.train()
    assert all(logged(cut, name) == [] for name in names)
    assert len(logged(cut, "memory_gate/layer_0/memory_norm")) == 2
    often, seldom = (make_trainer(tmp_path, rows=equal_rows(8), max_steps=4, logging_steps=n) for n in (1, 2))
    often.train()
    seldom.train()
    assert all(logged(seldom, name) == logged(often, name)[1::2] for name in names)


def test_the_gradient_that_reaches_the_writes_is_that_of_the_whole_step(tmp_path):
    """Of four rows of unequal length, the last of them too short to write what is read again."""
    found = []
    for size in (4, 1):
        trainer = make_trainer(
            tmp_path,
            tiny_model(**CARRY),
            [*uneven_rows()[:3], *equal_rows(1, 7)],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **ONE_STEP,
        )
        trainer.train()
        found.append([logged(trainer, f"memory_gate/layer_{layer}/write_gradient")[0] for layer in range(2)])
    assert min(found[0]) > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


class Partitioned:
    """Stands in for the gathering of ZeRO-3: parameters that are empty outside of it."""

    def __init__(self, parameters):
        self.parameters = parameters

    @classmethod
    def divide(cls, parameters):
        for parameter in parameters:
            parameter.ds_id, parameter.ds_tensor = 0, parameter.data
            parameter.data = torch.empty(0)

    def __enter__(self):
        for parameter in self.parameters:
            parameter.data = parameter.ds_tensor.clone()

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


def test_gates_of_which_a_rank_holds_a_part_are_gathered(monkeypatch):
    model = tiny_model()
    expected, biases = gate_values(model), list(gate_parameters(model).values())
    monkeypatch.setattr("infini_hf.sharding.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Partitioned))
    )
    Partitioned.divide(biases)
    assert_equal_tensors(gate_values(model), expected)
    assert all(bias.numel() == 0 for bias in biases)
    assert MemoryGateCallback().metrics(model)["memory_gate/layer_1/mean"] == pytest.approx(expected[1].mean().item())


@pytest.mark.parametrize(
    ("options", "length", "warnings"),
    [
        ({}, 40, ["the gates can hardly move: learning rate 0.01 × 2 steps = 0.02"]),
        ({"memory_gate_learning_rate": 1.9}, 40, ["the gates can hardly move: learning rate 1.9 × 2 steps = 3.8"]),
        ({"memory_gate_learning_rate": 2.0}, 40, []),
        ({"memory_gate_learning_rate": 2.0, "warmup_steps": 1}, 40, []),
        ({"memory_gate_learning_rate": 2.0}, 24, ["rows of at most 3 segments"]),
        ({}, 16, ["the gates can hardly move", "rows of at most 2 segments"]),
    ],
)
def test_gates_that_cannot_learn_are_warned_of_once(tmp_path, caplog, options, length, warnings):
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        make_trainer(tmp_path, rows=equal_rows(8, length), **options).train()
    messages = [record.getMessage() for record in caplog.records if record.name == "infini_hf.callbacks"]
    assert len(messages) == len(warnings)
    assert all(message.startswith(start) for message, start in zip(messages, warnings, strict=True))


def test_adapters_without_gates_are_warned_of(tmp_path, caplog):
    """What a LoRA of PEFT's own makes of a fresh patch: gates at zero for ever."""
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    told = "no gate is trained, and all are at zero: the memory is written and never read"
    for gates, modules, warned in ((0.0, None, True), (0.5, None, False), (0.0, ["memory_gate"], False)):
        model = patch_model(build("llama"), InfiniConfig(SEGMENT))
        with torch.no_grad():
            for bias in gate_parameters(model).values():
                bias.fill_(gates)
        adapted = get_peft_model(model, LoraConfig(**options, modules_to_save=modules))
        caplog.clear()
        make_trainer(tmp_path, adapted, equal_rows(4), max_steps=1).train()
        assert (told in caplog.text) == warned


def test_the_gates_are_drawn_at_the_end(tmp_path, caplog, monkeypatch):
    pytest.importorskip("matplotlib")
    make_trainer(tmp_path, rows=equal_rows(), plot_memory_gates=True).train()
    assert (tmp_path / "memory_gates.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "memory_gates.png").unlink()
    make_trainer(tmp_path, rows=equal_rows()).train()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    make_trainer(tmp_path, rows=equal_rows(), plot_memory_gates=True).train()
    assert not (tmp_path / "memory_gates.png").exists()
    assert "no picture of the gates: install matplotlib" in caplog.text


# Evaluation


def scored_alone(model, rows):
    """Loss of every token of every row, each row read alone."""
    losses = []
    for row in rows:
        targets = torch.tensor(row["labels"][1:]) != IGNORED
        losses.append(score(model, [row["input_ids"]], progress=False)[0][targets])
    return torch.cat(losses).double()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_evaluation_loss_is_the_mean_over_all_tokens(tmp_path, family):
    rows, model = uneven_rows(), tiny_model(family, **CARRY)
    trainer = make_trainer(tmp_path, model, parts={"eval_dataset": Dataset.from_list(rows)})
    metrics = trainer.evaluate()
    expected = scored_alone(model, rows)
    # Seven rows in batches of two: the last is not full.
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert metrics["eval_tokens"] == expected.numel()


def test_metrics_are_computed_from_the_logits_of_whole_rows(tmp_path):
    rows, model, seen = uneven_rows(), tiny_model(), []

    def compute_metrics(prediction):
        seen.append(prediction)
        right = (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]) & (
            prediction.label_ids[:, 1:] != IGNORED
        )
        return {"right": int(right.sum())}

    # With columns that are padding in every row, which the loss alone would leave out.
    collator = InfiniCollator(StubTokenizer(), pad_to_multiple_of=16)
    parts = {"eval_dataset": Dataset.from_list(rows), "compute_metrics": compute_metrics, "data_collator": collator}
    trainer = make_trainer(tmp_path, model, parts=parts)
    metrics = trainer.evaluate()
    longest = 48
    assert seen[0].predictions.shape == (7, longest, model.config.vocab_size)
    assert seen[0].label_ids.shape == (7, longest)
    right = 0
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        expected = read_whole(model, torch.tensor([row["input_ids"]]))[0]
        assert_close(torch.from_numpy(seen[0].predictions[index, :length]), expected)
        assert seen[0].label_ids[index].tolist() == row["labels"] + [IGNORED] * (longest - length)
        right += sum(int(expected[at].argmax()) == label for at, label in enumerate(row["labels"][1:]))
    assert metrics["eval_right"] == right
    assert metrics["eval_loss"] == pytest.approx(scored_alone(model, rows).mean().item(), rel=1e-6)


def test_predicting_needs_no_labels(tmp_path):
    model, ids = tiny_model(**CARRY), random_ids(5, 29)
    trainer = make_trainer(tmp_path, model, parts={"data_collator": default_data_collator})
    output = trainer.predict(Dataset.from_list([{"input_ids": row} for row in ids.tolist()]))
    assert_close(torch.from_numpy(output.predictions), read_whole(model, ids))
    assert output.label_ids is None
    assert "test_loss" not in output.metrics


def test_evaluation_during_training_changes_nothing(tmp_path):
    parts = {"eval_dataset": Dataset.from_list(uneven_rows())}
    quiet = make_trainer(tmp_path, rows=uneven_rows(), max_steps=3)
    losses = losses_of(quiet)
    loud = make_trainer(tmp_path, rows=uneven_rows(), max_steps=3, parts=parts, eval_strategy="steps", eval_steps=1)
    assert losses_of(loud) == losses
    assert_equal_tensors(weights_of(loud.model), weights_of(quiet.model))
    assert logged(loud, "eval_loss")[-1] == pytest.approx(scored_alone(loud.model.eval(), uneven_rows()).mean().item())


# What the stock trainer can do


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # A rate at which every step makes it worse.
    options = {"learning_rate": 1.0, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    parts = {"eval_dataset": Dataset.from_list(uneven_rows())}
    trainer = make_trainer(
        tmp_path, rows=uneven_rows(), parts=parts, save_strategy="steps", load_best_model_at_end=True, **options
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_global_step == 1 + losses.index(min(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))


def test_callbacks_can_end_the_run(tmp_path):
    options = {"learning_rate": 1.0, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    parts = {"eval_dataset": Dataset.from_list(uneven_rows()), "callbacks": [EarlyStoppingCallback(2)]}
    trainer = make_trainer(
        tmp_path, rows=uneven_rows(), parts=parts, save_strategy="steps", metric_for_best_model="eval_loss", **options
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == trainer.state.global_step < 8


def test_gradients_are_clipped(tmp_path):
    trainer = make_trainer(tmp_path, rows=uneven_rows(), max_steps=1, max_grad_norm=0.5)
    clipped = first_gradients(trainer)
    free = first_gradients(make_trainer(tmp_path, rows=uneven_rows(), **ONE_STEP))
    norm = torch.stack([gradient.norm() for gradient in free.values()]).norm().item()
    assert norm > 1
    assert_same_gradients(clipped, {name: 0.5 / norm * gradient for name, gradient in free.items()})
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm, rel=1e-5)


def test_a_streamed_dataset_trains_like_the_one_it_comes_from(tmp_path):
    stream = Dataset.from_list(uneven_rows()).to_iterable_dataset()
    expected = losses_of(make_trainer(tmp_path, rows=uneven_rows(), max_steps=3))
    assert losses_of(make_trainer(tmp_path, rows=stream, max_steps=3)) == expected


def test_a_model_can_come_from_a_function(tmp_path):
    expected = losses_of(make_trainer(tmp_path, rows=uneven_rows()))
    parts = {"model": None, "model_init": lambda: tiny_model()}
    trainer = make_trainer(tmp_path, rows=uneven_rows(), parts=parts)
    assert losses_of(trainer) == expected
    assert trainer.model.config.use_cache is True


def test_rows_are_collated_with_the_tokenizer_alone(tmp_path):
    parts = {"data_collator": None, "processing_class": StubTokenizer()}
    assert losses_of(make_trainer(tmp_path, rows=uneven_rows(), parts=parts)) == losses_of(
        make_trainer(tmp_path, rows=uneven_rows())
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_config_is_saved_as_it_came(tmp_path, use_cache):
    model = tiny_model()
    model.config.use_cache = use_cache
    before = model.config.to_dict()
    trainer = make_trainer(tmp_path, model, equal_rows())
    trainer.train()
    trainer.save_model()
    assert model.config.use_cache is use_cache
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["use_cache"] is use_cache
    assert saved["infini_attention"] == before["infini_attention"]


# Refused


def collated(**columns):
    """A collator whose batches have these columns too."""

    def collate(rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return {**batch, **{name: make(batch["input_ids"]) for name, make in columns.items()}}

    return collate


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {CHECKPOINTING: True},
            ValueError,
            r"activation_checkpointing .* leave it off.*recompute_segments",
        ),
        ({"offload_memory_states": True, "recompute_segments": False}, ValueError, "set recompute_segments=True"),
        ({"bptt_segments": 0}, ValueError, "bptt_segments=0: must be at least 1, or None"),
        ({"bptt_segments": -1}, ValueError, "bptt_segments=-1"),
        ({"memory_gate_learning_rate": -1.0}, ValueError, r"memory_gate_learning_rate=-1\.0: must be a number of at"),
        ({"memory_gate_learning_rate": math.nan}, ValueError, "memory_gate_learning_rate=nan: must be a number"),
        ({"memory_projection_learning_rate": math.inf}, ValueError, "memory_projection_learning_rate=inf"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps=0: must be at least 1"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        InfiniTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile=True: .* leave it out"),
        ({"carry_memory": True, "enable_jit_checkpoint": True}, "enable_jit_checkpoint with carry_memory=True"),
    ],
)
def test_what_was_not_tried_or_cannot_be_resumed_is_refused(tmp_path, options, message):
    args = InfiniTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    # Set afterwards: the arguments leave their wish to compile in the environment of the process.
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(NotImplementedError, match=message):
        make_trainer(tmp_path, parts={"args": args})


def test_lanes_of_batches_that_processes_share_are_refused(tmp_path, monkeypatch):
    """The rows would be dealt to twice as many lanes as there are, and the error would say to do what is done."""
    args = InfiniTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, carry_memory=True)
    args.accelerator_config.split_batches = True
    trainer = make_trainer(tmp_path, parts={"args": args})
    monkeypatch.setattr(InfiniTrainingArguments, "world_size", 2)
    with pytest.raises(NotImplementedError, match=r"split_batches with carry_memory=True"):
        refuse_what_cannot_work(trainer)


def test_a_launcher_that_compiles_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.accelerator.state, "dynamo_plugin", TorchDynamoPlugin(backend="eager"))
    with pytest.raises(NotImplementedError, match=r"dynamo_backend='EAGER' of accelerate: .* set it to no"):
        refuse_what_cannot_work(trainer)


def test_arguments_are_stored_without_the_token_of_the_hub(tmp_path):
    args = InfiniTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, hub_token="hf_secret")
    assert copy.deepcopy(args).hub_token == copy.copy(args).hub_token == args.hub_token == "hf_secret"
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert again.to_dict() == dataclasses.replace(args, hub_token=None).to_dict()


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"compute_loss_func": lambda *_: 0.0}, NotImplementedError, "compute_loss_func .* use the stock Trainer"),
        (
            {"args": TrainingArguments("x", report_to=[])},
            TypeError,
            "args is a TrainingArguments: pass infini_hf.Infini",
        ),
        ({"model": build()}, ValueError, r"this LlamaForCausalLM is not patched: call infini_hf\.patch_model"),
        ({"model": "meta-llama/Llama-3.2-1B"}, TypeError, "model is a str: pass a patched model"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused(tmp_path, parts, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, parts=parts)


@pytest.mark.parametrize(
    ("rows", "collator", "message"),
    [
        (
            equal_rows(),
            collated(position_ids=torch.ones_like),
            r"the batch has \['position_ids'\], which InfiniTrainer does",
        ),
        (equal_rows(), collated(labels=lambda ids: None), "the batch has no labels: InfiniTrainer trains on `labels`"),
        ([{"input_ids": [5, 6, 7]}] * 4, None, "row 0 of the batch has no labels: add labels"),
        ([*equal_rows(1), {"input_ids": [], "labels": []}], None, "row 1 of the batch is empty: leave it out"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path, rows, collator, message):
    parts = {} if collator is None else {"data_collator": collator}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows, parts=parts).train()


# Layer-major: other trainers


def test_the_stock_trainer_resumes_a_patched_model(tmp_path):
    options = {"kind": Trainer, "rows": uneven_rows(), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal_tensors(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_trl_trains_a_patched_model_through_its_gates(tmp_path):
    trl = pytest.importorskip("trl")
    model, rows = tiny_model(**CARRY), equal_rows()
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        max_length=None,
        **{CHECKPOINTING: True},
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collated(attention_mask=torch.ones_like),
        processing_class=tokenizer(),
    )
    gradients = first_gradients(trainer)
    ours = first_gradients(make_trainer(tmp_path, tiny_model(**CARRY), rows, **ONE_STEP))
    assert_same_gradients(gradients, ours)


def tokenizer():
    from infini_hf.data.base_rows import train_tokenizer

    return train_tokenizer(["one two three"], vocab_size=260)
