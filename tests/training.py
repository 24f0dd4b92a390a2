"""What tests of training share: tiny datasets, a stand-in for a tokenizer, and a trainer of a few steps."""

import gc

import torch
from datasets import Dataset
from models import build_patched, random_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

from infini_hf import InfiniTrainer, InfiniTrainingArguments
from infini_hf.data.collator import InfiniCollator

# Every run begins by collecting garbage: half its time, were it to look at all that the imports have made.
gc.freeze()

SEGMENT = 8
# Everything that a step has to carry: window keys and values beside the memory, and the other formulas.
CARRY = {"overlap": 3, "sink_tokens": 2, "memory_update": "delta", "feature_map": "exp", "gate": "sigmoid"}


class StubTokenizer:
    """As much of a tokenizer as a trainer and a collator look at."""

    pad_token_id, eos_token_id = 0, 2

    def save_pretrained(self, folder, **kwargs):
        pass


def tiny_rows(documents=4, parts=3, length=40, last=27):
    """Documents of alternately `parts` and `parts - 1` rows of `length` tokens, the last row shorter."""
    rows = []
    for document in range(documents):
        count = max(1, parts - document % 2)
        for part in range(count):
            size = last if part + 1 == count else length
            ids = random_ids(1, size, seed=100 * document + part)[0].tolist()
            rows.append({"input_ids": ids, "labels": ids, "document": document, "part": part})
    return rows


def uneven_rows(lengths=(45, 30, 13, 38, 45, 21, 9)):
    """Rows of unequal length, of which some have segments in which nothing is learned."""
    rows = []
    for index, length in enumerate(lengths):
        ids = random_ids(1, length, seed=index)[0].tolist()
        labels = [
            -100 if index % 2 == 0 and SEGMENT <= column < 3 * SEGMENT else ids[column] for column in range(length)
        ]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def tiny_model(family="llama", overrides=None, **infini):
    """A patched model with open gates and short segments."""
    return build_patched(family, overrides=overrides, **{"segment_length": SEGMENT, **infini})


def make_trainer(folder, model=None, rows=None, kind=InfiniTrainer, parts=None, **arguments):
    """A trainer of few steps on the CPU that writes nothing.

    `rows` is a list of rows or a dataset; `parts` are further arguments of the trainer, `arguments` those of training.
    """
    rows = tiny_rows() if rows is None else rows
    stock = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        # A sequential dataset is left in its own order, which is seldom that of the lanes.
        "train_sampling_strategy": "random" if arguments.get("carry_memory") else "sequential",
    }
    if kind is Trainer:
        args = TrainingArguments(str(folder), **{**stock, **arguments})
    else:
        args = InfiniTrainingArguments(str(folder), **{**stock, "plot_memory_gates": False, **arguments})
    return kind(
        **{
            "model": tiny_model() if model is None else model,
            "args": args,
            "train_dataset": Dataset.from_list(rows) if isinstance(rows, list) else rows,
            "data_collator": InfiniCollator(StubTokenizer()),
            **(parts or {}),
        }
    )


class GradientCatcher(TrainerCallback):
    """Keeps the gradients of every optimizer step, after clipping."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients_of(model))


class OnStepEnd(TrainerCallback):
    """Calls `function(state)` after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state)


def losses_of(trainer, **options):
    """Train; the loss of every micro-batch, exactly."""
    losses, compute = [], trainer.compute_loss

    def noted(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = noted
    trainer.train(**options)
    return losses


def first_gradients(trainer):
    """The gradients of the first optimizer step of a run."""
    catcher = GradientCatcher()
    trainer.add_callback(catcher)
    trainer.train()
    return catcher.steps[0]


def gradients_of(model):
    """A copy of every gradient, by the name of its parameter."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Every parameter has a gradient, equal to `tolerance` times the largest of that parameter's."""
    assert expected
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        error = (actual[name].double() - gradient.double()).abs().max() / gradient.double().abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def weights_of(model):
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_tensors(actual, expected):
    """Two dictionaries of tensors hold exactly the same."""
    assert set(actual) == set(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"different: {different}"


def logged(trainer, name):
    """The values of `name` in the log of a run."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
