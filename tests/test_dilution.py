"""Memory dilution and weighted targets: what a row is scaled by, what a loss counts, and what a resumed run keeps."""

import math
from unittest import mock

import pytest
import torch
from models import build_patched, random_ids
from training import logged, make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniCache, InfiniTrainingArguments
from infini_hf.dilution import WINDOW, MemoryDilution
from infini_hf.segment_step import (
    StepObserver,
    StepOptions,
    cut_segments,
    segment_major_loss,
    shift_labels,
    shift_weights,
)

L = 8


def test_without_a_ramp_the_whole_strength_is_there_from_the_first_step():
    dilution = MemoryDilution(64.0, probability=1.0, ramp="none")
    for progress in (0.0, 0.5, 1.0):
        dilution.advance(progress)
        assert dilution.strength == 64.0
    dilution.restore(None)
    dilution.advance(0.0)
    assert dilution.strength == 64.0


def test_the_clock_raises_the_strength_log_linearly_between_a_third_and_two_thirds():
    dilution = MemoryDilution(1000.0, ramp="clock")
    found = {}
    for progress in (0.0, 0.3, 0.5, 0.7, 1.0):
        dilution.advance(progress)
        found[progress] = dilution.strength
    assert found[0.0] == found[0.3] == 1.0
    assert found[0.5] == pytest.approx(math.sqrt(1000))
    assert found[0.7] == found[1.0] == pytest.approx(1000)


def test_right_answers_double_the_strength_and_wrong_ones_do_not():
    dilution = MemoryDilution(5.0, ramp="accuracy", threshold=0.9)
    dilution.advance(1.0)
    dilution.note(WINDOW - 1, WINDOW - 1)
    assert dilution.strength == 1.0
    dilution.note(1, 1)
    assert dilution.strength == 2.0
    assert dilution.accuracy is None
    dilution.note(WINDOW // 2, WINDOW)
    assert (dilution.strength, dilution.accuracy) == (2.0, 0.5)
    # The wrong ones drop out of the window.
    dilution.note(WINDOW, WINDOW)
    assert dilution.strength == 4.0
    dilution.note(WINDOW, WINDOW)
    assert dilution.strength == 5.0
    again = MemoryDilution(5.0, ramp="accuracy")
    again.restore(dilution.state())
    assert again.state() == dilution.state()


def test_scales_are_one_or_log_uniform_up_to_the_strength():
    dilution = MemoryDilution(100.0, probability=0.25)
    assert dilution.draw(4, 5) is None
    dilution.strength = 100.0
    scale = dilution.draw(200, 50, 7)
    scaled = scale[scale != 1.0]
    assert scale.shape == (200, 50)
    assert scaled.numel() / scale.numel() == pytest.approx(0.25, abs=0.02)
    assert 1.0 < scaled.min() < 1.1
    assert 90 < scaled.max() <= 100
    assert scaled.log().mean().item() == pytest.approx(math.log(100) / 2, abs=0.1)


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_scaled_writes_have_the_gradients_of_both_orders(padded):
    model, ids = build_patched("llama", segment_length=L, overlap=3).train(), random_ids(2, 5 * L)
    scale = torch.tensor([[1.0, 30.0, 2.0, 1.0, 7.0], [4.0, 1.0, 1.0, 50.0, 1.0]])
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[0, :11] = 0
        labels[0, :12] = -100
    count = (labels[:, 1:] != -100).sum()
    options = {"attention_mask": mask, "labels": labels, "num_items_in_batch": count, "use_cache": False}
    model(ids, memory_scale=scale, **options).loss.backward()
    expected = gradients(model)
    model(ids, **options).loss.backward()
    plain = gradients(model)
    segments = cut_segments(ids, mask, shift_labels(labels), L)
    loss, _ = segment_major_loss(model, segments, InfiniCache(model.config), count, StepOptions(write_scale=scale))
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())
    key = "model.layers.0.self_attn.k_proj.weight"
    assert (plain[key] - expected[key]).abs().max() > 0.01 * plain[key].abs().max()


def test_weights_count_the_loss_of_a_target_as_often():
    model, ids = tiny_model().train(), random_ids(2, 3 * L)
    weights = torch.ones(2, 3 * L)
    weights[:, -4:] = 6.0
    weights[0, :5] = 0.0
    segments = cut_segments(ids, None, shift_labels(ids), L, weights=shift_weights(weights))
    counts = []
    observer = StepObserver(tally=counts.append)
    loss, _ = segment_major_loss(model, segments, InfiniCache(model.config), 10, observer=observer)
    logits = model(ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(loss, (losses * weights[:, 1:]).sum() / 10, rtol=1e-5, atol=0)
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:])[:, -4:].sum().item()
    assert torch.stack(counts).sum(0).tolist() == [right, 8]


def weighted_rows():
    """Rows whose last tokens are answers, one so easy that some are soon right."""
    rows = tiny_rows(documents=4, parts=1, last=40)
    for row in rows:
        ids = [*row["input_ids"][:-4], 5, 5, 5, 5]
        row.update(input_ids=ids, labels=ids, loss_weights=[1.0] * 36 + [9.0] * 4)
    return rows


