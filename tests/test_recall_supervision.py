"""Recall supervision against every weight of the memory worked out one by one."""

import pytest
import torch
from models import build_patched, random_ids
from test_retrieval_supervision import (
    L,
    assert_alike_however_divided,
    assert_gradients_alike,
    projections,
    read_told,
    shifted,
    told_rows,
)
from training import logged, losses_of, make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniCache, InfiniTrainingArguments
from infini_hf import memory as memory_math
from infini_hf.calibration import add_memory_projections
from infini_hf.recall_supervision import RecallSupervision


def few_ids(batch, length, seed=0):
    """Ids of which most come again, and some never do."""
    ids = random_ids(batch, length, seed)
    return torch.where(ids % 3 > 0, 3 + ids % 7, ids)


def supervised(model, ids, mask=None, layers=None, cache=None, left_out=None, reach="model", labels=None, **options):
    """What a batch read segment after segment is told, as it was read."""
    supervision = RecallSupervision(1.0, layers, reach)
    cache = InfiniCache(model.config) if cache is None else cache
    with supervision.reading(model, ids, ids if labels is None else labels, mask, cache.seen, left_out) as told:
        read_told(model, ids, mask, cache, told, **options)
    return told


def oracle(model, ids, mask=None, layers=None, cut=0, rows=None, labels=None):
    """Sums over the tokens that come again: -log(p + 1e-4) and p, and their number, each the mean over the layers."""
    kind = model.config.infini_attention["feature_map"]
    mask = torch.ones_like(ids) if mask is None else mask
    segment = (mask.cumsum(1) - 1) // L
    losses, shares = [], []
    for index, (queries, keys) in projections(model, ids, mask).items():
        if layers is not None and index not in layers:
            continue
        queries, keys = memory_math.map_queries(queries, kind), memory_math.map_keys(keys, kind)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        for row in range(len(ids)) if rows is None else rows:
            for asked in range(cut, ids.shape[1] - 1):
                entered = cut + (asked - cut) // L * L
                if not mask[row, asked] or not mask[row, asked + 1] or segment[row, entered] != segment[row, asked]:
                    continue
                if labels is not None and labels[row, asked + 1] == -100:
                    continue
                held = (segment[row] < segment[row, asked]) & (mask[row] > 0)
                # What stood before the cut is in the memory, and nobody knows any more what it was.
                again = held & (ids[row] == ids[row, asked + 1]) & (torch.arange(ids.shape[1]) >= cut)
                if again.any():
                    weights = torch.einsum("hd,htd->ht", queries[row, :, asked], keys[row])
                    share = (weights[:, again].sum(1) / weights[:, held].sum(1)).mean()
                    losses.append(-(share + 1e-4).log())
                    shares.append(share.item())
    count = len(layers) if layers else model.config.num_hidden_layers
    return torch.stack(losses).sum() / count, sum(shares) / count, len(losses) / count


def assert_alike(model, told, expected):
    """The loss, the shares and all gradients."""
    loss, share, count = expected
    torch.testing.assert_close(told.loss, loss, rtol=1e-5, atol=1e-5)
    assert told.shares.tolist() == pytest.approx([share, count], rel=1e-4)
    assert_gradients_alike(model, told.loss, loss)


@pytest.mark.parametrize("padding", [None, "left", "all left", "right", "between"])
@pytest.mark.parametrize(("kind", "layers"), [("elu", None), ("exp", [1]), ("softmax", [1])])
def test_the_loss_and_its_gradients_are_those_of_the_weights_one_by_one(kind, layers, padding):
    model = shifted(build_patched("llama", segment_length=L, overlap=3, feature_map=kind)).train()
    ids, mask = few_ids(3, 4 * L + 3), None
    if padding is not None:
        mask = torch.ones_like(ids)
        # Longer than a segment, so that keys stay open over a whole call.
        columns = {"left": slice(None, L + 5), "right": slice(-5, None), "between": slice(4, 2 * L + 2)}
        if padding == "all left":
            # No row has closed a segment when the second begins.
            mask[:, :3] = 0
        else:
            mask[1, columns[padding]] = 0
    told = supervised(model, ids, mask, layers)
    assert_alike(model, told, oracle(model, ids, mask, layers))


