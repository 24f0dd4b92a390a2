"""Summarise texts of any length by streaming them through a patched model; writes one JSON line for each.

    python scripts/summarize.py --config configs/eval/booksum_tiny_cpu.yaml --source PAIRS_FOLDER --output said.jsonl
    python scripts/summarize.py --model MODEL --adapter ADAPTER_FOLDER --text_file book.txt --output said.jsonl

The decoding settings are the paper's by default: temperature 0.5, top-p 0.95, at most 1,024 tokens. `--closed` closes
the memory, which is the control, and needs an output file of its own. Texts that the file already has are not read
again.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.booksum import DEFAULT_PROMPT, load_booksum
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.summaries import PAPER_DECODING, summarize


@dataclass
class SummaryArguments:
    """What is summarised, and how."""

    output: str = field(metadata={"help": "JSONL file: id, summary, reference, reader"})
    source: str | None = field(default=None, metadata={"help": "pairs as for finetune_booksum.py"})
    text_file: str | None = field(default=None, metadata={"help": "one text file instead of pairs"})
    split: str = field(default="test", metadata={"help": "split of source"})
    level: str | None = field(default=None, metadata={"help": "chapters or books, where the dataset has both"})
    limit: int | None = field(default=None, metadata={"help": "pairs to summarise, the first ones"})
    adapter: str | None = field(default=None, metadata={"help": "folder of a LoRA adapter for the model"})
    closed: bool = field(default=False, metadata={"help": "close the memory: the control"})
    prompt: str = field(default=DEFAULT_PROMPT, metadata={"help": "words around the text, with {text} in its place"})
    max_text_tokens: int | None = field(default=500_000, metadata={"help": "cut texts after so many tokens"})
    max_new_tokens: int = field(
        default=PAPER_DECODING["max_new_tokens"], metadata={"help": "the most tokens of a summary"}
    )
    temperature: float = field(default=PAPER_DECODING["temperature"], metadata={"help": "0 for the likeliest token"})
    top_p: float = field(
        default=PAPER_DECODING["top_p"], metadata={"help": "share of the probability that tokens are drawn from"}
    )
    seed: int = field(default=0, metadata={"help": "of every summary alike, so that order and resuming do not matter"})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu …; the best one by default"})

    def texts(self):
        """`(id, text, reference)` of everything to summarise."""
        if (self.source is None) == (self.text_file is None):
            raise ValueError("give source (pairs) or text_file (one text), and not both")
        if self.text_file is not None:
            yield self.text_file, Path(self.text_file).read_text(encoding="utf-8"), ""
            return
        for pair in load_booksum(self.source, self.split, self.level, limit=self.limit, drop_empty=True):
            yield pair["id"], pair["text"], pair["summary"]

    def decoding(self):
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        options = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**options, "max_new_tokens": self.max_new_tokens}


def finished(output, reader):
    """Ids of the texts that a file has summaries of, by the same reader.

    Raises:
        ValueError: when a line is broken, or by another reader: its summaries would pass for those of this one.
    """
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    ids = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{output}: line {number} was not written to its end ({error}): remove it") from error
        if row.get("reader") != reader:
            raise ValueError(f"{output}: line {number} is by {row.get('reader')}, not {reader}: name another output")
        ids.add(row["id"])
    return ids


def main(argv=None):
    model_args, args = parse_arguments((ModelArguments, SummaryArguments), __doc__, argv)
    output = Path(args.output)
    reader = {"model": model_args.model, "adapter": args.adapter, "closed": args.closed}
    done = finished(output, reader)
    texts = [text for text in args.texts() if text[0] not in done]
    model, tokenizer = model_args.load(args.adapter)
    model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    with closed_memory(model) if args.closed else nullcontext(), output.open("a", encoding="utf-8") as file:
        for name, text, reference in tqdm(texts, desc="summaries"):
            set_seed(args.seed)
            said = summarize(model, tokenizer, text, args.prompt, args.max_text_tokens, **args.decoding())
            row = {"id": name, "summary": said, "reference": reference, "reader": reader}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
