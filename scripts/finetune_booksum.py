"""Fine-tune a patched model to summarise long texts (BookSum), with LoRA or all weights.

    python scripts/finetune_booksum.py --config configs/lora/tiny_cpu.yaml --source PAIRS
    accelerate launch --config_file configs/accelerate/ddp.yaml \\
        scripts/finetune_booksum.py --config configs/lora/llama_3.2_1b.yaml

PAIRS stands for a folder of your own with train.jsonl, validation.jsonl and test.jsonl, an object a line with the
fields text and summary; a dataset of the hub takes its place. A run resumes from the last whole checkpoint in its
`output_dir`. With `lora_r` the result in `OUTPUT_DIR/final` is an adapter that knows its patch
(infini_hf.lora.load_adapter), without it a whole checkpoint. Then: scripts/summarize.py, and scripts/evaluate.py for
the ROUGE table.
"""

from dataclasses import dataclass, field

from transformers import set_seed

from infini_hf import InfiniTrainingArguments
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_source
from infini_hf.cli.run_training import train_and_report
from infini_hf.cli.script_arguments import LoraArguments, ModelArguments, command_line
from infini_hf.data.booksum import DEFAULT_PROMPT, load_booksum, summarization_rows


@dataclass
class PairArguments:
    """Texts with their summaries."""

    source: str = field(default="kmfoda/booksum", metadata={"help": "hub dataset, or folder or file of JSONL pairs"})
    level: str | None = field(default=None, metadata={"help": "chapters or books, where the dataset has both"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split to evaluate on"})
    limit: int | None = field(default=None, metadata={"help": "pairs to train on, the first ones"})
    eval_limit: int | None = field(default=None, metadata={"help": "pairs to evaluate on"})
    max_text_tokens: int | None = field(default=None, metadata={"help": "cut texts after so many tokens"})
    max_summary_tokens: int = field(default=1024, metadata={"help": "cut summaries after so many tokens"})
    prompt: str = field(default=DEFAULT_PROMPT, metadata={"help": "words around the text, with {text} in its place"})

    def rows(self, tokenizer, split, limit):
        pairs = load_booksum(find_source(self.source, "source"), split, self.level, limit=limit, drop_empty=True)
        return summarization_rows(pairs, tokenizer, self.prompt, self.max_text_tokens, self.max_summary_tokens)


def main(argv=None):
    model_args, lora_args, pair_args, args = parse_arguments(
        (ModelArguments, LoraArguments, PairArguments, InfiniTrainingArguments), __doc__, argv
    )
    model_args.check()
    find_source(pair_args.source, "source")
    set_seed(args.seed)
    model, tokenizer = model_args.load(**lora_args.loading_options())
    model = lora_args.wrap(model)
    with args.main_process_first(desc="rows"):
        train_rows = pair_args.rows(tokenizer, pair_args.train_split, pair_args.limit)
        eval_rows = pair_args.rows(tokenizer, pair_args.eval_split, pair_args.eval_limit)
    command = command_line("scripts/finetune_booksum.py", argv)
    return train_and_report(args, model, tokenizer, train_rows, eval_rows, model_args.model, pair_args.source, command)


if __name__ == "__main__":
    run_script(main)