@pytest.mark.parametrize("cut", [3 * L, 3 * L + 5])
def test_what_was_read_before_the_row_counts_for_the_denominator_alone(cut):
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids, cache = few_ids(2, 8 * L), InfiniCache(model.config)
    with torch.no_grad():
        model(ids[:, :cut], past_key_values=cache)
    told = supervised(model, ids[:, cut:], cache=cache)
    expected, _, count = oracle(model, ids, cut=cut)
    assert count > 10
    torch.testing.assert_close(told.loss, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_are_left_out_are_told_nothing():
    model = build_patched("llama", segment_length=L, feature_map="softmax").train()
    ids = few_ids(3, 4 * L)
    told = supervised(model, ids, left_out=torch.tensor([False, True, False]))
    torch.testing.assert_close(told.loss, oracle(model, ids, rows=(0, 2))[0], rtol=1e-5, atol=1e-5)
    nothing = supervised(model, ids, left_out=torch.ones(3, dtype=torch.bool))
    assert nothing.loss == 0.0
    assert nothing.shares.tolist() == [0.0, 0.0]


def test_tokens_that_are_not_learned_are_not_told_of():
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids = few_ids(2, 4 * L)
    labels = torch.where(random_ids(2, 4 * L, seed=3) % 3 == 0, ids, -100)
    told, expected = supervised(model, ids, labels=labels), oracle(model, ids, labels=labels)
    assert 3 < expected[2] < oracle(model, ids)[2] / 2
    assert_alike(model, told, expected)
    assert supervised(model, ids, labels=torch.full_like(ids, -100)).loss == 0.0


def test_where_the_state_is_cut_the_gradient_does_not_go_around_it():
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids, embeddings = random_ids(1, 3 * L), []
    # Of the third segment one token comes again, from the first.
    ids[0] = torch.arange(3, 3 + 3 * L)
    ids[0, 2 * L + 4] = ids[0, 3]
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embeddings.append(output.requires_grad_()) or output.retain_grad()
    )
    # Cut before every segment, the keys are those of the one before; else they are in the sums already.
    for bptt, reaches in ((None, True), (1, False), (2, False)):
        embeddings.clear()
        supervised(model, ids, bptt_segments=bptt).loss.backward()
        gradient = embeddings[0].grad
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == reaches


@pytest.mark.parametrize("mix_heads", [False, True])
def test_projections_alone_learn_alike_where_they_are_all_that_is_reached(mix_heads):
    model = build_patched("llama", segment_length=L, overlap=3, feature_map="softmax").train()
    add_memory_projections(model, mix_heads=mix_heads)
    ids, found = few_ids(2, 4 * L), []
    for reach in ("model", "projections"):
        model.zero_grad()
        supervised(model, ids, layers=[1], reach=reach).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    whole, near = found
    gate = "model.layers.1.self_attn.memory_gate"
    reached = {name for name, gradient in near.items() if gradient.any()}
    assert reached == {f"{gate}.query_projection.weight", f"{gate}.key_projection.weight"}
    for name in reached:
        torch.testing.assert_close(near[name], whole[name], rtol=1e-5, atol=1e-7)
    assert whole["model.layers.0.self_attn.q_proj.weight"].abs().max() > 0


def test_filling_of_ranks_is_not_taken_for_a_segment_and_layers_get_their_projections_back():
    model = build_patched("llama", segment_length=L).train()
    ids = few_ids(2, 3 * L)
    expected = supervised(model, ids).loss
    assert torch.equal(supervised(model, ids, filling=2).loss, expected)
    assert not any("project" in vars(module) for module in model.modules())


OPTIONS = {"recall_weight": 3.0, "recompute_segments": False, "max_steps": 1}


def few_rows(**columns):
    """Rows of 40 tokens, most of which come again."""
    ids = few_ids(4, 40).tolist()
    return [{"input_ids": row, "labels": row, **columns} for row in ids]


def test_the_trainer_adds_it_to_the_loss_and_logs_the_share(tmp_path):
    options = {**OPTIONS, "per_device_train_batch_size": 4}
    plain = make_trainer(tmp_path, rows=few_rows(), **{**options, "recall_weight": 0.0})
    taught = make_trainer(tmp_path, rows=few_rows(), **options)
    loss, share, count = oracle(tiny_model().train(), torch.tensor([row["input_ids"] for row in few_rows()]))
    (without,), (found,) = losses_of(plain), losses_of(taught)
    assert found - without == pytest.approx(3.0 * loss.item() / (4 * 39), rel=1e-4)
    assert logged(taught, "recall_share")[0] == pytest.approx(share / count, rel=1e-4)
    assert not logged(plain, "recall_share")


