"""Continual pretraining of a patched model on long documents: hub datasets, or a folder of texts.

    python scripts/pretrain.py --config configs/pretrain/tiny_cpu.yaml --train_source NOVELS/train
    accelerate launch --config_file configs/accelerate/ddp.yaml \\
        scripts/pretrain.py --config configs/pretrain/llama_3.2_1b.yaml

NOVELS stands for a folder of your own with the folders `train` and `validation`, and long texts in them, one `.txt`
file each. A run resumes from the last whole checkpoint in its `output_dir`. It leaves the model, its tokenizer and a
model card with the closed memory as control in `OUTPUT_DIR/final`; with `lora_r` these are adapters and gates, for a
GPU that the optimizer's states of all weights do not fit on.
"""

from transformers import set_seed

from infini_hf import InfiniTrainingArguments
from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.run_training import train_and_report
from infini_hf.cli.script_arguments import DocumentArguments, LoraArguments, ModelArguments, command_line


def main(argv=None):
    model_args, lora_args, data_args, args = parse_arguments(
        (ModelArguments, LoraArguments, DocumentArguments, InfiniTrainingArguments), __doc__, argv
    )
    model_args.check()
    data_args.check_sources()
    set_seed(args.seed)
    model, tokenizer = model_args.load(**lora_args.loading_options())
    model = lora_args.wrap(model)
    segment_length = infini_config_of(model.config).segment_length
    lanes = args.train_batch_size * args.row_groups if args.carry_memory else None
    # One process prepares the rows, the others find them in the cache (of a stream, each makes what is evaluated).
    with args.main_process_first(desc="rows"):
        train_rows = data_args.rows(tokenizer, segment_length, lanes, args.seed)
        eval_rows = data_args.eval_rows(tokenizer, segment_length)
    command = command_line("scripts/pretrain.py", argv)
    return train_and_report(
        args, model, tokenizer, train_rows, eval_rows, model_args.model, data_args.train_source, command
    )


if __name__ == "__main__":
    run_script(main)
