"""Pretrain the small stock Llama that the package ships, on a folder of novels, with the stock Trainer.

    python scripts/pretrain_base.py --config configs/pretrain/tiny_llama_1_text.yaml --train_folder NOVELS/train

and then with tiny_llama_2_copy, tiny_llama_3_recall, tiny_llama_4_names and tiny_llama_5_mixed: stages, because a
model this small does not learn to copy from long rows of text. After the text come short rows with one fact, long
rows, short rows with facts to tell apart by name, and the full mix. Each config says which checkpoint it goes on
from. A run resumes from the last checkpoint in its `output_dir`, and leaves the bfloat16 model and its tokenizer in
`OUTPUT_DIR/final`. Run `scripts/evaluate_base.py` on the last one for the model card.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from infini_hf.checkpoints import last_whole_checkpoint
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.script_arguments import rows_to_draw
from infini_hf.data.base_rows import BaseRows, read_texts, train_tokenizer


@dataclass
class BaseArguments:
    """The data, the model to start from, or the shape of a new one."""

    train_folder: str = field(metadata={"help": "folder of plain-text novels"})
    model: str | None = field(default=None, metadata={"help": "checkpoint to go on from; a new model without it"})
    row_length: int = field(default=640, metadata={"help": "tokens in a row"})
    max_position_embeddings: int = field(default=640, metadata={"help": "positions that the config promises"})
    recall_style: str = field(default="mixed", metadata={"help": "simple, named or mixed recall documents"})
    recall_fraction: float = field(default=0.25, metadata={"help": "share of in-context recall rows"})
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})


def build_model(args, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main():
    args, training_args = parse_arguments((BaseArguments, TrainingArguments), __doc__)
    count = rows_to_draw(training_args)
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(training_args.seed)
    texts = read_texts(args.train_folder)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(texts, args.vocab_size)
        model = build_model(args, tokenizer)
    rows = BaseRows(
        texts, tokenizer, count, args.row_length, args.recall_fraction, args.recall_style, training_args.seed
    )
    trainer = Trainer(model=model, args=training_args, train_dataset=rows, processing_class=tokenizer)
    Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training_args.output_dir))
    model.config.use_cache = True
    final = Path(training_args.output_dir) / "final"
    model.to(torch.bfloat16).save_pretrained(final)
    tokenizer.save_pretrained(final)


if __name__ == "__main__":
    run_script(main)
