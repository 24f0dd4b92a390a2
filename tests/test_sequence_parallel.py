"""A row that is split over ranks: what each rank sees is its part of what one process sees of the whole row."""

import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import sequence_parallel_run as runs
import torch
from models import relative_error

from infini_hf.sequence_parallel import run_of

HERE = Path(__file__).parent
OTHERS = {
    "sharded-row": runs.read_sharded_row,
    "segment-major-linear": lambda: runs.read_segment_major("linear"),
    "segment-major-delta": lambda: runs.read_segment_major("delta"),
    "generate": runs.read_and_generate,
    "snapshot": runs.read_after_a_snapshot,
    "frozen": runs.read_frozen,
    "one": lambda: runs.read(runs.CASES["delta-window"]),
    "fully-sharded": runs.read_fully_sharded,
    "mesh": runs.read_on_a_mesh,
}
# Of two processes, and of four: several before one, a rank between others, ranks that read nothing.
OF_TWO = [*runs.CASES, *(name for name in OTHERS if name != "mesh"), "traffic", "refusals"]
OF_FOUR = [*runs.CASES, "segment-major-delta", "generate", "mesh", "traffic"]
RANKS = [
    pytest.param(2, id="2"),
    pytest.param(4, id="4", marks=pytest.mark.slow),
]
# Other orders of summation, in float32: what was met is a third of these at most.
TOLERANCE = {"logits": 4e-6, "loss": 4e-6, "gradients": 1e-5, "state": 4e-6}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What each of so many ranks saw in all of its cases: started once."""

    @cache
    def run(ranks):
        names = OF_TWO if ranks == 2 else OF_FOUR
        folder = tmp_path_factory.mktemp(f"ranks_{ranks}")
        paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = str(HERE / "sequence_parallel_run.py")
        arguments = [str(ranks), str(folder / "meeting"), str(folder), *names]
        processes = []
        for rank in range(ranks):
            command = [sys.executable, script, str(rank), *arguments]
            with open(folder / f"log_{rank}", "wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=300) for process in processes]
        logs = "\n".join((folder / f"log_{rank}").read_text()[-2000:] for rank in range(ranks))
        assert codes == [0] * ranks, logs
        return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(ranks)]

    return run


@cache
def alone(name):
    """The same by one process."""
    return OTHERS[name]() if name in OTHERS else runs.read(runs.CASES[name])


def difference(actual, expected):
    """Relative; 0 where both are all zeros, or hold nothing."""
    return 0.0 if torch.equal(actual, expected) else relative_error(actual, expected)


def check_gradients(actual, expected):
    assert set(actual) == set(expected)
    assert len([name for name in expected if name.endswith("memory_gate.bias")]) == 2
    for name, gradient in expected.items():
        assert difference(actual[name], gradient) <= TOLERANCE["gradients"], name


def check_state(states, expected):
    """All ranks hold one state, to the bit, and it is the one that one process holds."""
    for state in states:
        assert (state["seen"], state["columns"]) == (expected["seen"], expected["columns"])
        for tensor, first, right in zip(state["tensors"], states[0]["tensors"], expected["tensors"], strict=True):
            assert torch.equal(tensor, first)
            assert tensor.shape == right.shape
            assert tensor.dtype == right.dtype
            assert difference(tensor, right) <= TOLERANCE["state"]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", runs.CASES)
def test_ranks_see_what_one_process_sees(outcome, name, ranks):
    seen, expected = [result[name] for result in outcome(ranks)], alone(name)
    for parts, whole in zip(zip(*(part["logits"] for part in seen), strict=True), expected["logits"], strict=True):
        logits = torch.cat(parts, dim=1)
        assert logits.shape == whole.shape
        assert relative_error(logits, whole) < TOLERANCE["logits"]
    assert abs(sum(part["loss"] for part in seen) - expected["loss"]) < TOLERANCE["loss"] * expected["loss"]
    for part in seen:
        check_gradients(part["gradients"], expected["gradients"])
    check_state([part["state"] for part in seen], expected["state"])
    read = sum(runs.CASES[name].columns) > runs.SEGMENT
    gates = [gradient for key, gradient in expected["gradients"].items() if "memory_gate" in key]
    assert len(gates) == (6 if runs.CASES[name].projected else 2)
    assert all(bool(gradient.abs().max() > 1e-3) == read for gradient in gates)


def check_loss_and_gradients(outcome, name, ranks):
    seen, expected = [result[name] for result in outcome(ranks)], alone(name)
    assert abs(sum(part["loss"] for part in seen) - expected["loss"]) < TOLERANCE["loss"] * expected["loss"]
    for part in seen:
        check_gradients(part["gradients"], expected["gradients"])


def test_a_row_is_cut_with_its_targets_shifted_before(outcome):
    check_loss_and_gradients(outcome, "sharded-row", 2)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_pieces_that_are_computed_again_have_the_gradients_of_the_whole_row(outcome, rule):
    check_loss_and_gradients(outcome, f"segment-major-{rule}", 2)


@pytest.mark.slow
def test_four_ranks_compute_pieces_again_alike(outcome):
    check_loss_and_gradients(outcome, "segment-major-delta", 4)


def test_gates_alone_can_be_trained(outcome):
    seen, expected = [result["frozen"] for result in outcome(2)], alone("frozen")
    assert abs(sum(part["loss"] for part in seen) - expected["loss"]) < TOLERANCE["loss"] * expected["loss"]
    for part in seen:
        check_gradients(part["gradients"], expected["gradients"])


def test_parameters_may_be_sharded_over_the_ranks_of_a_row(outcome):
    check_loss_and_gradients(outcome, "fully-sharded", 2)


@pytest.mark.slow
def test_data_parallelism_beside_it_on_a_mesh_of_two_by_two(outcome):
    check_loss_and_gradients(outcome, "mesh", 4)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_stream_is_read_in_pieces_and_all_answer_alike(outcome, ranks):
    seen, expected = [result["generate"] for result in outcome(ranks)], alone("generate")
    check_state([part["state"] for part in seen], expected["state"])
    assert all(torch.equal(part["said"], expected["said"]) for part in seen)


def test_a_snapshot_is_gone_on_with_on_several_ranks(outcome):
    check_state([result["snapshot"]["state"] for result in outcome(2)], alone("snapshot")["state"])


def test_a_group_of_one_reads_like_one_process(outcome):
    for result in outcome(2):
        assert torch.equal(result["one"]["logits"][0], alone("one")["logits"][0])
        check_gradients(result["one"]["gradients"], alone("one")["gradients"])
        check_state([result["one"]["state"]], alone("one")["state"])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_what_is_exchanged_does_not_depend_on_the_length(outcome, ranks, rule):
    counts = [result["traffic"] for result in outcome(ranks)]
    for count in counts:
        assert count[rule, 2] == count[rule, 6]
    # The busiest rank, forward: two layers, and six numbers of every other rank. The script prints the same formula.
    formula = runpy.run_path(str(HERE.parent / "scripts" / "benchmark_sequence_parallel.py"))["exchanged_bytes"]
    window = {"sinks": runs.WIDE["sink_tokens"], "overlap": runs.WIDE["overlap"]}
    expected = 2 * formula(ranks, kv_heads=3, head_dim=8, rule=rule, batch=2, width=4, **window)
    assert max(count[rule, 2][0] for count in counts) == expected + 6 * 8 * (ranks - 1)
    # A backward pass sends no more. Nothing of the state after the row is in the loss, so that it does not come back.
    forward, both = (sum(parts) for parts in zip(*(count[rule, 2] for count in counts), strict=True))
    assert forward < both < 2 * forward


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("padding", "NotImplementedError", "padding in the runs of ranks [0]"),
        ("batch", "ValueError", "rows of the ranks' calls: [1, 2]"),
        ("inside", "ValueError", "the cache has read 11 tokens, which ends inside a segment of 8"),
        ("uneven", "NotImplementedError", "different numbers of tokens"),
        ("place", "ValueError", "tokens read before of the ranks' calls: [8, 16]"),
        ("run", "ValueError", "runs of [5, 5] tokens"),
        ("empty", "ValueError", "runs of [0, 8] tokens"),
        ("step", "ValueError", "cache.to_infini_cache()"),
        ("grad", "ValueError", "gradients switched on of the ranks' calls: [1, 0]"),
        ("hybrid", "NotImplementedError", "layers [0, 2] left stock"),
        ("score", "NotImplementedError", "cache.to_infini_cache()"),
        ("generate", "NotImplementedError", "cache.to_infini_cache()"),
        ("scale", "NotImplementedError", "memory_scale for the segments of each rank's run"),
        ("group", "TypeError", "group is a str"),
        ("mesh", "ValueError", "a mesh of 2 dimensions"),
        ("checkpointing", "ValueError", "activation checkpointing"),
        ("afterwards", "nothing", "was refused"),
    ],
)
def test_every_rank_is_told_what_cannot_be_split(outcome, name, kind, words):
    for result in outcome(2):
        assert result["refusals"][name].startswith(kind)
        assert words in result["refusals"][name]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_runs_are_whole_segments_and_cover_the_row(ranks):
    for columns in range(80):
        parts = [run_of(columns, SimpleNamespace(rank=rank, size=ranks), runs.SEGMENT) for rank in range(ranks)]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == columns
        lengths = [part.stop - part.start for part in parts]
        busy = [length for length in lengths if length]
        assert lengths[: len(busy)] == busy
        assert all(length % runs.SEGMENT == 0 for length in busy[:-1])
        assert max(lengths) - min(lengths) <= 2 * runs.SEGMENT - 1
        assert max(lengths) <= runs.SEGMENT * -(-columns // (runs.SEGMENT * ranks))
