"""A training run for `tests/test_distributed.py`, started once for each process: writes its losses as JSON.

python tests/distributed_run.py {trainer,stream,padded,shared1,shared2,zero2,zero3,fsdp} OUTPUT_DIR {carry,fresh}
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import build_patched, random_ids
from torch import distributed
from transformers import default_data_collator

from infini_hf import InfiniCache, InfiniTrainer, InfiniTrainingArguments
from infini_hf.data.collator import InfiniCollator
from infini_hf.data.lane_order import lane_stream
from infini_hf.evaluation.controls import closed_memory
from infini_hf.lora import add_lora
from infini_hf.segment_step import StepOptions, cut_segments, segment_major_loss, shift_labels

SEGMENT = 8
STEPS = 4
GLOBAL_BATCH = 4


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2

    def save_pretrained(self, folder):
        """Nothing: ids are all there is of it."""


def rows():
    """Four documents of three rows, of unequal length, so that ranks meet different numbers of segments."""
    examples = []
    for document in range(4):
        for part in range(3):
            length = 40 if part < 2 else 7 + 11 * document
            ids = random_ids(1, length, seed=10 * document + part)[0].tolist()
            examples.append({"input_ids": ids, "labels": ids, "document": document, "part": part})
    return Dataset.from_list(examples)


def weighted_rows():
    """The same with weights of the loss, in an order in which rows of unequal length stand side by side."""
    data = list(rows())
    for index, row in enumerate(data):
        drawn = torch.rand(len(row["input_ids"]), generator=torch.Generator().manual_seed(index))
        row["loss_weights"] = (1.0 + 2.0 * (drawn > 0.7)).tolist()
    # A row of one target in each document, of which two processes have half a one each.
    for row in data[1::3]:
        row["labels"] = [-100] * 17 + row["labels"][17:18] + [-100] * (len(row["labels"]) - 18)
    return Dataset.from_list(data[1::2] + data[::2])


def padded_rows():
    """The same padded to one length, of which the last segment has no token, with labels at the padding as well."""
    data = []
    for row in rows():
        padding = [0] * (6 * SEGMENT - len(row["input_ids"]))
        mask = [1] * len(row["input_ids"]) + padding
        data.append(
            {"input_ids": row["input_ids"] + padding, "labels": row["labels"] + padding, "attention_mask": mask}
        )
    return Dataset.from_list(data)


def by_length(examples):
    return sorted(examples, key=lambda row: len(row["labels"]))


def model_of_the_run():
    return build_patched("llama", segment_length=SEGMENT, overlap=2)


def run_trainer(folder, kind, carry):
    world = int(os.environ.get("WORLD_SIZE", 1))
    zero = int(kind.removeprefix("zero")) if kind.startswith("zero") else None
    # Rows of a global batch, of which processes that share one have one each.
    batch = int(kind.removeprefix("shared")) if kind.startswith("shared") else GLOBAL_BATCH
    size = world // batch if kind.startswith("shared") and world > 1 else 1
    # Before the arguments: after them, under ZeRO-3, transformers would build it in parts that a seed does not fill.
    model = model_of_the_run()
    if kind == "shared2":
        model = add_lora(model, r=4, target_modules="all-linear")
    args = InfiniTrainingArguments(
        str(folder),
        per_device_train_batch_size=batch * size // world,
        per_device_eval_batch_size=GLOBAL_BATCH // world,
        sequence_parallel_size=size,
        # Tokens of this process alone, and a state that is cut.
        bptt_segments=4 if kind == "shared1" else None,
        average_tokens_across_devices=kind != "shared1",
        gradient_accumulation_steps=2 if kind == "shared2" else 1,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="steps" if kind == "shared1" else "no",
        save_steps=STEPS // 2,
        eval_strategy="steps",
        eval_steps=STEPS,
        carry_memory=carry,
        report_to=[],
        learning_rate=1e-3,
        # DeepSpeed is for devices, and takes the CPU where there are none.
        use_cpu=zero is None,
        deepspeed=zero and {"zero_optimization": {"stage": zero}, "train_micro_batch_size_per_gpu": "auto"},
        disable_tqdm=True,
        plot_memory_gates=False,
        train_sampling_strategy="random" if carry else "sequential",
    )
    # Ten rows leave a last batch that is not full.
    data = train = weighted_rows() if kind.startswith("shared") else rows()
    data = train = padded_rows() if kind == "padded" else data
    held_out = data.select(range(10))
    if kind == "stream":
        # Without lanes by length, so that batches of the two ranks differ in width.
        # Shards of unequal length, which would end at different steps.
        stream = Dataset.from_list(list(data) if carry else by_length(data)).to_iterable_dataset(num_shards=3)
        train = lane_stream(stream, GLOBAL_BATCH) if carry else stream
        held_out = held_out.to_iterable_dataset(num_shards=2)

    def make(model):
        return InfiniTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=default_data_collator if kind == "padded" else InfiniCollator(Tokenizer()),
        )

    trainer = make(model)
    trainer.train()
    log = trainer.state.log_history
    resumed = None
    if kind == "shared1":
        again = make(model_of_the_run())
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
        resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    return {
        "resumed": resumed,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "eval": next(entry["eval_loss"] for entry in log if "eval_loss" in entry),
        "tokens": next(entry["eval_tokens"] for entry in log if "eval_tokens" in entry),
        "gates": [entry["memory_gate/layer_1/mean"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "loss" in entry],
        "closed": closed_loss(trainer),
    }


def closed_loss(trainer):
    with closed_memory(trainer.model):
        return trainer.evaluate()["eval_loss"]


def run_fsdp():
    """The same step without a trainer, its parameters sharded by `fully_shard`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    model = model_of_the_run().train()
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group("gloo")
        mesh = distributed.init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    collate, data, losses = InfiniCollator(Tokenizer()), by_length(rows()), []
    share = GLOBAL_BATCH // world
    for step in range(STEPS):
        first = step * GLOBAL_BATCH % len(data)
        examples = [data[index % len(data)] for index in range(first, first + GLOBAL_BATCH)]
        items = sum(len(example["labels"]) - 1 for example in examples)
        batch = collate(examples[rank * share : (rank + 1) * share])
        segments = cut_segments(batch["input_ids"], batch["attention_mask"], shift_labels(batch["labels"]), SEGMENT)
        most = torch.tensor(len(segments))
        if world > 1:
            distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        filling = int(most) - len(segments)
        # Ranks average their gradients, and the loss is over the tokens of all.
        cache = InfiniCache(model.config)
        loss, _ = segment_major_loss(model, segments, cache, items / world, StepOptions(filling=filling))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(mean.item())
    return {"wrapper": type(model).__name__, "losses": losses}


def main():
    torch.set_num_threads(1)
    kind, folder, carry = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "carry"
    result = run_fsdp() if kind == "fsdp" else run_trainer(folder, kind, carry)
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "result.json").write_text(json.dumps(result))
    if distributed.is_initialized():
        # Both to the end: a rank that leaves early takes the other's connection with it.
        distributed.barrier()
        distributed.destroy_process_group()
        # Threads of the backend now and then abort an interpreter that is shutting down, after all is done.
        os._exit(0)


if __name__ == "__main__":
    main()