def test_rows_with_sources_are_told_of_these_instead(tmp_path):
    """Beside one another: what a row counts by either loss adds up, and rows with sources have no recurrences."""
    sourced, others = told_rows()[:2], few_rows(sources=[-1] * 40)[:2]
    weights = {"retrieval_weight": 2.0, "recall_weight": 3.0}
    found = {}
    for names in ((), ("retrieval_weight",), ("recall_weight",), tuple(weights)):
        given = dict.fromkeys(weights, 0.0) | {name: weights[name] for name in names}
        options = {**OPTIONS, **given, "per_device_train_batch_size": 4}
        (found[names],) = losses_of(make_trainer(tmp_path, rows=[*sourced, *others], **options))
    told, recurring = (found[name,] - found[()] for name in weights)
    assert min(told, recurring) > 0.01
    assert found[tuple(weights)] - found[()] == pytest.approx(told + recurring, rel=1e-4)
    expected = oracle(tiny_model().train(), torch.tensor([row["input_ids"] for row in others]))[0].item()
    assert recurring == pytest.approx(3.0 * expected / (4 * 39), rel=1e-4)


def test_rows_whose_writes_are_scaled_are_left_out(tmp_path):
    options = {**OPTIONS, "memory_dilution": 8.0, "memory_dilution_ramp": "none", "memory_dilution_probability": 1.0}
    trainer = make_trainer(tmp_path, rows=few_rows(), **options)
    trainer.train()
    assert not logged(trainer, "recall_share")
    spared = make_trainer(tmp_path, rows=few_rows(dilute=False), **options)
    spared.train()
    assert 0 < logged(spared, "recall_share")[0] < 1


def test_gradients_do_not_depend_on_how_rows_are_divided_into_micro_batches(tmp_path):
    assert_alike_however_divided(tmp_path, few_rows(), OPTIONS)


def test_where_nothing_comes_again_it_is_said_once(tmp_path, caplog):
    make_trainer(tmp_path, rows=told_rows(), **{**OPTIONS, "max_steps": 3}).train()
    said = [record.message for record in caplog.records if "recall_weight=3" in record.message]
    assert len(said) == 1
    assert "not all have sources" in said[0]


def test_memory_is_carried_beside_it(tmp_path):
    """The second row of a document counts what the first has left in the memory, and no token of it."""
    rows = few_rows()
    for index, row in enumerate(rows):
        row.update(document=index % 2, part=index // 2)
    rows = [rows[index] for index in (0, 2, 1, 3)]
    trainer = make_trainer(tmp_path, rows=rows, carry_memory=True, **{**OPTIONS, "max_steps": 2})
    trainer.train()
    first, second = logged(trainer, "recall_share")
    assert 0 < second < first < 1


def test_what_cannot_be_told_is_refused(tmp_path):
    for layers, named in (([1, 5], r"\[5\]"), ([], "none")):
        with pytest.raises(ValueError, match=rf"recall_layers=.*: {named} are not among the patched \[0, 1\]"):
            make_trainer(tmp_path, recall_layers=layers, **OPTIONS)
    with pytest.raises(ValueError, match=r"recall_weight=1\.0 with recompute_segments=True: the loss needs"):
        InfiniTrainingArguments(str(tmp_path), use_cpu=True, recall_weight=1.0)
    trainer = make_trainer(tmp_path, rows=few_rows())
    trainer.args.recall_weight = 0.1
    with pytest.raises(ValueError, match=r"recall_weight=0\.1 with recompute_segments=True"):
        trainer.set_up(trainer.model.config)
    with pytest.raises(ValueError, match=r"recall_weight=-1\.0: must be at least 0"):
        InfiniTrainingArguments(str(tmp_path), use_cpu=True, recompute_segments=False, recall_weight=-1.0)
    with pytest.raises(ValueError, match=r"recall_weight=3\.0 with memory_update='delta'"):
        make_trainer(tmp_path, model=tiny_model(memory_update="delta"), rows=tiny_rows(), **OPTIONS)
    with pytest.raises(ValueError, match=r"layers \[1\] has no projections.* or name others in recall_layers"):
        make_trainer(tmp_path, recall_layers=[1], retrieval_reach="projections", **OPTIONS)
