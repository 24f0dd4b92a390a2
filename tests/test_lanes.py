"""Memory across steps: what a row remembers is what was read of its document, whatever batch it came in."""

import copy

import pytest
import torch
from datasets import Dataset
from models import FAMILIES, HYBRID, random_ids
from reading import assert_close, assert_same_state, read
from training import CARRY, GradientCatcher, OnStepEnd, logged, losses_of, make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniCache, prefill, score
from infini_hf.data.lane_order import interleave, lane_stream
from infini_hf.lanes import Lanes

OPTIONS = {"plain": {}, "carry": CARRY}


# What a lane takes


def opened(documents, parts, after=((5, 0), (6, 3))):
    """Open lanes that hold documents 5 and 6 up to a part of each."""
    model = tiny_model()
    lanes = Lanes(model.config)
    if after:
        lanes.places = list(after)
        lanes.cache = prefill(model, random_ids(len(after), 20), progress=False)
    as_tensor = [None if column is None else torch.tensor(column) for column in (documents, parts)]
    return lanes.open(*as_tensor)


def test_a_lane_takes_the_next_part_and_a_new_document():
    assert opened([5, 6], [1, 4]).seen == (20, 20)
    assert opened([5, 9], [1, 0]).seen == (20, 0)
    assert opened([5, 6], [0, 0]).seen == ()
    assert opened([3, 4], [0, 0], after=()).seen == ()


@pytest.mark.parametrize(
    ("documents", "parts", "message"),
    [
        ([5, 7], [1, 4], "row 1 is part 4 of document 7, and the memory of that lane holds document 6 up to part 3"),
        ([5, 6], [2, 4], "row 0 is part 2 of document 5, and the memory of that lane holds document 5 up to part 0"),
        ([5, 6], [1, 3], "row 1 is part 3 of document 6.*not in lane order.*lane_stream"),
        ([6, 5], [4, 1], "row 0 is part 4 of document 6"),
        ([5], [1], "the batch has 1 rows and the memory holds 2 lanes.*dataloader_drop_last"),
        ([5, 6, 7], [1, 4, 0], "the batch has 3 rows"),
        (None, [0, 0], "needs the columns `document` and `part`"),
        ([5, 6], None, "needs the columns `document` and `part`"),
    ],
)
def test_rows_that_do_not_continue_their_lane_are_refused(documents, parts, message):
    with pytest.raises(ValueError, match=message):
        opened(documents, parts)


def test_an_empty_lane_takes_no_later_part():
    with pytest.raises(ValueError, match="row 1 is part 2 of document 6, and the memory of that lane holds nothing"):
        opened([5, 6], [0, 2], after=())


# Forgetting a row


