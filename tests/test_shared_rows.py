"""Rows that several ranks of a trainer read together: what is refused, and what a rank is given of a row.

What such ranks learn is in test_distributed.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from models import build, random_ids
from training import SEGMENT, make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniTrainingArguments
from infini_hf.segment_step import shift_labels, shift_weights
from infini_hf.shared_rows import SharedRows

RANKS = 2


class Group:
    """A group of ranks of which one is here; the others say what it says."""

    def __init__(self, rank):
        self.rank, self.size = rank, RANKS

    def gather(self, numbers, device):
        return [numbers] * RANKS


@pytest.fixture
def ranks(monkeypatch):
    """Shared rows of each of two ranks, without processes."""
    monkeypatch.setattr("infini_hf.sequence_parallel.row_group", lambda group: group)
    shared = []
    for rank in range(RANKS):
        rows = object.__new__(SharedRows)
        rows.group, rows.size, rows.length = Group(rank), RANKS, SEGMENT
        shared.append(rows)
    return shared


def test_the_runs_of_the_ranks_are_the_row(ranks):
    """Piece after piece, a segment for each rank, with targets and weights of the whole row."""
    ids, columns = random_ids(2, 6 * SEGMENT), 5 * SEGMENT + 3
    mask = (torch.arange(ids.shape[1]) < columns).long().expand(2, -1)
    labels, weights = ids.masked_fill(mask == 0, -100), torch.rand(2, ids.shape[1])
    cuts = [rows.cut(ids, labels, mask, weights) for rows in ranks]
    assert all((len(pieces), segments) == (3, 6) for pieces, segments in cuts)
    for name, whole in (
        ("input_ids", ids),
        ("targets", shift_labels(labels)),
        ("weights", shift_weights(weights)),
    ):
        parts = [getattr(cuts[rank][0][piece], name) for piece in range(3) for rank in range(RANKS)]
        assert [part.shape[1] for part in parts] == [8, 8, 8, 8, 8, 3]
        assert torch.equal(torch.cat(parts, dim=1), whole[:, :columns])


def test_rows_padded_to_one_length_are_refused(ranks):
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with pytest.raises(NotImplementedError, match="sequence_parallel_size=2 with rows padded"):
        ranks[0].cut(ids, ids, mask)


@pytest.mark.parametrize("change", ["token", "exchange", "column", "label", "weight", "padding"])
def test_ranks_that_were_given_different_rows_are_refused(ranks, change):
    """All of them refuse, also the one whose own rows have something else that is wrong."""
    ids, weights = random_ids(1, 20), torch.rand(1, 20)
    ids[0, 3], ids[0, 4] = 5, 6
    mine = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "loss_weights": weights}
    other = {name: part.clone() for name, part in mine.items()}
    if change == "token":
        other["input_ids"][0, 3] += 1
    elif change == "exchange":
        other["input_ids"][0, 3], other["input_ids"][0, 4] = 6, 5
    elif change == "column":
        other = {name: part[:, :-1] for name, part in other.items()}
    elif change == "padding":
        other["input_ids"], other["attention_mask"][0, 0] = ids + 1, 0
    else:
        other["labels" if change == "label" else "loss_weights"][0, 7] *= -1
    table = []
    for rows, parts in zip(ranks, (mine, other), strict=True):
        rows.group.gather = lambda numbers, device: table.append(numbers) or [numbers] * RANKS
        with contextlib.suppress(NotImplementedError):
            rows.cut(**parts)
    for rows, parts in zip(ranks, (mine, other), strict=True):
        rows.group.gather = lambda numbers, device: table
        with pytest.raises(ValueError, match="given different rows"):
            rows.cut(**parts)


def test_a_loader_is_dealt_by_the_mesh_inside_alone():
    rows, state = object.__new__(SharedRows), SimpleNamespace(device_mesh="theirs")
    rows.accelerator, rows.mesh = SimpleNamespace(state=state), "ours"
    with rows.dealing():
        assert state.device_mesh == "ours"
    assert state.device_mesh == "theirs"


@pytest.mark.parametrize("size", [0, 2, 3])
def test_a_size_that_does_not_divide_the_processes(tmp_path, size):
    with pytest.raises(ValueError, match=f"sequence_parallel_size={size}.* divide the 1 processes"):
        InfiniTrainingArguments(str(tmp_path), use_cpu=True, sequence_parallel_size=size)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_dilution": 4}, NotImplementedError, "memory_dilution=4"),
        ({"retrieval_weight": 1.0, "recompute_segments": False}, NotImplementedError, "retrieval_weight=1.0"),
        ({"recall_weight": 1.0, "recompute_segments": False}, NotImplementedError, "recall_weight=1.0"),
        ({"carry_memory": True, "per_device_train_batch_size": 2}, NotImplementedError, "carry_memory and per_device"),
        ({"bptt_segments": 3}, ValueError, "bptt_segments=3.* multiple of 2"),
        ({"neftune_noise_alpha": 5.0}, NotImplementedError, "neftune_noise_alpha"),
        ({"accelerator_config": {"dispatch_batches": True}}, NotImplementedError, "dispatch_batches"),
        ({"train_sampling_strategy": "batch_rebalance"}, NotImplementedError, "batch_rebalance"),
    ],
    ids=str,
)
def test_what_shared_rows_know_nothing_of(tmp_path, monkeypatch, options, error, message):
    """Before any process is asked for."""
    monkeypatch.setattr(InfiniTrainingArguments, "world_size", 2)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, tiny_model(), tiny_rows(), sequence_parallel_size=2, **options)


def test_a_teacher_and_stock_layers_beside_shared_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(InfiniTrainingArguments, "world_size", 2)
    options = {"rows": tiny_rows(), "sequence_parallel_size": 2}
    with pytest.raises(NotImplementedError, match="sequence_parallel_size=2 with a teacher"):
        make_trainer(tmp_path, tiny_model(), parts={"teacher": build("llama")}, **options)
    with pytest.raises(NotImplementedError, match=r"=2 with layers \[0, 2\] that the patch leaves stock"):
        make_trainer(tmp_path, tiny_model("gemma2"), **options)
