"""Measure an exact training step: peak memory against the length, and time against truncated and full-graph steps.

    python scripts/benchmark_training.py --output docs/benchmarks/training.md

Random weights: cost does not depend on what a model knows. Every length has a process of its own, whose highest
resident memory is read at the end; times are medians of interleaved repeats in one process.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from infini_hf import InfiniCache, InfiniConfig, patch_model
from infini_hf.cli.tables import write_tables
from infini_hf.segment_step import StepOptions, cut_segments, segment_major_loss, shift_labels


def build(layers, width, segment):
    """A random patched Llama with heads of 64, two query heads for each KV head and open gates."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=segment,
    )
    torch.manual_seed(0)
    model = patch_model(LlamaForCausalLM(config), InfiniConfig(segment)).train()
    for layer in model.model.layers:
        layer.self_attn.memory_gate.bias.data.normal_()
    return model


def step(model, segments, segment, options):
    """One forward and backward pass over a row of so many segments; its loss."""
    ids = torch.randint(0, 4096, (1, segments * segment))
    row = cut_segments(ids, None, shift_labels(ids), segment)
    loss, _ = segment_major_loss(model, row, InfiniCache(model.config), ids.shape[1] - 1, options)
    loss.backward()
    model.zero_grad(set_to_none=False)
    return loss.item()


def start(threads):
    torch.set_num_threads(threads)


def peak_of(layers, width, segment, segments, options):
    """`(highest MiB, seconds)` of a process that takes one step."""
    model = build(layers, width, segment)
    step(model, 1, segment, options)
    began = time.perf_counter()
    step(model, segments, segment, options)
    seconds = time.perf_counter() - began
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds


def in_a_process(function, *args, threads=1):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start, initargs=(threads,)) as pool:
        return pool.submit(function, *args).result()


def memory_rows(args, layers, width, segment, lengths):
    """Peak memory of one exact step against its length, with recomputation and with the whole graph kept."""
    rows, first = [], None
    for segments in tqdm(lengths, desc="memory"):
        exact, seconds = in_a_process(peak_of, layers, width, segment, segments, StepOptions(), threads=args.threads)
        first = exact if first is None else first
        kept = "–"
        if segments <= args.keep_up_to:
            options = StepOptions(recompute=False)
            peak = in_a_process(peak_of, layers, width, segment, segments, options, threads=args.threads)[0]
            kept = f"{peak:,.0f}"
        rows.append(
            f"| {segments} | {segments * segment:,} | {exact:,.0f} | **{exact / first:.3f}** | {kept} "
            f"| {segments * segment / seconds:,.0f} |"
        )
    return [
        f"| segments | tokens | exact, peak MiB | ratio to {lengths[0]} | activations kept, peak MiB | tokens/s |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def time_rows(args, layers, width, segment):
    """Seconds of a step: exact with recomputation, truncated at every segment with and without, whole graph kept."""
    model = build(layers, width, segment)
    kinds = {
        "cut at every segment, activations kept": StepOptions(bptt_segments=1, recompute=False),
        "exact, segments recomputed": StepOptions(),
        "exact, activations kept": StepOptions(recompute=False),
        "cut at every segment, segments recomputed": StepOptions(bptt_segments=1),
    }
    times = {name: [] for name in kinds}
    for repeat in tqdm(range(args.repeats + 1), desc="time"):
        for name, options in kinds.items():
            began = time.perf_counter()
            step(model, args.time_segments, segment, options)
            if repeat:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    tokens = args.time_segments * segment
    rows = [
        f"| {name} | {1e6 * seconds / tokens:,.0f} | **{seconds / first:.3f}** |" for name, seconds in medians.items()
    ]
    return [f"| step over {args.time_segments} segments | µs a token | ratio |", "|---|---|---|", *rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--segment", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64], help="segments of a step")
    parser.add_argument("--keep-up-to", type=int, default=16, help="longest step measured with its whole graph kept")
    parser.add_argument("--time-segments", type=int, default=8)
    parser.add_argument("--long", type=int, nargs="*", default=[16, 64, 512], help="segments of 2,048, tiny model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["memory", "time", "long"], default=None)
    parser.add_argument("--output", type=Path, default=None, help="markdown file for the tables")
    args = parser.parse_args()
    shape = (args.layers, args.width, args.segment)
    sections = {
        "memory": ("Peak memory against the length", lambda: memory_rows(args, *shape, args.lengths)),
        "time": ("Time of a step", lambda: in_a_process(time_rows, args, *shape, threads=args.threads)),
        "long": (
            "A million tokens in one exact step (1 layer, width 128, segments of 2,048)",
            lambda: memory_rows(args, 1, 128, 2048, args.long),
        ),
    }
    lines = [
        "# What a training step costs",
        "",
        f"`python scripts/benchmark_training.py --threads {args.threads} --repeats {args.repeats}`: {args.layers} "
        f"layers, width {args.width}, segments of {args.segment} unless said otherwise, float32, {args.threads} "
        f"thread(s), {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}. Peak "
        "memory is the highest resident memory of the process, the weights and some 350 MiB of libraries included.",
    ]
    for name, (title, measure) in sections.items():
        if args.only in (None, name):
            lines += ["", f"## {title}", "", *measure()]
    write_tables(lines, args.output)


if __name__ == "__main__":
    main()
