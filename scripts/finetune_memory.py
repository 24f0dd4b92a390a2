"""Teach a patched model to remember: facts hidden in novels and grass filler, rows of at most a few thousand tokens.

    python scripts/finetune_memory.py --config configs/pretrain/tiny_llama_infini_1_passkey.yaml \\
        --train_folder NOVELS/train

Exact gradients through the memory, memory dilution driven by the accuracy of the answers. A run resumes from the last
whole checkpoint in its `output_dir` and leaves the model and its tokenizer in `OUTPUT_DIR/final`. With
`--closed_memory true --retrieval_weight 0 --recall_weight 0` it makes the local-only control of any config without
`lora_r`: its rows, the gates at zero. With `lora_r` what learns is an adapter, with the memory's gates and
projections, for `infini-hf passkey MODEL --adapter OUTPUT_DIR/final`.
"""

from dataclasses import dataclass, field

from transformers import set_seed

from infini_hf import InfiniTrainingArguments
from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.memory_arguments import MemoryArguments
from infini_hf.cli.run_training import train_and_report
from infini_hf.cli.script_arguments import LoraArguments, ModelArguments, command_line, rows_to_draw
from infini_hf.data.base_rows import read_texts
from infini_hf.data.memory_row_style import MemoryRowStyle
from infini_hf.data.memory_rows import MemoryRows


@dataclass(frozen=True)
class RowArguments(MemoryRowStyle):
    """The rows: see infini_hf.data.memory_row_style."""

    train_folder: str = field(default="novels/train", metadata={"help": "folder of plain-text novels"})

    def check_batches(self, args):
        """Hold a run to the batches that `novel_lanes` and `rows_alike` are made for.

        Raises:
            ValueError: names what differs.
        """
        size = args.train_batch_size * args.row_groups
        wrong = {
            f"carry_memory={args.carry_memory}": not args.carry_memory,
            f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy != "sequential",
            f"batches of {size} rows": size != self.rows_alike,
        }
        found = [name for name, is_wrong in wrong.items() if is_wrong]
        if self.novel_lanes and found:
            raise ValueError(
                f"novel_lanes={self.novel_lanes} with {found[0]}: novels are read on from batch to batch, in order; "
                "set carry_memory, train_sampling_strategy='sequential' and batches of "
                f"rows_alike={self.rows_alike} rows (per_device_train_batch_size × processes)"
            )


@dataclass
class RunArguments(InfiniTrainingArguments):
    """Rows are drawn in the order in which they are read: those that are equally long stand together."""

    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "sequential: rows as they were drawn; anything else mixes lengths"}
    )


def main(argv=None):
    model_args, lora_args, memory_args, row_args, args = parse_arguments(
        (ModelArguments, LoraArguments, MemoryArguments, RowArguments, RunArguments), __doc__, argv
    )
    count = rows_to_draw(args)
    memory_args.check_told(args.retrieval_weight, args.retrieval_layers)
    memory_args.check_told(args.recall_weight, args.recall_layers, "recall")
    memory_args.check_adapted(lora_args.lora_r)
    row_args.check_batches(args)
    model_args.check()
    texts = read_texts(row_args.train_folder)
    set_seed(args.seed)
    model, tokenizer = model_args.load(**lora_args.loading_options())
    memory_args.prepare(model, tokenizer, texts)
    memory_args.rest(model)
    memory_args.close(model)
    segment_length = infini_config_of(model.config).segment_length
    model = lora_args.wrap(model)
    rows = MemoryRows(
        texts,
        tokenizer,
        count,
        segment_length,
        row_args,
        args.seed,
    )
    data = f"facts hidden in {row_args.train_folder} and in grass filler"
    command = command_line("scripts/finetune_memory.py", argv)
    return train_and_report(args, model, tokenizer, rows, None, model_args.model, data, command)


if __name__ == "__main__":
    run_script(main)
