"""A teacher with full attention: its divergence is that of whole rows, and nothing of it is changed."""

import pytest
import torch
from datasets import Dataset
from models import build, random_ids
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from training import (
    CARRY,
    SEGMENT,
    assert_same_gradients,
    gradients_of,
    logged,
    losses_of,
    make_trainer,
    tiny_model,
    uneven_rows,
    weights_of,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from infini_hf import InfiniCache, InfiniTrainingArguments
from infini_hf.distillation import Distillation
from infini_hf.segment_step import (
    IGNORED,
    StepObserver,
    StepOptions,
    cut_segments,
    segment_major_loss,
    shift_labels,
    shift_weights,
)


def teacher_of(family="llama", **overrides):
    return build(family, seed=7, **overrides)


def hard_batch():
    """Ids, mask, targets and weights: padding on the left and on the right, and two segments that are masked."""
    ids = random_ids(3, 45)
    mask = torch.ones_like(ids)
    mask[0, :11], mask[1, 30:] = 0, 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, 11] = IGNORED
    labels[2, SEGMENT : 3 * SEGMENT] = IGNORED
    weights = torch.ones(ids.shape)
    weights[:, 40:] = 3.0
    return ids, mask, shift_labels(labels), shift_weights(weights)


def naive(student, teacher, batch, items, weight, temperature):
    """Loss and divergence of whole rows at once, as sums over the vocabulary."""
    ids, mask, targets, weights = batch
    logits = student(ids, attention_mask=mask, use_cache=False).logits.double()
    with torch.no_grad():
        expected = teacher(ids, attention_mask=mask, use_cache=False).logits.double()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    ours, theirs = torch.softmax(logits / temperature, -1), torch.softmax(expected / temperature, -1)
    divergences = (theirs * (theirs.log() - ours.log())).sum(-1) * (targets != IGNORED) * temperature**2
    divergence = divergences.sum() / items
    return (losses * weights).sum() / items + weight * divergence, divergence


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_whole_rows(family, weight, temperature, recompute):
    student, teacher, batch = tiny_model(family, **CARRY).train(), teacher_of(family), hard_batch()
    expected, divergence = naive(student, teacher, batch, 50, weight, temperature)
    expected.backward()
    gradients = gradients_of(student)
    student.zero_grad()
    ids, mask, targets, weights = batch
    distillation, shares = Distillation(teacher, weight, temperature), []
    segments = distillation.read(cut_segments(ids, mask, targets, SEGMENT, weights=weights))
    loss, _ = segment_major_loss(
        student,
        segments,
        InfiniCache(student.config),
        50,
        StepOptions(recompute=recompute, distillation=distillation),
        StepObserver(divergence=shares.append),
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(shares) == len(segments)
    assert sum(shares).item() == pytest.approx(divergence.item(), rel=1e-5)
    assert divergence.item() > 0.1
    assert_same_gradients(gradients_of(student), gradients)
    assert not gradients_of(teacher)
    assert all(not share.requires_grad for share in shares)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_the_teacher_says_in_bfloat16_what_it_would_say_alone(family):
    teacher, ids = teacher_of(family).bfloat16(), random_ids(2, 3 * SEGMENT)
    distillation = Distillation(teacher)
    segments = distillation.read(cut_segments(ids, None, None, SEGMENT))
    with torch.no_grad():
        logits = torch.cat([distillation.head(segment.teacher) for segment in segments], dim=1)
        torch.testing.assert_close(logits, teacher(ids).logits.float(), rtol=0, atol=0.02 * logits.abs().max().item())


def test_own_weights_in_one_segment_do_not_diverge():
    student, ids = tiny_model(segment_length=64).train(), random_ids(2, 45)
    distillation, shares = Distillation(build("llama")), []
    segments = distillation.read(cut_segments(ids, None, shift_labels(ids), 64))
    options, observer = StepOptions(distillation=distillation), StepObserver(divergence=shares.append)
    segment_major_loss(student, segments, InfiniCache(student.config), 1, options, observer)
    assert [share.item() for share in shares] == pytest.approx([0.0], abs=1e-4)
    # The same weights over short segments, whose memory is read, see something else.
    short = tiny_model().train()
    segments = distillation.read(cut_segments(ids, None, shift_labels(ids), SEGMENT))
    segment_major_loss(short, segments, InfiniCache(short.config), 1, options, observer)
    assert shares[1].item() == pytest.approx(0.0, abs=1e-4)
    assert all(share.item() > 0.1 for share in shares[2:])


def test_the_teacher_speaks_of_one_segment_at_a_time(monkeypatch):
    student, (ids, mask, targets, _), spoken = tiny_model(**CARRY).train(), hard_batch(), []
    distillation = Distillation(teacher_of())
    head = distillation.head
    monkeypatch.setattr(distillation, "head", lambda hidden: spoken.append(len(hidden)) or head(hidden))
    segments = distillation.read(cut_segments(ids, mask, targets, SEGMENT))
    assert not spoken
    options = StepOptions(recompute=False, distillation=distillation)
    segment_major_loss(student, segments, InfiniCache(student.config), 1, options)
    # Of the positions that are learned from, and of no others.
    learned = [int((segment.targets != IGNORED).sum()) for segment in segments]
    assert spoken == learned
    assert 0 < max(learned) <= 3 * SEGMENT


def test_a_teacher_changes_the_run_and_is_left_as_it_was(tmp_path):
    teacher = teacher_of()
    before = weights_of(teacher)
    plain = make_trainer(tmp_path, rows=uneven_rows())
    alone = losses_of(plain)
    taught = make_trainer(tmp_path, rows=uneven_rows(), parts={"teacher": teacher.train()})
    losses = losses_of(taught)
    divergences = logged(taught, "distillation_kl")
    assert losses[0] == pytest.approx(alone[0] + divergences[0], rel=1e-5)
    assert min(divergences) > 0.1
    assert not logged(plain, "distillation_kl")
    after = weights_of(teacher)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not gradients_of(teacher)
    assert not teacher.training
    # What is saved is the student.
    assert not any(id(p) in {id(q) for q in teacher.parameters()} for p in taught.model.parameters())


def test_accumulated_rows_diverge_as_rows_at_once_in_every_step(tmp_path):
    """Two steps of the same rows by a model that stands still."""
    runs = [
        make_trainer(
            tmp_path,
            rows=uneven_rows()[:4],
            parts={"teacher": teacher_of()},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            distillation_weight=0.5,
            distillation_temperature=2.0,
            learning_rate=0.0,
            memory_gate_learning_rate=0.0,
        )
        for size in (4, 1)
    ]
    for run in runs:
        run.train()
    at_once, accumulated = runs
    divergences = logged(at_once, "distillation_kl")
    assert divergences == pytest.approx([divergences[0]] * 2, rel=1e-5)
    assert logged(accumulated, "distillation_kl") == pytest.approx(divergences, rel=1e-5)
    assert logged(accumulated, "loss") == pytest.approx(logged(at_once, "loss"), rel=1e-5)


def test_evaluation_knows_no_teacher(tmp_path):
    parts = {"eval_dataset": Dataset.from_list(uneven_rows())}
    expected = make_trainer(tmp_path, rows=uneven_rows(), parts=parts).evaluate()
    taught = make_trainer(tmp_path, rows=uneven_rows(), parts={"teacher": teacher_of(), **parts})
    found = taught.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    assert not any("distill" in name for name in found)


# Refused


def odd_head():
    """A family whose logits are scaled after the head."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("granite", vocab_size=97, logits_scaling=8.0, **shape)
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "meta-llama/Llama-3.2-1B", TypeError, "teacher is a str: pass a causal language model"),
        (lambda: AutoModel.from_config(build().config), TypeError, "teacher is a LlamaModel: pass a causal language"),
        (lambda: get_peft_model(build(), LoraConfig(r=2)), TypeError, "teacher is a PeftModel: pass a causal"),
        (tiny_model, ValueError, "the teacher is patched: it has to read with full attention; load another instance"),
        (
            lambda: build(vocab_size=98),
            ValueError,
            "vocabulary of 98 tokens and the student one of 97: take a teacher",
        ),
        (odd_head, NotImplementedError, "a teacher of type 'granite': its logits are not those of its output head"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, parts={"teacher": make()})


def test_rows_longer_than_the_teacher_are_refused(tmp_path):
    trainer = make_trainer(
        tmp_path, rows=uneven_rows(), parts={"teacher": teacher_of(max_position_embeddings=40)}, max_steps=1
    )
    with pytest.raises(ValueError, match=r"a row of 45 tokens, and the teacher has 40 positions .*use shorter rows"):
        trainer.train()


def test_options_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"distillation_weight=0\.5 without a teacher: pass InfiniTrainer\(teacher="):
        make_trainer(tmp_path, distillation_weight=0.5)
    with pytest.raises(ValueError, match="carry_memory=True with a teacher: the teacher sees a row alone"):
        make_trainer(tmp_path, carry_memory=True, parts={"teacher": teacher_of()})
    for name in ("distillation_weight", "distillation_temperature"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name}={value}: must be above 0"):
                InfiniTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})
