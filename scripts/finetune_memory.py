"""Teach a patched model to remember: facts hidden in novels and grass filler, rows of at most a few thousand tokens.

    python scripts/finetune_memory.py --config configs/pretrain/tiny_llama_infini_1_passkey.yaml \\
        --train_folder NOVELS/train

Exact gradients through the memory, memory dilution driven by the accuracy of the answers. A run resumes from the last
whole checkpoint in its `output_dir` and leaves the model and its tokenizer in `OUTPUT_DIR/final`.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from transformers import set_seed

from infini_hf import InfiniTrainingArguments
from infini_hf.cache import infini_config_of
from infini_hf.calibration import add_memory_projections, calibrate_memory
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.run_training import train_and_report
from infini_hf.cli.script_arguments import ModelArguments, command_line
from infini_hf.data.base_rows import read_texts
from infini_hf.data.memory_rows import MemoryRows, MemoryRowStyle
from infini_hf.gate import MemoryGate


@dataclass(frozen=True)
class RowArguments(MemoryRowStyle):
    """The rows: see infini_hf.data.memory_rows."""

    calibration_tokens: int = field(
        default=16_384,
        metadata={"help": "tokens of the novels that feature_map exp is calibrated on, once; 0 leaves it out"},
    )
    memory_projections: bool = field(
        default=False, metadata={"help": "let the memory learn an affine map of its own of its queries and keys"}
    )
    train_folder: str = field(default="novels/train", metadata={"help": "folder of plain-text novels"})

    def style(self):
        names = [item.name for item in dataclasses.fields(MemoryRowStyle)]
        return MemoryRowStyle(**{name: getattr(self, name) for name in names})


def centered(model):
    """Whether a model was calibrated before: its weights have learned with the shifts it has."""
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    return any(gate.query_shift is not None or gate.query_projection is not None for gate in gates)


def main(argv=None):
    model_args, row_args, args = parse_arguments(
        (ModelArguments, RowArguments, InfiniTrainingArguments), __doc__, argv
    )
    set_seed(args.seed)
    model, tokenizer = model_args.load()
    texts = read_texts(row_args.train_folder)
    if row_args.calibration_tokens and infini_config_of(model.config).feature_map == "exp" and not centered(model):
        share = row_args.calibration_tokens // len(texts)
        # From inside each novel: the beginnings are titles and prefaces.
        pieces = [tokenizer(text[5000 : 5000 + 8 * share])["input_ids"][:share] for text in texts]
        calibrate_memory(model, torch.tensor([[token for piece in pieces for token in piece]]))
    if row_args.memory_projections:
        add_memory_projections(model)
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.row_groups
    rows = MemoryRows(
        texts,
        tokenizer,
        count,
        infini_config_of(model.config).segment_length,
        row_args.style(),
        args.seed,
    )
    data = f"facts hidden in {row_args.train_folder} and in grass filler"
    command = command_line("scripts/finetune_memory.py", argv)
    return train_and_report(args, model, tokenizer, rows, None, model_args.model, data, command)


if __name__ == "__main__":
    run_script(main)
