"""Measure sequence parallelism: bytes beside ring attention, and seconds of several processes beside those of one.

    python scripts/benchmark_sequence_parallel.py --ranks 2 --output docs/benchmarks/sequence_parallel.md

Random weights, gloo, processes of this machine with one thread each, so that cores are what is added. One process and
all of them read the same row in turns; the ratio is what carries over to another machine. It wants as many idle cores
as ranks: two processes on one physical core share what it has.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import distributed, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from infini_hf import InfiniCache, InfiniConfig, patch_model, prefill
from infini_hf.cli.tables import write_tables
from infini_hf.sequence_parallel import SequenceParallelCache, shard_row

# Of Llama-3-8B, as its config has them.
LLAMA = {"layers": 32, "kv_heads": 8, "head_dim": 128}
MIB = 2**20


def exchanged_bytes(ranks, kv_heads, head_dim, rule="linear", sinks=0, overlap=0, batch=1, width=2):
    """Bytes that a rank is sent in a forward pass over whole segments, for each layer: the most of any rank.

    Args:
        ranks (`int`): ranks of the row.
        kv_heads (`int`): heads of keys and values.
        head_dim (`int`): their size.
        rule (`str`): `"linear"` or `"delta"`.
        sinks (`int`): tokens of a row that local attention always sees.
        overlap (`int`): tokens of the segment before that it sees.
        batch (`int`): rows.
        width (`int`): bytes of a key's element.
    """
    heads = batch * kv_heads
    state = 4 * heads * head_dim * (head_dim + 1)
    scanned = state if rule == "linear" else 4 * heads * head_dim * (2 * head_dim + 1)
    token = 2 * heads * head_dim * width
    shifts = [1, *(2**step for step in range(ranks.bit_length()) if 2**step < ranks - 1)]

    def received(rank):
        before = sum(shift <= rank for shift in shifts) * scanned + (rank > 0) * (sinks + overlap) * token
        # What all have afterwards comes from the last.
        return before + (rank < ranks - 1) * (state + (sinks + overlap) * token)

    return max(map(received, range(ranks)))


def ring_bytes(tokens, ranks, kv_heads, head_dim, batch=1, width=2):
    """The same of ring attention, which sends every key and value past every rank."""
    return 2 * batch * kv_heads * head_dim * width * tokens * (ranks - 1) // ranks


def worked_out():
    """What a rank is sent on the shape of Llama-3-8B in bfloat16, in all layers."""
    rows = []
    shape = {name: LLAMA[name] for name in ("kv_heads", "head_dim")}
    for ranks in (8, 64, 1024):
        for tokens in (2**20, 10 * 2**20):
            ring = LLAMA["layers"] * ring_bytes(tokens, ranks, **shape)
            cells = [LLAMA["layers"] * exchanged_bytes(ranks, rule=rule, **shape) for rule in ("linear", "delta")]
            rows.append(
                f"| {ranks:,} | {tokens / MIB:.0f}M | {ring / MIB:,.0f} | {cells[0] / MIB:,.0f} | "
                f"{cells[1] / MIB:,.0f} | **{ring / cells[0]:,.0f}** | {ring / cells[1]:,.0f} |"
            )
    head = "| ranks | tokens of the row | ring attention, MiB | linear, MiB | delta, MiB | ratio, linear | delta |"
    return [head, "|---|---|---|---|---|---|---|", *rows]


def build(args):
    """A random Llama with heads of 64, two query heads for each KV head, and open gates."""
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.width,
        intermediate_size=args.width * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=args.segment,
    )
    torch.manual_seed(0)
    model = patch_model(LlamaForCausalLM(config), InfiniConfig(args.segment, memory_update=args.rule))
    for layer in model.model.layers:
        layer.self_attn.memory_gate.bias.data.normal_()
    return model


def read(model, ids, args, group, training):
    """A prefill or a training step of the whole row, alone or on the ranks of `group`; the bytes received."""
    model.train(training)
    cache = InfiniCache(model.config) if group is None else SequenceParallelCache(model.config, group)
    if not training:
        prefill(model, ids, cache=cache, chunk_size=args.tokens, progress=False)
    else:
        arguments = {"input_ids": ids, "labels": ids} if group is None else shard_row(ids, group, args.segment, ids)
        model(**arguments, past_key_values=cache).loss.backward()
        model.zero_grad()
    return 0 if group is None else cache.group.received


def timed(function, *args):
    """Seconds until every process has done its part, and seconds of work of the one that has most."""
    distributed.barrier()
    began, worked = time.perf_counter(), time.process_time()
    function(*args)
    worked = torch.tensor(time.process_time() - worked)
    distributed.all_reduce(worked, op=distributed.ReduceOp.MAX)
    return time.perf_counter() - began, worked.item()


def measure(rank, args, folder):
    """One process: its part of everything; the first one writes down what it saw."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.ranks)
    group = distributed.init_device_mesh("cpu", (args.ranks,), mesh_dim_names=("sequence",))
    model, ids = build(args), torch.randint(0, 4096, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    result = {"received": {}, "seconds": {}}
    for tokens in (args.tokens // 4, args.tokens // 2, args.tokens):
        mine = torch.tensor(read(model, ids[:, :tokens], args, group, False))
        distributed.all_reduce(mine, op=distributed.ReduceOp.MAX)
        result["received"][tokens] = int(mine)
    for name, training in (("prefill", False), ("training step", True)):
        times = []
        for _ in range(args.repeats + 1):
            # In turns, so that a slow moment of the machine meets both; the others wait while one reads alone.
            alone = timed(lambda training=training: rank or read(model, ids, args, None, training))
            times.append((*alone, *timed(read, model, ids, args, group, training)))
        # The first of all warms up.
        result["seconds"][name] = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def report(args, result):
    """The tables."""
    config = {"kv_heads": max(1, args.width // 128), "head_dim": 64, "width": 4}
    formula = exchanged_bytes(args.ranks, rule=args.rule, **config)
    yield from ("## Bytes that a rank is sent in a forward pass, for each layer", "")
    yield "| tokens of the row | counted, most of any rank | formula | ring attention, formula | ratio |"
    yield "|---|---|---|---|---|"
    for tokens, received in result["received"].items():
        ring = ring_bytes(tokens, args.ranks, **config)
        counted = received / args.layers
        yield f"| {tokens:,} | {counted:,.0f} | {formula:,} | {ring:,} | {ring / counted:.1f} |"
    yield from ("", "Counted, and not in the formula: what the ranks say of their calls, once a call.")
    yield from ("", "## Worked out for the shape of Llama-3-8B, bfloat16, all layers, forward", "", *worked_out())
    yield from ("", "## Seconds", "")
    yield f"| | 1 process | {args.ranks} processes | speed-up | work of the one | of the busiest | ratio of work |"
    yield "|---|---|---|---|---|---|---|"
    for name, (one, work, several, busiest) in result["seconds"].items():
        yield (
            f"| {name} | {one:.2f} | {several:.2f} | **{one / several:.2f}** | {work:.2f} | {busiest:.2f} | "
            f"{work / busiest:.2f} |"
        )
    yield from (
        "",
        "Work is processor time: where every process has a core of its own, the speed-up is about its ratio.",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the row")
    parser.add_argument("--rule", choices=["linear", "delta"], default="linear")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="markdown file for the tables")
    args = parser.parse_args()
    if args.tokens % (4 * args.ranks * args.segment):
        parser.error(f"--tokens {args.tokens}: must be a multiple of 4 x --ranks x --segment")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (args, folder), nprocs=args.ranks)
        result = torch.load(Path(folder) / "result.pt")
    lines = [
        "# Sequence parallelism",
        "",
        f"`python scripts/benchmark_sequence_parallel.py --ranks {args.ranks} --rule {args.rule} --tokens "
        f"{args.tokens} --repeats {args.repeats}`: {args.layers} layers, width {args.width}, segments of "
        f"{args.segment}, float32, gloo, one thread a process, {platform.machine()} with {os.cpu_count()} virtual "
        f"cores, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        *report(args, result),
    ]
    write_tables(lines, args.output)


if __name__ == "__main__":
    main()
