"""One step segment by segment: the gradients of the whole row, at the memory of one segment."""

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, VOCABULARY, random_ids
from reading import assert_close, assert_same_state, read, read_whole
from torch.autograd.graph import saved_tensors_hooks
from training import CARRY, SEGMENT, assert_equal_tensors, assert_same_gradients, gradients_of, tiny_model
from transformers.trainer_pt_utils import LabelSmoother

from infini_hf import InfiniCache, score, segment_step
from infini_hf.segment_step import (
    StepObserver,
    StepOptions,
    cut_segments,
    last_with_tokens,
    score_segments,
    segment_major_loss,
    shift_labels,
)

OPTIONS = {"plain": {}, "carry": CARRY}
IGNORED = -100


@dataclass
class Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def num_items(self):
        return (self.labels[:, 1:] != IGNORED).sum()

    def segments(self, length=SEGMENT, trim=True):
        return cut_segments(self.input_ids, self.attention_mask, shift_labels(self.labels), length, trim)


def hard_batch():
    """Padding on the left, on the right, and a row in which two whole segments are masked."""
    ids = random_ids(3, 45)
    mask = torch.ones_like(ids)
    mask[0, :11], mask[1, 30:] = 0, 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    # The first token after padding is predicted from padding, where what a stock layer computes is arbitrary.
    labels[0, 11] = IGNORED
    labels[2, SEGMENT : 3 * SEGMENT] = IGNORED
    return Batch(ids, mask, labels)


def layer_major(model, batch):
    """Loss and gradients of one call on the whole rows."""
    model.zero_grad()
    loss = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        use_cache=False,
    ).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def segment_major(model, batch, trim=True, cache=None, **options):
    """Loss and gradients of the same rows, segment after segment."""
    model.zero_grad()
    cache = InfiniCache(model.config) if cache is None else cache
    segments, options = batch.segments(trim=trim), StepOptions(**options)
    loss, _ = segment_major_loss(model, segments, cache, batch.num_items, options)
    loss.backward()
    return loss.detach(), gradients_of(model)