@pytest.mark.parametrize("padded", ["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_is_reset_is_a_row_alone_and_the_others_go_on(family, options, padded):
    model = tiny_model(family, **OPTIONS[options])
    first, second = random_ids(3, 21, seed=1), random_ids(3, 19, seed=2)
    mask = torch.ones_like(first)
    if padded == "padded":
        # The row that goes on is padded on the left alone: inside a row stock layers would count it.
        mask[1, 17:], mask[0, :5] = 0, 0
    _, cache = read(model, first, mask=mask)
    cache.reset_rows(torch.tensor([False, True, False]))
    assert cache.seen == (int(mask[0].sum()), 0, 21)
    logits, cache = read(model, second, cache=cache)
    alone, own = read(model, second[1:2])
    assert_close(logits[1:2], alone, what="the row that was reset")
    assert_same_state_of_memory(cache, 1, own)
    for row in (0, 2):
        _, continued = read(model, first[row : row + 1, 21 - int(mask[row].sum()) :])
        alone, own = read(model, second[row : row + 1], cache=continued)
        assert_close(logits[row : row + 1], alone, what=f"row {row}, which went on")
        assert_same_state_of_memory(cache, row, own)


def assert_same_state_of_memory(cache, row, alone):
    """One row of a cache remembers in its patched layers what a cache of that row alone does."""
    for index, layer in cache.infini_layers.items():
        own = alone.layers[index]
        assert layer.seen[row] == own.seen[0]
        assert_close(layer.memory[row], own.memory[0], what=f"layer {index} memory")
        assert_close(layer.memory_norm[row], own.memory_norm[0], what=f"layer {index} memory_norm")


@pytest.mark.parametrize("family", HYBRID)
def test_rows_of_a_hybrid_can_be_reset_again_and_again(family):
    model = tiny_model(family, **CARRY)
    cache, alone = InfiniCache(model.config), [InfiniCache(model.config) for _ in range(2)]
    resets = [(True, True), (True, False), (False, True), (False, False), (True, False), (True, False)]
    for turn, rows in enumerate(resets):
        # Shorter than the sliding window, so that columns of several turns lie in it.
        ids = random_ids(2, 3, seed=turn)
        cache.reset_rows(torch.tensor(rows))
        logits, cache = read(model, ids, cache=cache)
        for row, forget in enumerate(rows):
            alone[row] = InfiniCache(model.config) if forget else alone[row]
            own, alone[row] = read(model, ids[row : row + 1], cache=alone[row])
            assert_close(logits[row : row + 1], own, what=f"turn {turn}, row {row}")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_resetting_leaves_copies_and_other_shapes_alone(family):
    model = tiny_model(family, **CARRY)
    _, cache = read(model, random_ids(2, 21))
    kept, twin = copy.copy(cache), copy.copy(cache)
    cache.reset_rows(torch.tensor([False, False]))
    assert_same_state(cache, twin, 0)
    cache.reset_rows(torch.tensor([True, False]))
    assert kept.seen == (21, 21)
    _, expected = read(model, random_ids(2, 21))
    assert_same_state(kept, expected, 0)
    cache.reset_rows(torch.tensor([True, True]))
    assert cache.seen == ()
    InfiniCache(model.config).reset_rows(torch.tensor([True]))
    with pytest.raises(ValueError, match=r"rows of shape \(3,\): the cache holds 2 rows"):
        kept.reset_rows(torch.tensor([True, False, False]))


# Training


FROZEN = {"carry_memory": True, "learning_rate": 0.0, "memory_gate_learning_rate": 0.0}


def whole_documents(rows):
    """The ids of each document `(1, tokens)`, in the order of its parts."""
    joined = {}
    for row in rows:
        joined.setdefault(row["document"], []).extend(row["input_ids"])
    return {document: torch.tensor([ids]) for document, ids in joined.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_part_is_read_with_the_memory_of_the_parts_before(tmp_path, family, options):
    """With frozen weights the losses of the steps are those of the documents read whole."""
    rows = tiny_rows(documents=2, parts=4, length=29, last=17)
    model = tiny_model(family, **OPTIONS[options])
    trainer = make_trainer(tmp_path, model, rows, max_steps=4, **FROZEN)
    losses, order = losses_of(trainer), list(trainer.lane_sampler)
    whole = {document: score(model, ids, progress=False)[0] for document, ids in whole_documents(rows).items()}
    assert len(losses) == 4
    for step, loss in enumerate(losses):
        sums, count = 0.0, 0
        for row in (rows[index] for index in order[2 * step : 2 * step + 2]):
            # The first token of a row is not predicted, and the loss of token n stands at n - 1.
            start, length = 29 * row["part"], len(row["input_ids"])
            sums, count = sums + whole[row["document"]][start : start + length - 1].sum(), count + length - 1
        assert loss == pytest.approx((sums / count).item(), rel=1e-5)


def test_the_memory_after_a_step_is_that_of_prefilling(tmp_path):
    rows = tiny_rows(documents=2, parts=4, length=29)
    # One document of four rows and one of three, so that a lane begins again while the other goes on.
    model = tiny_model(**CARRY)
    trainer = make_trainer(tmp_path, model, rows, max_steps=3, **FROZEN)
    trainer.train()
    order = list(trainer.lane_sampler)[:6]
    for lane in range(2):
        read_by_lane = [rows[index] for index in order[lane::2]]
        assert [row["part"] for row in read_by_lane] == [0, 1, 2]
        ids = torch.tensor([[token for row in read_by_lane for token in row["input_ids"]]])
        expected = prefill(model, ids, progress=False)
        assert_same_state(trainer.lanes.cache, expected, row=lane, expected_row=0)
    assert not any(tensor.requires_grad for tensor in trainer.lanes.cache.tensors())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_that_begins_in_one_lane_resets_that_lane_alone(tmp_path, family):
    """Rows of one segment and a bit, in lanes whose documents end at different steps."""
    rows = tiny_rows(documents=3, parts=3, length=11, last=11)
    model = tiny_model(family, **CARRY)
    trainer = make_trainer(tmp_path, model, rows, max_steps=4, data_seed=1, **FROZEN)
    losses, order = losses_of(trainer), list(trainer.lane_sampler)
    parts = [[rows[index]["part"] for index in order[step : step + 2]] for step in range(0, 8, 2)]
    assert any(0 in step and step != [0, 0] for step in parts), parts
    whole = {document: score(model, ids, progress=False)[0] for document, ids in whole_documents(rows).items()}
    for step, loss in enumerate(losses):
        batch = [rows[index] for index in order[2 * step : 2 * step + 2]]
        expected = sum(whole[row["document"]][11 * row["part"] :][:10].sum() for row in batch) / 20
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_accumulated_micro_batches_continue_each_other(tmp_path):
    rows = tiny_rows(documents=2, parts=4, length=24, last=24)
    model = tiny_model(**CARRY)
    by_step, accumulated = GradientCatcher(), GradientCatcher()
    trainer = make_trainer(tmp_path, model, rows, max_steps=4, max_grad_norm=0.0, **FROZEN)
    trainer.add_callback(by_step)
    losses = losses_of(trainer)
    trainer = make_trainer(
        tmp_path, model, rows, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.0, **FROZEN
    )
    trainer.add_callback(accumulated)
    halves = losses_of(trainer)
    # All rows have as many targets, so that a step's loss is the mean of those of its micro-batches.
    assert halves == pytest.approx([loss / 2 for loss in losses], rel=1e-5)
    for step, gradients in enumerate(accumulated.steps):
        for name, gradient in gradients.items():
            parts = [by_step.steps[2 * step + half][name] for half in range(2)]
            assert_close(gradient, (parts[0] + parts[1]) / 2, what=name)


def test_without_carrying_every_row_begins_with_an_empty_memory(tmp_path):
    rows = tiny_rows(documents=2, parts=3, length=24)
    carried = losses_of(make_trainer(tmp_path, rows=rows, carry_memory=True, max_steps=3))
    fresh = losses_of(make_trainer(tmp_path, rows=rows, max_steps=3))
    model = tiny_model()
    expected = score(model, torch.tensor([row["input_ids"] for row in rows[:2]]), progress=False).mean()
    assert fresh[0] == pytest.approx(expected.item(), rel=1e-5)
    assert carried[1] != pytest.approx(fresh[1], rel=1e-4)


def test_evaluation_in_between_does_not_touch_the_lanes(tmp_path):
    rows = tiny_rows(documents=2, parts=4)
    quiet = make_trainer(tmp_path, rows=rows, carry_memory=True, max_steps=4)
    alone = losses_of(quiet)
    evaluation = {"eval_dataset": Dataset.from_list(tiny_rows(3, 1))}
    other = make_trainer(
        tmp_path, rows=rows, carry_memory=True, max_steps=4, parts=evaluation, eval_strategy="steps", eval_steps=1
    )
    assert losses_of(other) == alone
    assert len(logged(other, "eval_loss")) == 4
    assert_same_state(other.lanes.cache, quiet.lanes.cache, 0)


def test_every_epoch_is_dealt_anew_and_begins_with_empty_lanes(tmp_path):
    trainer = make_trainer(tmp_path, carry_memory=True, max_steps=-1, num_train_epochs=3)
    places = []
    trainer.add_callback(OnStepEnd(lambda state: places.append(trainer.lanes.places)))
    trainer.train()
    steps = len(trainer.lane_sampler) // 2
    epochs = [places[start : start + steps] for start in range(0, len(places), steps)]
    assert len(epochs) == 3
    assert all(part == 0 for epoch in epochs for _, part in epoch[0])
    assert len({str(epoch) for epoch in epochs}) == 3


def test_a_stream_in_lane_order_trains_like_the_dataset_it_comes_from(tmp_path):
    rows = tiny_rows(documents=2, parts=3, length=24)
    ordered = list(interleave(iter(rows), 2))
    losses = losses_of(make_trainer(tmp_path, rows=lane_stream_of(rows), carry_memory=True, max_steps=2))
    model = tiny_model()
    first = torch.tensor([row["input_ids"] for row in ordered[:2]])
    assert losses[0] == pytest.approx(score(model, first, progress=False).mean().item(), rel=1e-5)
    assert len(losses) == 2


def test_a_dataset_in_lane_order_is_left_in_it(tmp_path):
    rows = list(interleave(iter(tiny_rows()), 2))
    trainer = make_trainer(tmp_path, rows=rows, carry_memory=True, train_sampling_strategy="sequential", max_steps=3)
    places = []
    trainer.add_callback(OnStepEnd(lambda state: places.extend(trainer.lanes.places)))
    trainer.train()
    assert places == [(row["document"], row["part"]) for row in rows[:6]]
    with pytest.raises(
        ValueError, match=r"row 1 is part 1 of document 0.*unless train_sampling_strategy='sequential'"
    ):
        make_trainer(tmp_path, carry_memory=True, train_sampling_strategy="sequential").train()


def test_an_order_by_length_is_none_that_a_memory_is_carried_in(tmp_path):
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' with carry_memory=True"):
        make_trainer(tmp_path, carry_memory=True, train_sampling_strategy="group_by_length")


def short_of_memory(model, rows, calls):
    """`model`, which fails as a full device does at the given call with as many rows."""
    met = []

    def fail(_, args, kwargs):
        if kwargs["input_ids"].shape[0] == rows:
            met.append(1)
            if len(met) == calls:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    return model


def test_lanes_follow_a_batch_size_that_is_found(tmp_path):
    """The device fills up after some steps, of which the lanes keep nothing."""
    still = {"learning_rate": 0.0, "memory_gate_learning_rate": 0.0, "carry_memory": True, "max_steps": 4}
    expected = losses_of(make_trainer(tmp_path, per_device_train_batch_size=1, **still))
    still |= {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 2}
    # In the second micro-batch, of five segments each.
    trainer = make_trainer(tmp_path, short_of_memory(tiny_model(), rows=2, calls=14), **still)
    losses = losses_of(trainer)
    assert len(losses) == 5
    assert losses[1:] == expected
    assert len(trainer.lanes.places) == 1
    # A resumed run takes the batch size that was found.
    resumed = make_trainer(tmp_path, **still)
    assert losses_of(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == expected[2:]
    other = make_trainer(tmp_path, **{**still, "auto_find_batch_size": False})
    with pytest.raises(ValueError, match="carries the memory of 1 lanes, and this run has 2"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for own_order in ({"train_sampling_strategy": "sequential"}, {"rows": lane_stream_of(tiny_rows())}):
        with pytest.raises(ValueError, match="auto_find_batch_size with carry_memory=True and rows in an order of th"):
            make_trainer(tmp_path, **still, **own_order)


def lane_stream_of(rows, lanes=2):
    return lane_stream(Dataset.from_list(rows).to_iterable_dataset(), lanes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4, "carry_memory=True needs the column 'document'"),
        ([{**row, "part": 2 * row["part"]} for row in tiny_rows()], r"has the parts \[0, 2, 4\]"),
        (tiny_rows(documents=1), "1 documents for 2 lanes"),
    ],
)
def test_training_refuses_rows_without_places(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows, carry_memory=True).train()


def test_training_refuses_a_stream_that_is_not_in_lane_order(tmp_path):
    stream = Dataset.from_list(tiny_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 1 is part 1 of document 0, and the memory of that lane holds nothing"):
        make_trainer(tmp_path, rows=stream, carry_memory=True).train()


# Files


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lanes_survive_a_file(tmp_path, family):
    model = tiny_model(family, **CARRY)
    lanes, path = Lanes(model.config), tmp_path / "lanes_0.safetensors"
    batch = torch.tensor([3, 2**40]), torch.tensor([0, 0])
    cache = lanes.open(*batch)
    mask = torch.ones(2, 21, dtype=torch.long)
    # So near the end that the window of a stock layer still holds it.
    mask[0, :18] = 0
    _, cache = read(model, random_ids(2, 21), mask=mask, cache=cache)
    lanes.close(*batch, cache)
    lanes.save(path)
    again = Lanes(model.config)
    again.load(path, model.get_decoder())
    assert again.places == [(3, 0), (2**40, 0)]
    assert_same_state(again.cache, lanes.cache, 0)
    following = torch.tensor([3, 9]), torch.tensor([1, 0])
    ids = random_ids(2, 9, seed=4)
    assert torch.equal(*(read(model, ids, cache=each.open(*following))[0] for each in (lanes, again)))


def test_lanes_that_hold_nothing_write_no_file(tmp_path):
    Lanes(tiny_model().config).save(tmp_path / "lanes_0.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_or_no_file_is_refused(tmp_path):
    model = tiny_model()
    prefill(model, random_ids(1, 20), progress=False).save_pretrained(tmp_path)
    snapshot = next(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="is a memory snapshot, not the lanes of a training run"):
        Lanes(model.config).load(snapshot, model.get_decoder())
    with pytest.raises(ValueError, match="nowhere"):
        Lanes(model.config).load(tmp_path / "nowhere.safetensors", model.get_decoder())
