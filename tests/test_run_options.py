"""What a trainer takes from its arguments, its callbacks and its environment when a run begins."""

import sys

import pytest
import torch
from models import build, open_gates, random_ids
from training import logged, make_trainer, tiny_model, tiny_rows, uneven_rows
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from infini_hf import InfiniConfig, patch_model
from infini_hf.attention import InfiniAttention
from infini_hf.calibration import add_memory_projections
from infini_hf.callbacks import live_gates
from infini_hf.data.whole_stream import whole_stream
from infini_hf.lora import add_lora, lora_config


def test_arguments_that_are_set_on_a_trainer_count(tmp_path):
    """As a search over hyperparameters sets them, beside `model_init`."""
    options = {"memory_dilution": 100.0, "memory_dilution_ramp": "none", "bptt_segments": 1}
    expected = make_trainer(tmp_path, rows=tiny_rows(), **options)
    expected.train()
    trainer = make_trainer(tmp_path, rows=tiny_rows())
    for name, value in options.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.options.bptt_segments == 1
    assert logged(trainer, "loss") == logged(expected, "loss")
    plain = make_trainer(tmp_path, rows=tiny_rows())
    plain.train()
    assert logged(plain, "loss") != logged(expected, "loss")


def test_what_cannot_work_is_refused_when_it_is_set_later(tmp_path):
    trainer = make_trainer(tmp_path, rows=tiny_rows())
    trainer.args.memory_dilution = 4.0
    trainer.model.config.infini_attention["memory_update"] = "delta"
    with pytest.raises(ValueError, match=r"memory_dilution=4\.0 with memory_update='delta'"):
        trainer.train()


def test_a_model_that_is_made_anew_may_have_other_segments(tmp_path):
    lengths = iter((8, 8, 16))

    def model_init():
        model = tiny_model()
        config = InfiniConfig(segment_length=next(lengths))
        return open_gates(patch_model(model.__class__(model.config), config)).train()

    trainer = make_trainer(tmp_path, parts={"model": None, "model_init": model_init}, rows=tiny_rows())
    trainer.train()
    trainer.train()
    assert trainer.lanes.config.infini_attention["segment_length"] == 16


def test_noise_that_is_scaled_by_the_tokens_of_a_call_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match=r"neftune_noise_alpha=5.0: .* the stock Trainer"):
        make_trainer(tmp_path, neftune_noise_alpha=5.0)


class Bar(ProgressCallback):
    def __init__(self, place):
        super().__init__()
        self.place = place


class Lines(PrinterCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs)


def test_callbacks_of_the_user_stay_and_the_stock_ones_are_quiet(tmp_path):
    bar, lines = Bar("here"), Lines()
    stock = make_trainer(tmp_path, parts={"callbacks": [ProgressCallback(max_str_len=7)]}, disable_tqdm=True)
    assert [vars(one).get("max_str_len") for one in stock.callback_handler.callbacks].count(7) == 1
    trainer = make_trainer(tmp_path, parts={"callbacks": [bar, lines]}, disable_tqdm=False)
    assert bar in trainer.callback_handler.callbacks
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ProgressCallback not in kinds
    assert [kind.__name__ for kind in kinds].count("ProgressCallback") == 1
    trainer.train()
    assert [entry["loss"] for entry in lines.seen if "loss" in entry] == logged(trainer, "loss")


@pytest.mark.parametrize("kind", [None, "mixed"])
def test_a_memory_that_was_cast_is_trained_in_float32(tmp_path, caplog, kind):
    model = tiny_model(feature_map="exp").to(torch.bfloat16)
    add_memory_projections(model, mix_heads=kind == "mixed")
    model = model.to(torch.bfloat16)
    gate = model.model.layers[0].self_attn.memory_gate
    before = gate.query_projection.weight.detach().float()
    trainer = make_trainer(tmp_path, model=model, rows=uneven_rows())
    trainer.train()
    assert "the gates of the memory are torch.bfloat16: they are trained in float32" in caplog.text
    assert gate.bias.dtype == gate.query_projection.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    largest = before.abs() == before.abs().max()
    # Steps of 1e-3 from 1, which bfloat16 cannot take.
    assert (gate.query_projection.weight.detach() - before)[largest].abs().max() > 1e-4


def test_a_memory_that_was_cast_goes_on_where_it_was(tmp_path):
    """What is stored in float32 is not rounded on its way back."""
    options = {"rows": uneven_rows(), "memory_gate_learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, model=tiny_model().to(torch.bfloat16), max_steps=2, **options)
    whole.train()
    resumed = make_trainer(tmp_path, model=tiny_model().to(torch.bfloat16), max_steps=3, **options)
    begun = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begun.extend(gate.bias.detach().clone() for gate in live_gates(model).values())

    resumed.add_callback(Begin())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, gate in zip(begun, live_gates(whole.model).values(), strict=True):
        assert torch.equal(ours, gate.bias)
        assert not torch.equal(ours, ours.bfloat16().float())


def test_a_memory_that_was_cast_is_trained_in_float32_by_an_optimizer_made_by_hand(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    parts = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-4), None)}
    before = {index: gate.bias.detach().float() for index, gate in live_gates(model).items()}
    make_trainer(tmp_path, model=model, rows=uneven_rows(), parts=parts).train()
    for index, gate in live_gates(model).items():
        assert gate.bias.dtype == torch.float32
        assert not torch.equal(gate.bias, before[index])


def test_options_of_the_teacher_that_are_set_later_count(tmp_path):
    options = {"distillation_weight": 0.25, "distillation_temperature": 7.0}
    expected = make_trainer(tmp_path, rows=tiny_rows(), parts={"teacher": build(seed=7)}, **options)
    expected.train()
    trainer = make_trainer(tmp_path, rows=tiny_rows(), parts={"teacher": build(seed=7)})
    for name, value in options.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert logged(trainer, "loss") == logged(expected, "loss")


def test_the_gates_that_are_watched_are_those_of_the_active_adapter(tmp_path):
    model = tiny_model()
    peft_model = add_lora(model, target_modules=["q_proj"], r=4)
    peft_model.add_adapter("second", lora_config(model, target_modules=["q_proj"], r=4))
    for active in ("default", "second"):
        peft_model.set_adapter(active)
        trainer = make_trainer(tmp_path, model=peft_model, memory_gate_learning_rate=0.5, max_steps=2)
        trainer.train()
        assert logged(trainer, "memory_gate_moved")[-1] == 1.0
        layers = [module for module in model.modules() if isinstance(module, InfiniAttention)]
        for layer in layers:
            assert layer.memory_gate.itself is layer.memory_gate.modules_to_save[active]
            mean = layer.memory_gate.modules_to_save[active].bias.tanh().mean().item()
            assert logged(trainer, f"memory_gate/layer_{layer.layer_idx}/mean")[-1] == pytest.approx(mean)


def test_one_process_needs_no_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = [random_ids(1, 8)]
    assert whole_stream(rows, 1) is rows
