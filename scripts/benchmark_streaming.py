"""Measure what a stream costs: prefill beside independent blocks, decoding near and far, memory up to 1M tokens.

    python scripts/benchmark_streaming.py --threads 1 --output docs/benchmarks/streaming.md

Random weights: speed does not depend on what a model knows. Times are medians of interleaved repeats in one process;
the ratios are what carries over to another machine.
"""

import argparse
import copy
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from infini_hf import InfiniCache, InfiniConfig, generate, patch_model, prefill
from infini_hf.cli.tables import write_tables


def build(layers, width, positions):
    """A random Llama with heads of 64 and two query heads for each KV head."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=positions,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def interleaved(functions, repeats, description):
    """Median seconds of each function, taken in turns so that a slow moment of the machine meets them all."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in tqdm(range(repeats), desc=description):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def prefill_rows(args):
    """Tokens a second of the patched model and of the same base model on independent blocks: the ceiling."""
    base = build(args.layers, args.width, args.segment)
    rows = []
    for rule, features in (("linear", "elu"), ("linear", "exp"), ("delta", "elu")):
        patched = patch_model(
            copy.deepcopy(base), InfiniConfig(args.segment, memory_update=rule, feature_map=features)
        )
        for layer in patched.model.layers:
            layer.self_attn.memory_gate.bias.data.normal_()
        ids = torch.randint(0, 4096, (1, args.tokens))
        functions = {
            "blocks": lambda ids=ids: [base.model(block, use_cache=False) for block in ids.split(args.segment, 1)],
            "patched": lambda ids=ids, patched=patched: prefill(patched, ids, chunk_size=args.segment, progress=False),
        }
        seconds = interleaved(functions, args.repeats, f"prefill {rule} {features}")
        rows.append(
            f"| {rule}, {features} | {args.tokens / seconds['blocks']:,.0f} | {args.tokens / seconds['patched']:,.0f} "
            f"| **{seconds['patched'] / seconds['blocks']:.3f}** |"
        )
    return ["| memory | independent blocks, tokens/s | patched, tokens/s | time ratio |", "|---|---|---|---|", *rows]


@torch.no_grad()
def decode_rows(args):
    """Milliseconds a token through `infini_hf.generate` after a short and after a long stream."""
    model = patch_model(build(args.layers, args.width, args.segment), InfiniConfig(args.segment))
    half = args.segment // 2
    caches = {}
    for length in args.decode_at:
        # The same place in the segment, so that both see as many local keys.
        ids = torch.randint(0, 4096, (1, length // args.segment * args.segment + half))
        caches[length] = prefill(model, ids)
    start = torch.zeros(1, 1, dtype=torch.long)

    def decode(cache):
        options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
        generate(model, start, cache=copy.copy(cache), pad_token_id=0, **options)

    functions = {length: lambda cache=cache: decode(cache) for length, cache in caches.items()}
    seconds = interleaved(functions, args.repeats, "decode")
    first = seconds[args.decode_at[0]]
    rows = [
        f"| {length:,} | {1000 * seconds[length] / args.new_tokens:.2f} | **{seconds[length] / first:.3f}** |"
        for length in args.decode_at
    ]
    return ["| tokens read before | ms a token | ratio |", "|---|---|---|", *rows]


def peak_resident():
    """The kernel's high-water mark of this process in MiB (Linux).

    A look between two forwards would also measure how much of the freed heap the C allocator has just given back,
    which differs from one forward to the next, in the stock model too.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@torch.no_grad()
def memory_rows(args):
    """The most memory the process has had resident, after one stream that the allocator settles on, in another."""
    model = patch_model(build(1, 128, args.segment), InfiniConfig(args.segment))
    for _ in range(8):
        prefill(model, torch.randint(0, 4096, (1, 8192)), progress=False)
    cache, rows, first = InfiniCache(model.config), [], None
    marks = [mark for mark in (16_384, 65_536, 262_144, 1_048_576) if mark <= args.memory_tokens]
    with tqdm(total=marks[-1], unit="tok", unit_scale=True, desc="memory") as bar:
        for start in range(0, marks[-1], 8192):
            prefill(model, torch.randint(0, 4096, (1, 8192)), cache=cache, progress=False)
            bar.update(8192)
            if start + 8192 in marks:
                peak = peak_resident()
                first = first or peak
                rows.append(
                    f"| {start + 8192:,} | {peak:.1f} | {cache.state_bytes() / 2**20:.2f} | **{peak / first:.3f}** |"
                )
    return ["| tokens read | peak resident MiB | state MiB | ratio |", "|---|---|---|---|", *rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--segment", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a prefill")
    parser.add_argument("--decode-at", type=int, nargs="+", default=[2_048, 131_072], help="lengths to decode after")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--memory-tokens", type=int, default=1_048_576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["prefill", "decode", "memory"], default=None)
    parser.add_argument("--output", type=Path, default=None, help="markdown file for the tables")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    sections = {
        "Prefill against independent blocks of one segment": ("prefill", prefill_rows),
        "Decoding near and far": ("decode", decode_rows),
        "Resident memory of one stream (1 layer, width 128)": ("memory", memory_rows),
    }
    lines = [
        "# What a stream costs",
        "",
        f"`python scripts/benchmark_streaming.py --threads {args.threads} --repeats {args.repeats}`: "
        f"{args.layers} layers, width {args.width}, segments of {args.segment}, float32, {args.threads} thread(s), "
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}.",
    ]
    for title, (name, measure) in sections.items():
        if args.only in (None, name):
            # Each in a process of its own: what an earlier section left resident would hide the growth of a later one.
            with ProcessPoolExecutor(
                1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(args.threads,)
            ) as pool:
                lines += ["", f"## {title}", "", *pool.submit(measure, args).result()]
    write_tables(lines, args.output)


if __name__ == "__main__":
    main()
