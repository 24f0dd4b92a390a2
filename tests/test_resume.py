"""A run that was killed and resumed is the run that was not."""

import json
import logging
import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch
from datasets import Dataset
from models import random_ids
from training import CARRY, OnStepEnd, assert_equal_tensors, make_trainer, tiny_model, tiny_rows, weights_of

from infini_hf.calibration import calibrate_memory
from infini_hf.checkpoints import RECORD, is_whole, resolve_checkpoint
from infini_hf.data.lane_order import lane_stream
from infini_hf.lora import add_lora
from infini_hf.lora_base import apart_of

MEMORY = {"fresh": False, "carry": True}
STEPS = 9


def run_of(folder, carry, **options):
    """A run of three epochs whose steps depend on everything that a checkpoint has to bring back.

    Dropout and shuffling need the random state, the schedule its step, momentum the optimizer.
    """
    arguments = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "memory_gate_learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "train_sampling_strategy": "random",
        "carry_memory": carry,
    }
    options = {"model": tiny_model(overrides={"attention_dropout": 0.2}, **CARRY), **arguments, **options}
    return make_trainer(folder, **options)


def outcome(trainer):
    """Weights and the log of the steps, without the clock."""
    return weights_of(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_outcome(trainer, expected):
    weights, log = outcome(trainer)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert log == expected[1]
    assert_equal_tensors(weights, expected[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """For each kind of memory the outcome of the whole run, and its folder with a checkpoint of every step."""
    runs = {}
    for name, carry in MEMORY.items():
        folder = tmp_path_factory.mktemp(name)
        trainer = run_of(folder, carry, save_steps=1)
        trainer.train()
        runs[name] = outcome(trainer), folder
    return runs


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    """A function that copies some checkpoints of the whole run into a folder of their own."""

    def copied(name, *steps):
        for step in steps:
            shutil.copytree(uninterrupted[name][1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        return tmp_path

    return copied


# Killed


def train_slowly(folder, carry, pause):
    """What the process that is killed does."""
    torch.set_num_threads(1)
    trainer = run_of(folder, carry, parts={"callbacks": [OnStepEnd(lambda state: time.sleep(pause))]})
    trainer.train(resume_from_checkpoint=any(map(is_whole, folder.glob("checkpoint-*"))))


def kill_while_training(folder, carry, after, delay, pause=0.05):
    """Start or continue the run in a process of its own; kill it `delay` seconds after the file `after` is there."""
    # A server that has imported everything once; what it forks has no threads but its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "infini_hf.trainer"])
    process = context.Process(target=train_slowly, args=(folder, carry, pause))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and not (folder / after).exists():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.parametrize("memory", MEMORY)
def test_a_run_that_is_killed_twice_ends_as_if_it_never_was(tmp_path, uninterrupted, memory):
    carry = MEMORY[memory]
    # Somewhere between two steps, then while a checkpoint is being written.
    kill_while_training(tmp_path, carry, "checkpoint-2/trainer_state.json", random.uniform(0.0, 0.1))
    kill_while_training(tmp_path, carry, "checkpoint-6", random.uniform(0.0, 0.02))
    assert is_whole(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-8").exists()
    trainer = run_of(tmp_path, carry)
    trainer.train(resume_from_checkpoint=True)
    assert_same_outcome(trainer, uninterrupted[memory][0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("memory", MEMORY)
def test_a_run_may_be_killed_at_any_moment(tmp_path, uninterrupted, memory, seed):
    moments = random.Random(seed)
    for step in (2, 4, 6, 8):
        kill_while_training(tmp_path, MEMORY[memory], f"checkpoint-{step}", moments.uniform(0.0, 0.08), pause=0.1)
    trainer = run_of(tmp_path, MEMORY[memory])
    trainer.train(resume_from_checkpoint=True)
    assert_same_outcome(trainer, uninterrupted[memory][0])


# Resumed


@pytest.mark.parametrize("step", [1, 3, 7])
@pytest.mark.parametrize("memory", MEMORY)
def test_every_checkpoint_leads_to_the_same_end(checkpoints, uninterrupted, memory, step):
    """In the first epoch, at the end of one, and in later ones."""
    trainer = run_of(checkpoints(memory, step), MEMORY[memory])
    trainer.train(resume_from_checkpoint=True)
    assert_same_outcome(trainer, uninterrupted[memory][0])


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("step", [3, 8])
def test_a_stream_goes_on_in_the_pass_where_it_was(step, carry, tmp_path):
    """The stock trainer skips all steps in the first pass, finds it too short, and begins at the first row again.

    Nine rows are five micro-batches and, in lanes, four: a pass ends in the middle of a step, or between two.
    """

    def stream():
        rows = Dataset.from_list(tiny_rows()[:9]).to_iterable_dataset()
        return lane_stream(rows, 2) if carry else rows.shuffle(seed=3, buffer_size=4)

    options = {"train_sampling_strategy": "sequential", "save_steps": 1}
    whole = run_of(tmp_path / "whole", carry, rows=stream(), **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "half" / f"checkpoint-{step}")
    resumed = run_of(tmp_path / "half", carry, rows=stream(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_outcome(resumed, outcome(whole))


def stream_run(folder, size, accumulation, **options):
    rows = Dataset.from_list(tiny_rows(documents=12)).to_iterable_dataset()
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    options = {"rows": rows, "train_sampling_strategy": "sequential", "max_steps": 6, **sizes, **options}
    return run_of(folder, False, save_steps=1, lr_scheduler_type="constant", **options)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4), (4, 1)])
def test_a_stream_goes_on_at_its_row_in_batches_of_another_size(size, accumulation, tmp_path):
    """Four rows a step in every way; the count of micro-batches would be another place."""
    stream_run(tmp_path, 2, 2, max_steps=3).train()
    resumed, firsts = stream_run(tmp_path, size, accumulation), []
    step = resumed.training_step

    def noting(model, inputs, *args):
        firsts.extend(inputs["input_ids"][:, 0].tolist())
        return step(model, inputs, *args)

    resumed.training_step = noting
    resumed.train(resume_from_checkpoint=True)
    assert firsts == [row["input_ids"][0] for row in tiny_rows(documents=12)[12:24]]


def test_lanes_are_not_resumed_with_other_accumulation(checkpoints):
    with pytest.raises(
        ValueError, match=r"of 2 micro-batches a step, and this run has 1: .* gradient_accumulation_steps"
    ):
        run_of(checkpoints("carry", 4), True, gradient_accumulation_steps=1).train(resume_from_checkpoint=True)


def test_a_pass_may_not_end_a_checkpoint_inside_a_step(tmp_path):
    rows = lane_stream(Dataset.from_list(tiny_rows()).to_iterable_dataset(), 2)
    with pytest.raises(
        ValueError, match=r"save_strategy='epoch' with carry_memory=True, a stream and .*=2: a pass may"
    ):
        run_of(tmp_path, True, rows=rows, save_strategy="epoch")


def test_the_whole_run_learned_and_shuffled(uninterrupted):
    """What makes the comparisons above mean something."""
    fresh, carry = (uninterrupted[name][0] for name in MEMORY)
    assert fresh[1][-1]["loss"] != carry[1][-1]["loss"]
    assert len({entry["loss"] for entry in carry[1]}) == STEPS
    assert carry[1][-1]["memory_gate_moved"] > 0
    assert carry[1][-1]["epoch"] == 3


# Broken checkpoints


def truncate_state(folder):
    path = folder / "trainer_state.json"
    path.write_bytes(path.read_bytes()[:100])


def remove_state(folder):
    (folder / "trainer_state.json").unlink()


def leave_the_folder_alone(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [truncate_state, remove_state, leave_the_folder_alone])
def test_a_checkpoint_that_was_not_written_to_its_end_is_skipped(checkpoints, uninterrupted, damage, caplog):
    folder = checkpoints("carry", 4, 7, 8)
    damage(folder / "checkpoint-8")
    trainer = run_of(folder, True)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-8 was not written to its end: going back to the one before" in caplog.text
    assert "checkpoint-7" not in caplog.text
    assert_same_outcome(trainer, uninterrupted["carry"][0])


def test_a_checkpoint_that_is_written_again_is_not_whole_until_it_is_written(checkpoints, monkeypatch):
    """By a run that starts over in the same folder, and ends while it writes."""
    folder = checkpoints("fresh", 2, 4)
    trainer = run_of(folder, False)

    def killed(output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    assert not is_whole(folder / "checkpoint-2")
    assert is_whole(folder / "checkpoint-4")


def test_a_broken_checkpoint_that_is_named_is_refused(checkpoints):
    folder = checkpoints("fresh", 4)
    remove_state(folder / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-4: is no whole checkpoint"):
        run_of(folder, False).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(ValueError, match="holds no whole checkpoint: start without resume_from_checkpoint"):
        run_of(folder, False).train(resume_from_checkpoint=True)


def test_the_last_checkpoint_is_that_of_the_greatest_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-2000-copy", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert resolve_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-100")
    assert resolve_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path) == str(tmp_path / "checkpoint-9")
    assert resolve_checkpoint(None, tmp_path) is resolve_checkpoint(False, tmp_path) is None


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        run_of(tmp_path / "nowhere", False).train(resume_from_checkpoint=True)


# Another run


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (
            "fresh",
            {"model": {"segment_length": 16, **CARRY}},
            "segment_length=8.*segment_length=16.*same values to resume",
        ),
        ("fresh", {"model": {}}, "patch with the same values to resume, or load the weights and start a new run"),
        ("fresh", {"carry_memory": True}, "trained with carry_memory=False, and this run has carry_memory=True"),
        ("carry", {"carry_memory": False}, "trained with carry_memory=True, and this run has carry_memory=False"),
        (
            "carry",
            {"per_device_train_batch_size": 3},
            "carries the memory of 2 lanes, and this run has 3: resume with the same per_device_train_batch_size",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(checkpoints, memory, options, message):
    folder = checkpoints(memory, 4)
    model = {"model": tiny_model(**options["model"])} if "model" in options else {}
    with pytest.raises(ValueError, match=message):
        run_of(folder, MEMORY[memory], **{**options, **model}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("before", [True, False], ids=["lost", "new"])
def test_a_checkpoint_of_a_memory_that_was_centered_otherwise_is_refused(tmp_path, before):
    """Shifts are buffers that a model has or has not: loading its state dict would drop them, or keep foreign ones."""

    def run(centered):
        model = tiny_model(feature_map="exp")
        if centered:
            calibrate_memory(model, random_ids(1, 64), progress=False)
        return run_of(tmp_path, False, model=model)

    run(before).train()
    was, now = (2, 0) if before else (0, 2)
    with pytest.raises(ValueError, match=f"calibrated in {was} layers, that of the model in {now}: resume with"):
        run(not before).train(resume_from_checkpoint=True)
    assert run(before).train(resume_from_checkpoint=True).global_step == STEPS


def adapted_run(folder, scale=1.0, **options):
    model = tiny_model()
    with torch.no_grad():
        for weight in model.get_decoder().layers[1].parameters():
            weight.mul_(scale)
    if options:
        model = add_lora(model, **{"target_modules": ["q_proj"], "lora_alpha": 8, **options})
    return run_of(folder, False, model=model)


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, "all weights, without an adapter"),
        ({"r": 4}, r"LORA of q_proj \(r=4, lora_alpha=8, bias=none\)"),
        ({"r": 2, "lora_alpha": 64}, r"LORA of q_proj \(r=2, lora_alpha=64, bias=none\)"),
        ({"r": 2, "use_rslora": True}, r"LORA of q_proj \(r=2, lora_alpha=8, use_rslora=True, bias=none\)"),
        (
            {"r": 2, "layers_to_transform": [1]},
            r"LORA of q_proj \(r=2, lora_alpha=8, bias=none\): 1 layers, as .*layers.0",
        ),
        ({"r": 2, "use_dora": True}, r"LORA of q_proj \(r=2, lora_alpha=8, use_dora=True, bias=none\)"),
    ],
    ids=["full", "rank", "alpha", "rslora", "layers", "dora"],
)
def test_a_checkpoint_of_another_adapter_is_refused_by_its_name(tmp_path, options, here):
    adapted_run(tmp_path, r=2).train()
    there = r"LORA of q_proj \(r=2, lora_alpha=8, bias=none\)"
    with pytest.raises(ValueError, match=f"is {there}, and here it is {here}.*; resume .* another output_dir"):
        adapted_run(tmp_path, **options).train(resume_from_checkpoint=True)
    assert adapted_run(tmp_path, r=2).train(resume_from_checkpoint=True).global_step == STEPS


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj"])
def test_an_adapter_that_is_asked_for_in_other_words_goes_on(tmp_path, targets):
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapted_run(tmp_path, r=2, target_modules=names).train()
    again = adapted_run(tmp_path, r=2, target_modules=targets)
    assert again.train(resume_from_checkpoint=True).global_step == STEPS


def test_a_checkpoint_of_all_weights_is_refused_for_an_adapter(tmp_path):
    adapted_run(tmp_path).train()
    with pytest.raises(ValueError, match=r"all weights, without an adapter, and here it is LORA of q_proj \(r=2"):
        adapted_run(tmp_path, r=2).train(resume_from_checkpoint=True)


def test_an_adapter_does_not_go_on_with_another_base(tmp_path):
    adapted_run(tmp_path, r=2).train()
    with pytest.raises(ValueError, match=r"other weights than those of this base \(\d+ of \d+ .* began on"):
        adapted_run(tmp_path, scale=0.5, r=2).train(resume_from_checkpoint=True)
    # What a rank holds before the weights of another reach it tells nothing.
    assert not apart_of({"norm.weight": [0.0, 0.0]}, {"norm.weight": [1.0, 0.5]})


def test_lanes_of_another_number_of_processes_are_refused(checkpoints):
    folder = checkpoints("carry", 4)
    record = folder / "checkpoint-4" / RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "processes": 4}))
    with pytest.raises(
        ValueError, match=r"the memory of 4 processes, and this run has 1: .* same number of processes"
    ):
        run_of(folder, True).train(resume_from_checkpoint=True)


def test_another_batch_size_is_fine_where_no_memory_is_carried(checkpoints):
    trainer = run_of(checkpoints("fresh", 4), False, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS


def test_a_checkpoint_of_the_stock_trainer_is_refused(checkpoints):
    folder = checkpoints("fresh", 4)
    (folder / "checkpoint-4" / RECORD).unlink()
    with pytest.raises(ValueError, match=r"was not written by InfiniTrainer .* start a new run"):
        run_of(folder, False).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lost_its_lanes_is_refused(checkpoints):
    folder = checkpoints("carry", 4)
    (folder / "checkpoint-4" / "lanes_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lanes_0\.safetensors"):
        run_of(folder, True).train(resume_from_checkpoint=True)
