"""Summarise texts of any length by streaming them through a patched model; writes one JSON line for each.

    python scripts/summarize.py --config configs/eval/booksum_tiny_cpu.yaml --source PAIRS --output said.jsonl
    python scripts/summarize.py --model MODEL --adapter ADAPTER_FOLDER --text_file book.txt --output said.jsonl

PAIRS is the folder that scripts/finetune_booksum.py takes. The decoding settings are the paper's by default:
temperature 0.5, top-p 0.95, at most 1,024 tokens. `--closed` closes the memory, which is the control. Texts that the
output file already has are not read again; a run with other weights, texts or settings needs a file of its own.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import set_seed

from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.common import read_text
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_device, find_source
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.booksum import DEFAULT_PROMPT, load_booksum
from infini_hf.data.documents import check_count
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.outputs import check_output
from infini_hf.evaluation.reader import reader_of
from infini_hf.evaluation.summaries import PAPER_DECODING, summarize
from infini_hf.evaluation.summary_file import SummaryFile
from infini_hf.fingerprint import digest_text


@dataclass
class SummaryArguments:
    """What is summarised, and how."""

    output: str = field(metadata={"help": "JSONL file: id, summary, reference, digest of text and reference, reader"})
    source: str | None = field(default=None, metadata={"help": "pairs as for finetune_booksum.py"})
    text_file: str | None = field(default=None, metadata={"help": "one text file instead of pairs"})
    split: str = field(default="test", metadata={"help": "split of source"})
    level: str | None = field(default=None, metadata={"help": "chapters or books, where the dataset has both"})
    limit: int | None = field(default=None, metadata={"help": "pairs to summarise, the first ones"})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter for the model, a folder or a name"})
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

    def __post_init__(self):
        for name in ("max_text_tokens", "max_new_tokens", "limit"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_output(self.output)

    def texts(self):
        """`(id, text, reference)` of everything to summarise."""
        if (self.source is None) == (self.text_file is None):
            raise ValueError("give source (pairs) or text_file (one text), and not both")
        if self.text_file is not None:
            yield self.text_file, read_text(Path(self.text_file)), ""
            return
        source = find_source(self.source, "source")
        for pair in load_booksum(source, self.split, self.level, limit=self.limit, drop_empty=True):
            yield pair["id"], pair["text"], pair["summary"]

    def decoding(self):
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        options = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**options, "max_new_tokens": self.max_new_tokens}

    def reader(self, model):
        """Everything beside the text that a summary depends on, the weights apart."""
        source = {"source": self.source, "split": self.split if self.source else None, "level": self.level}
        asked = {"prompt": self.prompt, "max_text_tokens": self.max_text_tokens, "seed": self.seed}
        return {"model": model, "adapter": self.adapter, "closed": self.closed, **source, **asked, **self.decoding()}


def main(argv=None):
    model_args, args = parse_arguments((ModelArguments, SummaryArguments), __doc__, argv)
    # What can be refused without the model is.
    file = SummaryFile(args.output, args.reader(model_args.model))
    texts = list(args.texts())
    waiting = file.missing(texts)
    there = len(texts) - len(waiting)
    device = find_device(args.device)
    model, tokenizer = model_args.load(args.adapter)
    model = model.to(device).eval()
    # A model or adapter that was trained again has its old name.
    file.require(weights=digest_text(reader_of(model)))
    print(f"{file.path}: {there} of {len(texts)} summaries already there")
    try:
        with closed_memory(model) if args.closed else nullcontext():
            for name, text, reference in tqdm(waiting, desc="summaries"):
                set_seed(args.seed)
                said = summarize(model, tokenizer, text, args.prompt, args.max_text_tokens, **args.decoding())
                file.add(name, text, reference, said)
    except KeyboardInterrupt:
        done = f"{len(texts) - len(file.missing(texts))} of {len(texts)} summaries are in {file.path}"
        raise KeyboardInterrupt(f"stopped: {done}; the same command goes on from there") from None
    print(f"{file.path}: {len(waiting)} summaries written, {len(texts)} in all")


if __name__ == "__main__":
    run_script(main)
