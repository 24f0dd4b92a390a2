"""How much of a text's perplexity a model could save that forgot nothing of it: a cache of all its hidden states.

    python scripts/text_cache.py --source NOVELS/validation --model tiny-llama-facts --output outputs/text_cache.md

Beside each way to read, the same probabilities mixed with what came after like places of the text beyond the local
window, and, as the control, of the next text. With `--errors true`, in place of that, a memory of the model's errors,
of all places and in a fixed number of cells (see infini_hf.evaluation.error_memory); a command of its own:

    python scripts/text_cache.py --source NOVELS/validation --errors true --output outputs/text_errors.md

Prints and writes a markdown table, with a JSON beside it. Takes four to six minutes on one CPU core.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
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
from infini_hf.evaluation.error_memory import States, find_cells, with_cells, with_places
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
    errors: bool = field(default=False, metadata={"help": "a memory of the model's errors, not a mixture"})
    error_sharpness: float = field(default=10.0, metadata={"help": "θ of the errors of all places"})
    error_gain: float = field(default=4.0, metadata={"help": "γ, by which these are multiplied"})
    cells: list[int] = field(
        default_factory=lambda: [64, 256], metadata={"help": "numbers of cells, found in the other texts"}
    )
    cell_sharpness: float = field(default=50.0, metadata={"help": "θ of the shares in cells"})
    cell_gain: float = field(default=2.0, metadata={"help": "γ of the errors in cells"})
    output: str | None = field(default=None, metadata={"help": "markdown file for the table, with a JSON beside it"})

    def __post_init__(self):
        if not 0 < self.part < 1:
            raise ValueError(f"part={self.part}: must be between 0 and 1")
        for name in ("sharpness", "error_sharpness", "error_gain", "cell_sharpness", "cell_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if wrong := [count for count in self.cells if count < 1]:
            raise ValueError(f"cells={self.cells}: {wrong[0]} is no number of cells")
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


def mixtures(texts, read, index, patch, args):
    """The losses of a text mixed with a cache, of its own and of the next text, by what is mixed in."""
    window, (states, own) = patch.segment_length + patch.overlap, read[index]
    found = {}
    for name, held in (("a cache of the text", index), ("one of another text", (index + 1) % len(texts))):
        shares = cache_shares(states, texts[index], read[held][0], texts[held], window, args.sharpness)
        found[name] = with_cache(own, shares, args.part)
    return found


def error_losses(texts, read, index, patch, args, held):
    """The losses of a text with the errors of its own or of the next text, `held` of all, by what holds them."""
    window, length, found = patch.segment_length + patch.overlap, patch.segment_length, {}
    own, other = held[index], held[(index + 1) % len(texts)]
    own.check(read[index][1])
    elsewhere = torch.cat([states for i, (states, _) in enumerate(read) if i != index])
    cells = {count: find_cells(elsewhere, count) for count in args.cells}
    for whose, errors in (("the text", own), ("another text", other)):
        name = f"errors of {whose}, all places"
        found[name] = with_places(own, errors, window, args.error_sharpness, args.error_gain)
        for count, found_cells in cells.items():
            name = f"errors of {whose}, {count} cells"
            found[name] = with_cells(own, errors, *found_cells, length, args.cell_sharpness, args.cell_gain)
    return found


@torch.no_grad()
def main(argv=None):
    model_args, args = parse_arguments((CachedModel, CacheArguments), __doc__, argv)
    model, ways, texts = load(model_args, args)
    patch, losses = infini_config_of(model.config), {}
    for way in ways:
        with closed_memory(model) if way == "closed" else nullcontext():
            read = [read_states(model, ids[None]) for ids in tqdm(texts, f"reading, {way}")]
        losses[way] = [own for _, own in read]
        measure = mixtures
        if args.errors:
            embeddings = model.get_output_embeddings().weight
            held = [States(states, ids, embeddings) for ids, (states, _) in zip(texts, read, strict=True)]
            measure = partial(error_losses, held=held)
        for index in tqdm(range(len(texts)), f"looking up, {way}"):
            for name, found in measure(texts, read, index, patch, args).items():
                losses.setdefault(f"{way}, with {name}", []).append(found)
    rows = compare(losses, patch.segment_length)
    lines = comparison_lines(rows, patch.segment_length)
    numbers = {"model": model_args.model, "patch": patch.to_dict(), "max_tokens": len(texts[0])}
    names = ("error_sharpness", "error_gain", "cell_sharpness", "cell_gain") if args.errors else ("sharpness", "part")
    numbers |= {name: getattr(args, name) for name in names} | {"comparison": [row.to_dict() for row in rows]}
    print("\n".join(lines))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside(args.output, ".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return losses


if __name__ == "__main__":
    run_script(main)
