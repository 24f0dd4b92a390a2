"""How much of a text's perplexity a model could save that forgot nothing of it: a cache of all its hidden states.

    python scripts/text_cache.py --source NOVELS/validation --output outputs/text_cache.md

Beside each way to read, the same probabilities mixed with what came after like places of the text beyond the local
window, and, as the control, of the next text. Prints and writes a markdown table, with a JSON beside it. Takes about
four minutes on one CPU core.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from infini_hf.cache import infini_config_of
from infini_hf.callbacks import gate_values
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.base_rows import read_texts
from infini_hf.evaluation.comparison import compare, comparison_lines
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.outputs import beside, check_output
from infini_hf.evaluation.text_cache import cache_shares, read_states, with_cache


@dataclass
class CachedModel(ModelArguments):
    """The model and its patch."""

    model: str = field(default="tiny-llama-infini", metadata={"help": "hub name, folder, or shipped checkpoint"})
    dtype: str = field(default="float32", metadata={"help": "weights' dtype: auto, float32, bfloat16, float16"})


@dataclass
class CacheArguments:
    """The texts, and the cache."""

    source: str = field(default="novels/validation", metadata={"help": "folder of at least two plain-text books"})
    max_tokens: int = field(default=16_384, metadata={"help": "tokens of each text, from its beginning"})
    sharpness: float = field(default=20.0, metadata={"help": "θ, by which cosines are multiplied"})
    part: float = field(default=0.15, metadata={"help": "λ, the part of the cache, between 0 and 1"})
    output: str | None = field(default=None, metadata={"help": "markdown file for the table, with a JSON beside it"})

    def __post_init__(self):
        if not 0 < self.part < 1:
            raise ValueError(f"part={self.part}: must be between 0 and 1")
        if not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness}: must be above 0")
        if self.output:
            check_output(self.output, (".json",))


def load(model_args, args):
    """The model, the ways to read with it, and the ids of the texts, all cut to the length of the shortest."""
    texts = read_texts(args.source)
    if len(texts) < 2:
        raise ValueError(f"source={args.source}: holds {len(texts)} text; the control needs another")
    model, tokenizer = model_args.load()
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in tqdm(texts, "tokenizing")]
    length = min(args.max_tokens, *map(len, ids))
    least = infini_config_of(model.config).segment_length + 2
    if length < least:
        raise ValueError(f"max_tokens={args.max_tokens}: {length} tokens of each text, and it takes {least} at least")
    # Gates at zero are shut: nothing of the memory comes through.
    trained = any(gates.any() for gates in gate_values(model).values())
    ways = ("memory", "closed") if trained else ("closed",)
    return model.eval(), ways, [torch.tensor(part[:length]) for part in ids]


@torch.no_grad()
def main(argv=None):
    model_args, args = parse_arguments((CachedModel, CacheArguments), __doc__, argv)
    model, ways, texts = load(model_args, args)
    patch, losses = infini_config_of(model.config), {}
    window = patch.segment_length + patch.overlap
    for way in ways:
        with closed_memory(model) if way == "closed" else nullcontext():
            read = [read_states(model, ids[None]) for ids in tqdm(texts, f"reading, {way}")]
        names = way, f"{way}, with a cache of the text", f"{way}, with one of another text"
        losses |= {name: [] for name in names}
        for index, (ids, (states, own)) in enumerate(zip(tqdm(texts, f"looking up, {way}"), read, strict=True)):
            losses[way].append(own)
            for name, held in zip(names[1:], (index, (index + 1) % len(texts)), strict=True):
                shares = cache_shares(states, ids, read[held][0], texts[held], window, args.sharpness)
                losses[name].append(with_cache(own, shares, args.part))
    rows = compare(losses, patch.segment_length)
    lines = comparison_lines(rows, patch.segment_length)
    numbers = {"model": model_args.model, "patch": patch.to_dict(), "max_tokens": len(texts[0])}
    numbers |= {"sharpness": args.sharpness, "part": args.part, "comparison": [row.to_dict() for row in rows]}
    print("\n".join(lines))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside(args.output, ".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return losses


if __name__ == "__main__":
    run_script(main)
