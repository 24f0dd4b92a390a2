"""Two processes on this machine learn what one learns from the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = str(HERE / "distributed_run.py")
# Each alone in its group of processes: neither has a GPU, and gloo carries the gradients.
ACCELERATE = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no".split()
)
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2".split()
FOUR = "-m torch.distributed.run --nproc_per_node 4".split()


def run(launcher, kind, folder, memory):
    """The result of a run, launched in processes of its own."""
    folder.mkdir()
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, RUN, kind, str(folder), memory]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def port():
    """A free one, so that runs side by side do not meet."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("kind", "memory"),
    [("trainer", "fresh"), ("trainer", "carry"), ("stream", "fresh"), ("stream", "carry"), ("padded", "fresh")],
)
def test_ddp_follows_the_loss_curve_of_one_process(tmp_path, memory, kind):
    alone = run([], kind, tmp_path / "one", memory)
    both = run([*ACCELERATE, "--main_process_port", port()], kind, tmp_path / "two", memory)
    assert (alone["wrapper"], both["wrapper"]) == ("LlamaForCausalLM", "DistributedDataParallel")
    assert len(alone["losses"]) == 4
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert both["eval"] == pytest.approx(alone["eval"], abs=1e-4)
    assert both["tokens"] == alone["tokens"]
    assert both["gates"] == pytest.approx(alone["gates"], abs=1e-5)
    assert both["closed"] == pytest.approx(alone["closed"], abs=1e-4)


@pytest.mark.parametrize(("launcher", "kind", "memory"), [(FOUR, "shared2", "fresh"), (TORCHRUN, "shared1", "carry")])
def test_processes_that_share_rows_learn_what_one_learns(tmp_path, launcher, kind, memory):
    """Two pairs with a row each, of unequal length, an adapter and accumulated gradients; and a pair that carries the
    memory from row to row, also on from a checkpoint."""
    alone = run([], kind, tmp_path / "one", memory)
    shared = run([*launcher, "--master_port", port()], kind, tmp_path / "shared", memory)
    wrapper = "PeftModelForCausalLM" if kind == "shared2" else "LlamaForCausalLM"
    assert (alone["wrapper"], shared["wrapper"]) == (wrapper, "DistributedDataParallel")
    assert len(alone["losses"]) == 4
    for name in ("losses", "eval", "closed"):
        assert shared[name] == pytest.approx(alone[name], abs=1e-4), name
    assert shared["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert shared["gates"] == pytest.approx(alone["gates"], abs=1e-5)
    assert shared["tokens"] == alone["tokens"]
    if kind == "shared1":
        assert shared["resumed"] == pytest.approx(alone["losses"], abs=1e-4)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_follows_the_run_without_it(tmp_path, monkeypatch, kind):
    """One process: on a CPU transformers knows no other under DeepSpeed."""
    pytest.importorskip("deepspeed")
    alone = run([], "trainer", tmp_path / "one", "fresh")
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    for name, value in {**place, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    zero = run([], kind, tmp_path / "zero", "fresh")
    assert zero["wrapper"] == "DeepSpeedEngine"
    for name in ("losses", "gates", "eval", "closed"):
        assert zero[name] == pytest.approx(alone[name], abs=1e-5), name
    assert abs(zero["closed"] - zero["eval"]) > 0.01


def test_fully_sharded_parameters_follow_the_loss_curve_of_one_process(tmp_path):
    alone = run([], "fsdp", tmp_path / "one", "fresh")
    both = run([*TORCHRUN, "--master_port", port()], "fsdp", tmp_path / "two", "fresh")
    assert (alone["wrapper"], both["wrapper"]) == ("LlamaForCausalLM", "FSDPLlamaForCausalLM")
    assert len(alone["losses"]) == 4
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