# Gradients


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_row(family, options):
    model, batch = tiny_model(family, **OPTIONS[options]).train(), hard_batch()
    expected, gradients = layer_major(model, batch)
    loss, ours = segment_major(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("options", [{"recompute": False}, {"offload": True}, {"bptt_segments": 6}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_neither_recomputation_nor_offloading_changes_a_gradient(family, options):
    model, batch = tiny_model(family, **CARRY).train(), hard_batch()
    expected, gradients = segment_major(model, batch)
    loss, ours = segment_major(model, batch, **options)
    assert torch.equal(loss, expected)
    assert_equal_tensors(ours, gradients)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_with_dropout_recomputation_meets_the_same_masks(family):
    model, batch = tiny_model(family, {"attention_dropout": 0.3}, **CARRY).train(), hard_batch()
    runs = []
    for options in ({}, {"recompute": False}, {"offload": True}):
        torch.manual_seed(3)
        runs.append(segment_major(model, batch, **options))
    for loss, gradients in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert_equal_tensors(gradients, runs[0][1])
    without, _ = segment_major(model.eval(), batch)
    assert not torch.equal(without, runs[0][0]), "dropout did nothing"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_that_continues_a_cache_is_one_call_on_that_cache(family):
    model, batch = tiny_model(family, **CARRY).train(), hard_batch()
    _, cache = read(model.eval(), random_ids(3, 21, seed=5))
    model.train().zero_grad()
    expected = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        past_key_values=copy.copy(cache),
        use_cache=True,
    ).loss
    expected.backward()
    gradients = gradients_of(model)
    before = copy.copy(cache)
    loss, ours = segment_major(model, batch, cache=cache)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients)
    assert_same_state(cache, before, 0)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_cache_after_the_step_is_that_of_reading(recompute):
    model, batch = tiny_model(**CARRY), hard_batch()
    options = StepOptions(recompute=recompute)
    cache = InfiniCache(model.config)
    _, after = segment_major_loss(model, batch.segments(), cache, batch.num_items, options)
    assert not cache.seen
    assert after.seen == (34, 30, 45)
    after.detach()
    _, expected = read(model, batch.input_ids, mask=batch.attention_mask)
    assert_same_state(after, expected)


def test_offloading_takes_the_states_of_all_segments_but_the_last_and_lets_them_go(monkeypatch):
    model, batch, taken, states = tiny_model(**CARRY).train(), hard_batch(), [], []

    class Spy(segment_step.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            # A copy, as from another device; on the CPU there would be none.
            self.pack_hook = lambda tensor: (tensor.device, taken.append(tensor.nbytes) or tensor.clone())

    def watch(index, cache):
        states.append([weakref.ref(tensor) for tensor in cache.tensors()])

    monkeypatch.setattr(segment_step, "save_on_cpu", Spy)
    segments, cache, options = batch.segments(), InfiniCache(model.config), StepOptions(offload=True)
    loss, after = segment_major_loss(model, segments, cache, batch.num_items, options, StepObserver(watch))
    # The first segment has nothing to continue; one state is like another, once the windows are full.
    assert 3 * after.state_bytes() < sum(taken) <= 4 * after.state_bytes()
    alive = [sum(reference() is not None for reference in references) for references in states]
    assert alive[:-1] == [0, 0, 0, 0, 0]
    assert alive[-1] > 0
    loss.backward()
    offloaded = gradients_of(model)
    taken.clear()
    assert_equal_tensors(segment_major(model, batch)[1], offloaded)
    assert not taken


# Truncation


def segments_reached(model, loss_in, **options):
    """The segments of a row whose embeddings get a gradient from the loss of segment `loss_in` alone."""
    count, width = 6, (VOCABULARY - 3) // 6
    # Every segment has tokens that no other has, so that the rows of the embedding tell the segments apart.
    ids = torch.cat([3 + width * s + random_ids(1, SEGMENT, seed=s) % width for s in range(count)], dim=1)
    labels = torch.full_like(ids, IGNORED)
    inside = slice(loss_in * SEGMENT + 1, (loss_in + 1) * SEGMENT)
    labels[:, inside] = ids[:, inside]
    _, gradients = segment_major(model, Batch(ids, torch.ones_like(ids), labels), **options)
    rows = gradients["model.embed_tokens.weight"].abs().sum(1)
    return [s for s in range(count) if rows[3 + width * s : 3 + width * (s + 1)].max() > 0]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_gradient_goes_back_as_many_segments_as_asked(family, options, recompute):
    model = tiny_model(family, **OPTIONS[options]).train()

    def reached(k, loss_in=5):
        return segments_reached(model, loss_in, bptt_segments=k, recompute=recompute)

    assert reached(1) == [5]
    assert reached(2) == [4, 5]
    assert reached(3) == [3, 4, 5]
    assert reached(None) == reached(6) == [0, 1, 2, 3, 4, 5]
    # Every so many segments there is a cut, the same for every loss.
    assert reached(2, loss_in=4) == [4]
    assert reached(4, loss_in=3) == [0, 1, 2, 3]


def test_truncation_changes_the_gradient_and_not_the_loss():
    model, batch = tiny_model(**CARRY).train(), hard_batch()
    whole, full = segment_major(model, batch)
    cut, truncated = segment_major(model, batch, bptt_segments=1)
    assert torch.equal(whole, cut)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (full[name] - truncated[name]).abs().max() > 0.01 * full[name].abs().max()


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_segment_in_which_nothing_is_learned_adds_zero(smoothing):
    model, batch = tiny_model().train(), hard_batch()
    batch.labels[:, 1 : 2 * SEGMENT + 1] = IGNORED
    segments = batch.segments()
    options = StepOptions(label_smoothing=smoothing)
    cache, losses = InfiniCache(model.config), []
    for segment in segments:
        loss, cache = segment_major_loss(model, [segment], cache, batch.num_items, options)
        losses.append(loss.item())
    assert losses[:2] == [0.0, 0.0]
    assert all(0 < loss < 100 for loss in losses[2:])
    loss, gradients = segment_major(model, batch, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(sum(losses))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_batch_in_which_nothing_is_learned_has_neither_loss_nor_gradient():
    model, batch = tiny_model().train(), hard_batch()
    batch.labels[:] = IGNORED
    loss, _ = segment_major_loss(model, batch.segments(), InfiniCache(model.config), 1)
    loss.backward()
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients_of(model).values())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_label_smoothing_is_that_of_transformers_on_the_whole_row(family):
    model, batch = tiny_model(family, **CARRY).train(), hard_batch()
    model.zero_grad()
    outputs = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    expected = LabelSmoother(epsilon=0.2)(outputs, batch.labels, shift_labels=True)
    expected.backward()
    gradients = gradients_of(model)
    loss, ours = segment_major(model, batch, label_smoothing=0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients)
    assert loss.item() != pytest.approx(segment_major(model, batch)[0].item(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_calls_that_fill_up_for_other_ranks_change_nothing(family):
    model, batch = tiny_model(family, **CARRY).train(), hard_batch()
    _, cache = read(model.eval(), random_ids(3, 13, seed=5))
    before = copy.copy(cache)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    expected, gradients = segment_major(model.train(), batch, cache=cache, recompute=False)
    usual = len(calls)
    loss, ours = segment_major(model, batch, cache=cache, recompute=False, filling=3)
    handle.remove()
    assert len(calls) == 2 * usual + 3
    assert torch.equal(loss, expected)
    assert_equal_tensors(ours, gradients)
    assert_same_state(cache, before, 0)


def test_only_the_last_segment_goes_through_the_wrapper():
    model, batch = tiny_model().train(), hard_batch()
    expected, gradients = segment_major(model, batch)
    calls = []

    def wrapper(**inputs):
        calls.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    loss, ours = segment_major(model, batch, wrapper=wrapper)
    assert calls == [45 % SEGMENT]
    assert torch.equal(loss, expected)
    assert_equal_tensors(ours, gradients)


# Cutting


def test_every_target_is_in_one_segment():
    batch = hard_batch()
    segments = batch.segments()
    assert [segment.input_ids.shape[1] for segment in segments] == [8, 8, 8, 8, 8, 5]
    assert torch.equal(torch.cat([segment.input_ids for segment in segments], dim=1), batch.input_ids)
    targets = torch.cat([segment.targets for segment in segments], dim=1)
    assert torch.equal(targets[:, :-1], batch.labels[:, 1:])
    assert (targets[:, -1] == IGNORED).all()


def test_columns_after_the_longest_row_are_left_out():
    batch = hard_batch()
    batch.attention_mask[:, 34:] = 0
    batch.labels[:, 34:] = IGNORED
    assert [segment.input_ids.shape[1] for segment in batch.segments()] == [8, 8, 8, 8, 2]
    assert sum(segment.input_ids.shape[1] for segment in batch.segments(trim=False)) == 45
    model = tiny_model(**CARRY).train()
    expected, gradients = segment_major(model, batch, trim=False)
    loss, ours = segment_major(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(ours, gradients)


def test_a_batch_of_padding_alone_is_one_segment():
    ids = random_ids(2, 20)
    segments = cut_segments(ids, torch.zeros_like(ids), None, SEGMENT)
    assert [segment.input_ids.shape[1] for segment in segments] == [1]


# Memory


def saved_bytes(model, count, recompute=True):
    """Bytes that the graph of a step over `count` segments keeps for its backward pass, and those of one state."""
    ids, total = random_ids(2, count * SEGMENT), []

    def pack(tensor):
        total.append(tensor.nbytes)
        return tensor

    cache, options = InfiniCache(model.config), StepOptions(recompute=recompute)
    segments = cut_segments(ids, None, shift_labels(ids), SEGMENT)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _, cache = segment_major_loss(model, segments, cache, ids.numel(), options)
    return sum(total), cache.state_bytes()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_keeps_the_activations_of_one_segment_and_a_state_for_each(family):
    model = tiny_model(family, **CARRY).train()
    (short, state), (long, _) = saved_bytes(model, 8), saved_bytes(model, 64)
    assert short < long <= short + 56 * state
    # The same measure sees what is kept without recomputation.
    plain_short, plain_long = saved_bytes(model, 8, False)[0], saved_bytes(model, 64, False)[0]
    assert plain_long - plain_short > 10 * 56 * state


# Scoring


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scoring_sums_what_score_returns_for_each_token(family):
    model, batch = tiny_model(family, **CARRY), hard_batch()
    batch.labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    batch.labels[0, 11] = IGNORED
    losses, counts, logits = score_segments(model, batch.segments(), InfiniCache(model.config))
    expected = score(model, batch.input_ids, batch.attention_mask, progress=False)
    assert_close(losses, expected.sum(1), 1e-6)
    assert counts.tolist() == [33, 29, 44]
    assert logits is None


def test_scoring_keeps_logits_where_asked_and_fills_up_for_other_ranks():
    model, batch = tiny_model(**CARRY), hard_batch()
    arguments = (model, batch.segments(), InfiniCache(model.config), True)
    losses, counts, logits = score_segments(*arguments, filling=2)
    real = batch.attention_mask.bool()
    assert_close(logits[real], read_whole(model, batch.input_ids, batch.attention_mask)[real])
    again = score_segments(model, batch.segments(), InfiniCache(model.config))
    assert torch.equal(losses, again[0])
    assert torch.equal(counts, again[1])


def test_rows_without_targets_are_read_and_not_scored():
    model, ids = tiny_model(), random_ids(2, 19)
    losses, counts, logits = score_segments(
        model, cut_segments(ids, None, None, SEGMENT), InfiniCache(model.config), True
    )
    assert losses.tolist() == [0.0, 0.0]
    assert counts.tolist() == [0, 0]
    assert_close(logits, read_whole(model, ids))


def test_even_a_segment_without_state_tells_checkpointing_its_device(monkeypatch):
    """Random numbers are restored for the devices of tensor arguments: without one, dropout there would differ."""
    met = []

    def note(function, *args, **kwargs):
        met.append([isinstance(argument, torch.Tensor) for argument in args])
        return function(*args)

    monkeypatch.setattr("infini_hf.segment_step.checkpoint", note)
    segment_major(tiny_model().train(), hard_batch())
    assert len(met) > 3
    assert all(found and all(found) for found in met)


@pytest.mark.parametrize(("recompute", "expected"), [(True, [0, 2, 2, 0]), (False, [])])
def test_free_pages_go_back_before_every_second_segment_that_is_computed_twice(recompute, expected, monkeypatch):
    model, ids = tiny_model().train(), random_ids(1, 5 * SEGMENT)
    segments, at = cut_segments(ids, None, shift_labels(ids), SEGMENT), []
    monkeypatch.setattr(segment_step, "WORTH_RELEASING", 1)
    reading = []
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, args: reading.append(args[0]))
    monkeypatch.setattr(segment_step, "release_free_pages", lambda device: at.append(len(reading)))
    loss, _ = segment_major_loss(
        model, segments, InfiniCache(model.config), 5 * SEGMENT, StepOptions(recompute=recompute)
    )
    loss.backward()
    # Which segment was read next, in the forward pass and, from the last but one on, in the backward pass.
    order = [next(i for i, part in enumerate(segments) if torch.equal(part.input_ids, ids)) for ids in reading]
    assert [order[count] for count in at] == expected


def test_the_call_through_the_wrapper_reads_something():
    """Data parallelism waits for every parameter, and a segment of padding alone reaches no keys and values."""
    ids = random_ids(2, 32)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    segments = cut_segments(ids, mask, shift_labels(ids), 8)
    assert (len(segments), last_with_tokens(segments)) == (4, 1)
    assert last_with_tokens(cut_segments(ids, None, None, 8)) == 3
    assert last_with_tokens(cut_segments(ids, torch.zeros_like(ids), shift_labels(ids), 8)) == 0
