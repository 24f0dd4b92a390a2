"""How much of a text's perplexity a model could save that forgot nothing of it: a cache of all its hidden states.

    python scripts/text_cache.py --source NOVELS/validation --output outputs/text_cache.md

Beside each way to read, the same probabilities mixed with what came after like places of the text beyond the local
window, and, as the control, of the next text. Prints and writes a markdown table, with a JSON beside it. Takes about
four minutes on one CPU core.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM, InfiniConfig
from infini_hf.assets import resolve
from infini_hf.cache import infini_config_of
from infini_hf.cli.errors import run_script
from infini_hf.data.base_rows import read_texts
from infini_hf.evaluation.comparison import compare, comparison_lines
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.outputs import beside, check_output
from infini_hf.evaluation.text_cache import cache_shares, read_states, with_cache


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama-infini", help="name or folder; a stock one is patched")
    parser.add_argument("--source", required=True, help="folder of at least two plain-text books")
    parser.add_argument("--max_tokens", type=int, default=16384, help="tokens of each text, from its beginning")
    parser.add_argument("--segment_length", type=int, default=128, help="of a stock model that is patched")
    parser.add_argument("--overlap", type=int, default=32, help="of a stock model that is patched")
    parser.add_argument("--sharpness", type=float, default=20.0, help="θ, by which cosines are multiplied")
    parser.add_argument("--part", type=float, default=0.15, help="λ, the part of the cache, between 0 and 1")
    parser.add_argument("--output", help="markdown file of the table")
    args = parser.parse_args(argv)
    if not 0 < args.part < 1:
        raise ValueError(f"part={args.part}: must be between 0 and 1")
    if not args.sharpness > 0:
        raise ValueError(f"sharpness={args.sharpness}: must be above 0")
    if args.output:
        check_output(args.output, (".json",))
    return args


def load(args):
    """The model, the ways to read with it, and the ids of the texts, all cut to the length of the shortest."""
    folder = resolve(args.model)
    texts = read_texts(args.source)
    if len(texts) < 2:
        raise ValueError(f"source={args.source}: holds {len(texts)} text; the control needs another")
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")) if Path(folder).is_dir() else {}
    patch = None if "infini_attention" in config else InfiniConfig(args.segment_length, overlap=args.overlap)
    model = AutoInfiniModelForCausalLM.from_pretrained(folder, infini_config=patch, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in tqdm(texts, "tokenizing")]
    length = min(args.max_tokens, *map(len, ids))
    least = infini_config_of(model.config).segment_length + 2
    if length < least:
        raise ValueError(f"max_tokens={args.max_tokens}: {length} tokens of each text, and it takes {least} at least")
    # A memory that was added here is shut.
    ways = ("memory", "closed") if patch is None else ("closed",)
    return model, ways, [torch.tensor(part[:length]) for part in ids]


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    model, ways, texts = load(args)
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
    numbers = {"model": args.model, "patch": patch.to_dict(), "max_tokens": len(texts[0])}
    numbers |= {"sharpness": args.sharpness, "part": args.part, "comparison": [row.to_dict() for row in rows]}
    print("\n".join(lines))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside(args.output, ".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return losses


if __name__ == "__main__":
    run_script(main)
