"""Measure the memory's part of a training step: two steps of autograd, one step, and the two compiled.

    python scripts/benchmark_memory_read.py --threads 1 --output docs/benchmarks/memory_read.md

Retrieval, gate and linear write of one segment in one layer, forward and backward, on random tensors, with softmax
attention over the same segment for scale. Times are medians of interleaved repeats in one process. Compiling needs a
C++ compiler on a CPU and time for each shape, and is left out where it fails.
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from infini_hf import memory as memory_math
from infini_hf.cli.errors import run_script
from infini_hf.cli.tables import write_tables
from infini_hf.evaluation.benchmark.machine import time_of
from infini_hf.gate import MemoryGate
from infini_hf.memory_read import Retrieval

LONG = {"two_steps": "two steps of autograd", "one_step": "one step", "compiled": "two steps, `torch.compile`"}


def tensors(args):
    """Local attention, queries, keys and values as a layer holds them, and a state; all with gradients."""
    torch.manual_seed(0)
    shapes = [(1, args.segment, heads, args.head_dim) for heads in (args.heads,) * 2 + (args.kv_heads,) * 2]
    leaves = [torch.randn(shape, device=args.device).requires_grad_() for shape in shapes]
    size = (1, args.kv_heads, args.head_dim)
    state = [torch.randn(*size, args.head_dim, device=args.device), torch.rand(size, device=args.device) + 1]
    return [leaf.transpose(1, 2) for leaf in leaves], [part.requires_grad_() for part in state]


def ways(args, feature_map):
    """Functions of no argument, each a forward and a backward pass; those of the memory return its gradients."""
    (local, queries, keys, values), state = tensors(args)
    gate = MemoryGate(args.heads, "tanh", args.device)
    torch.nn.init.constant_(gate.bias, 0.3)
    weights = torch.randn(local.shape, device=args.device)
    wanted = [local, queries, keys, values, gate.bias, *state]

    def forward(read):
        mixed = gate(local, read(queries, *state, feature_map))
        added = memory_math.contribution(keys, values, feature_map=feature_map)
        return (mixed * weights).sum() + sum(part.sum() for part in added)

    compiled = torch.compile(lambda: forward(memory_math.retrieve))

    def softmax():
        output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return torch.autograd.grad((output * weights).sum(), [queries, keys, values])

    return {
        "two_steps": lambda: torch.autograd.grad(forward(memory_math.retrieve), wanted),
        "one_step": lambda: torch.autograd.grad(forward(Retrieval), wanted),
        "compiled": lambda: torch.autograd.grad(compiled(), wanted),
        "softmax": softmax,
    }


def measure(args, feature_map):
    """Median milliseconds of each way, and the largest difference of its gradients from those of two steps."""
    functions, errors = ways(args, feature_map), {}
    expected = functions["two_steps"]()
    for name in ("one_step", "compiled"):
        try:
            actual = functions[name]()
        except Exception as error:
            print(f"{name} left out: {str(error).splitlines()[0]}")
            del functions[name]
            continue
        errors[name] = max(
            ((ours - theirs).abs().max() / theirs.abs().max()).item()
            for ours, theirs in zip(actual, expected, strict=True)
        )
    times = {name: [] for name in functions}
    for turn in tqdm(range(args.repeats + 1), desc=f"{feature_map}, turns"):
        for name, function in functions.items():
            seconds = time_of(function, torch.device(args.device))["seconds"]
            if turn:
                times[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}, errors


def rows_of(args, feature_map):
    times, errors = measure(args, feature_map)
    return [
        f"| {feature_map} | {LONG[name]} | {times[name]:.2f} | **{times[name] / times['two_steps']:.2f}** "
        f"| {times[name] / times['softmax']:.2f} | {f'{errors[name]:.0e}' if name in errors else '–'} |"
        for name in times
        if name in LONG
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--segment", type=int, default=2048, help="tokens of the segment (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, default=4, help="KV heads (default: %(default)s)")
    parser.add_argument("--head_dim", type=int, default=64, help="size of a head (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: those of torch)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = f"{args.heads} query and {args.kv_heads} KV heads of {args.head_dim}"
    machine = f"{args.device}, {torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}"
    command = "python scripts/benchmark_memory_read.py" + (f" --threads {args.threads}" if args.threads else "")
    lines = [
        "# The memory's part of a training step",
        "",
        f"`{command}`: retrieval, gate and linear write of {args.segment:,} tokens in "
        f"one layer, {shape}, forward and backward, float32, {machine}: medians of {args.repeats} turns. The error is "
        "the largest difference of a gradient over its largest value.",
        "",
        "| feature map | way | ms | over two steps | over softmax attention of the segment | error |",
        "|---|---|---|---|---|---|",
        *[row for feature_map in ("elu", "exp") for row in rows_of(args, feature_map)],
    ]
    write_tables(lines, args.output)


if __name__ == "__main__":
    run_script(main)