def test_a_resumed_run_keeps_its_dilution(tmp_path, monkeypatch):
    monkeypatch.setattr("infini_hf.dilution.WINDOW", 8)
    options = {
        "memory_dilution": 64.0,
        "memory_dilution_ramp": "accuracy",
        "memory_dilution_threshold": 0.5,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = make_trainer(tmp_path, rows=weighted_rows(), **options)
    whole.train()
    strengths = [entry["memory_dilution"] for entry in whole.state.log_history if "memory_dilution" in entry]
    assert strengths[0] == 1.0
    assert strengths[-1] > strengths[5] >= 1.0
    resumed = make_trainer(tmp_path, rows=weighted_rows(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.dilution.state() == whole.dilution.state()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dilution_is_refused_where_it_means_nothing(tmp_path):
    with pytest.raises(ValueError, match="memory_update='linear'"):
        make_trainer(tmp_path, model=tiny_model(memory_update="delta"), memory_dilution=10.0)
    options = {"retrieval_weight": 1.0, "recompute_segments": False}
    with pytest.raises(ValueError, match=r"retrieval_weight=1.0 with memory_update='delta'"):
        make_trainer(tmp_path, model=tiny_model(memory_update="delta"), **options)
    for name, value in (
        ("memory_dilution", 0.5),
        ("memory_dilution_probability", 1.5),
        ("memory_dilution_threshold", -0.1),
        ("memory_dilution_ramp", "steps"),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            InfiniTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("answers", [0, 3])
def test_dilution_that_nothing_can_raise_is_warned_of_once(caplog, answers):
    dilution = MemoryDilution(1024.0, ramp="accuracy")
    dilution.note(answers, answers)
    for _ in range(2):
        dilution.metrics()
    assert caplog.text.count("memory_dilution=1024 by accuracy, and no answer was counted") == (answers == 0)


# Where a scale comes from


def test_every_micro_batch_of_every_rank_draws_its_own_scales_and_always_the_same():
    dilution = MemoryDilution(100.0)
    dilution.strength = 100.0
    places = [(seed, rank, step, micro) for seed in (0, 42) for rank in (0, 1) for step in (0, 7) for micro in (0, 1)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scales = [dilution.draw(2, 6, *place) for place in places]
    assert torch.equal(torch.get_rng_state(), before), "the draws take from the random numbers of dropout"
    for index, scale in enumerate(scales):
        assert torch.equal(scale, dilution.draw(2, 6, *places[index]))
        assert not any(torch.equal(scale, other) for other in scales[:index])


def scales_of(trainer, **options):
    """Train; the seed and the scales of every micro-batch."""
    drawn, draw = [], MemoryDilution.draw

    def noted(dilution, batch, segments, *seed):
        scale = draw(dilution, batch, segments, *seed)
        drawn.append((seed, None if scale is None else scale.tolist()))
        return scale

    with mock.patch.object(MemoryDilution, "draw", noted):
        trainer.train(**options)
    return drawn


def test_a_resumed_run_draws_what_the_whole_run_drew(tmp_path):
    """Under the clock, in steps of two micro-batches each: no random state is brought back for them."""
    options = {
        "memory_dilution": 64.0,
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "seed": 5,
    }
    drawn = scales_of(make_trainer(tmp_path, rows=weighted_rows(), **options))
    assert [seed for seed, _ in drawn] == [(5, 0, step, micro) for step in range(8) for micro in range(2)]
    assert all(scale is not None for _, scale in drawn[-8:])
    resumed = make_trainer(tmp_path, rows=weighted_rows(), **options)
    assert scales_of(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == drawn[8:]


@pytest.mark.parametrize("highest", [1.0, 2.0])
def test_a_resumed_run_dilutes_no_more_than_it_is_asked_to(tmp_path, monkeypatch, highest):
    monkeypatch.setattr("infini_hf.dilution.WINDOW", 4)
    options = {"memory_dilution_ramp": "accuracy", "memory_dilution_threshold": 0.0}
    save = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, rows=weighted_rows(), memory_dilution=64.0, **options, **save)
    whole.train()
    assert whole.dilution.strength > 2.0
    resumed = make_trainer(tmp_path, rows=weighted_rows(), memory_dilution=highest, max_steps=4, **options)
    ((_, scale),) = scales_of(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.dilution.strength == highest
    assert scale is None if highest == 1.0 else torch.tensor(scale).max() <= highest


def test_a_second_run_begins_without_the_strength_of_the_first(tmp_path):
    trainer = make_trainer(tmp_path, rows=weighted_rows(), memory_dilution=64.0, memory_dilution_ramp="accuracy")
    trainer.dilution.restore({"strength": 32.0, "answers": [(1, 2)]})
    trainer.answers.append(torch.tensor([7, 7]))
    trainer.train()
    assert logged(trainer, "memory_dilution") == [1.0, 1.0]
    assert sum(asked for _, asked in trainer.dilution.answers) == 2 * 8
