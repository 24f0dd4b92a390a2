"""One rank of the runs of `tests/test_sequence_parallel.py`: reads its share of every case and saves what it saw.

python tests/sequence_parallel_run.py RANK RANKS RENDEZVOUS_FILE OUTPUT_DIR CASE...
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from models import add_moved_projections, build_patched, random_ids
from torch import distributed

import infini_hf
from infini_hf import InfiniCache
from infini_hf.segment_step import StepOptions, segment_major_loss, shift_labels
from infini_hf.sequence_parallel import (
    SequenceParallelCache,
    all_reduce_gradients,
    shard_row,
    shard_segments,
)

SEGMENT = 8


@dataclass(frozen=True)
class Case:
    """A row that is read in calls of so many columns, and what reads it."""

    columns: tuple[int, ...] = (48,)
    batch: int = 1
    family: str = "llama"
    attention: str = "eager"
    training: bool = True
    scaled: bool = False
    shifted: bool = False
    projected: bool = False
    dtype: torch.dtype = torch.float32
    overrides: dict = field(default_factory=dict)
    infini: dict = field(default_factory=dict)

    def model(self):
        model = build_patched(
            self.family, self.attention, overrides=self.overrides, segment_length=SEGMENT, **self.infini
        )
        if self.shifted:
            generator = torch.Generator().manual_seed(7)
            for layer in model.model.layers:
                shifts = (torch.randn(heads, 8, generator=generator) for heads in (6, 3))
                layer.self_attn.memory_gate.set_shifts(*shifts)
        if self.projected:
            add_moved_projections(model, 0.1, seed=9, mix_heads=True)
        return model.to(self.dtype).train(self.training)

    @property
    def ids(self):
        return random_ids(self.batch, sum(self.columns))

    @property
    def scales(self):
        """How many times each segment of the row is written, `(batch, segments)`."""
        segments = -(-sum(self.columns) // SEGMENT)
        return 0.5 + 3.0 * torch.rand(self.batch, segments, generator=torch.Generator().manual_seed(5))


DELTA = {"memory_update": "delta"}
WIDE = {"overlap": 3, "sink_tokens": 2}
CASES = {
    "linear": Case(),
    "linear-exp": Case(infini={"feature_map": "exp"}, batch=2),
    "linear-projected": Case(infini={"feature_map": "softmax", **WIDE}, columns=(61,), batch=2, projected=True),
    "linear-window": Case(infini=WIDE, columns=(45,), batch=2),
    "linear-wide-window": Case(infini={"overlap": 8, "sink_tokens": 5}, columns=(69,)),
    "linear-calls": Case(infini=WIDE, columns=(48, 64, 41)),
    "linear-scaled": Case(infini={"sink_tokens": 2}, columns=(80,), batch=2, scaled=True),
    "linear-short": Case(infini=WIDE, columns=(5,)),
    "linear-short-projected": Case(infini=WIDE, columns=(5,), projected=True),
    "linear-evaluation": Case(infini={"overlap": 2}, columns=(16, 11), training=False),
    "delta": Case(infini=DELTA, columns=(64,)),
    "delta-exp": Case(infini={**DELTA, "feature_map": "exp"}, columns=(64,)),
    "delta-projected": Case(infini={**DELTA, "feature_map": "exp"}, columns=(61,), projected=True),
    "delta-shifted": Case(infini={**DELTA, "feature_map": "exp"}, columns=(48,), shifted=True),
    "delta-window": Case(infini={**DELTA, **WIDE}, columns=(61,), batch=2),
    "delta-calls": Case(infini={**DELTA, **WIDE}, columns=(64, 48, 43), batch=2),
    "sigmoid-sdpa": Case(infini={"gate": "sigmoid", **WIDE}, columns=(75,), attention="sdpa", family="qwen3"),
}


def state_of(cache):
    """What a cache holds, as plain values."""
    return {"seen": cache.seen, "columns": cache.columns, "tensors": [tensor.detach() for tensor in cache.tensors()]}


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def read(case, group=None):
    """Logits of all calls, their loss, gradients and the state, of the whole row or of this rank's part of it."""
    model, ids, columns = case.model(), case.ids, case.columns
    cache = InfiniCache(model.config) if group is None else SequenceParallelCache(model.config, group)
    targets = shift_labels(ids)
    logits, total, start = [], 0.0, 0
    for count in columns:
        run = slice(0, count) if group is None else cache.run_of(count)
        run = slice(start + run.start, start + run.stop)
        more = {"memory_scale": case.scales[:, run.start // SEGMENT :]} if case.scaled else {}
        mine = targets[:, run].contiguous()
        output = model(
            ids[:, run],
            labels=mine,
            shift_labels=mine,
            num_items_in_batch=targets.numel(),
            past_key_values=cache,
            **more,
        )
        logits.append(output.logits.detach())
        total = total + output.loss
        start += count
    total.backward()
    if group is not None:
        all_reduce_gradients(model, group)
    return {"logits": logits, "loss": total.detach(), "gradients": gradients_of(model), "state": state_of(cache)}


def read_sharded_row(group=None):
    """A row as `shard_row` cuts it, some labels masked."""
    case = Case(infini=WIDE, columns=(43,), batch=2)
    model, ids = case.model(), case.ids
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    if group is None:
        output = model(ids, labels=labels)
    else:
        cache = SequenceParallelCache(model.config, group)
        output = model(**shard_row(ids, group, SEGMENT, labels=labels), past_key_values=cache)
    output.loss.backward()
    if group is not None:
        all_reduce_gradients(model, group)
    return {"loss": output.loss.detach(), "gradients": gradients_of(model)}


def read_segment_major(rule, group=None):
    """A row in pieces, each computed again in the backward pass."""
    case = Case(infini={"memory_update": rule, **WIDE}, columns=(8 * SEGMENT + 5,))
    model, ids = case.model(), case.ids
    targets = shift_labels(ids)
    if group is None:
        loss = model(ids, labels=ids).loss
    else:
        cache = SequenceParallelCache(model.config, group)
        pieces = shard_segments(ids, targets, group, SEGMENT)
        loss, after = segment_major_loss(model, pieces, cache, ids.shape[1] - 1)
        assert after.seen == (ids.shape[1],)
        assert cache.seen == ()
    loss.backward()
    if group is not None:
        all_reduce_gradients(model, group)
    return {"loss": loss.detach(), "gradients": gradients_of(model)}


def read_and_generate(group=None):
    """A stream in pieces, then an answer that every rank gives alike."""
    case = Case(infini={**DELTA, **WIDE}, columns=(101,), training=False)
    model, ids = case.model(), case.ids
    cache = InfiniCache(model.config) if group is None else SequenceParallelCache(model.config, group)
    infini_hf.prefill(model, ids, cache=cache, chunk_size=4 * SEGMENT)
    state = state_of(cache)
    cache = cache if group is None else cache.to_infini_cache()
    said = infini_hf.generate(model, random_ids(1, 3, seed=1), cache=cache, max_new_tokens=20, do_sample=False)
    return {"state": state, "said": said}


def read_after_a_snapshot(group=None):
    """A stream that one process begins and several go on with."""
    case = Case(infini={**DELTA, **WIDE}, columns=(69,), training=False)
    model, ids = case.model(), case.ids
    begun = infini_hf.prefill(model, ids[:, : 2 * SEGMENT], progress=False)
    if group is None:
        return {"state": state_of(infini_hf.prefill(model, ids[:, 2 * SEGMENT :], cache=begun))}
    with tempfile.TemporaryDirectory() as folder:
        begun.save_pretrained(folder)
        cache = SequenceParallelCache.from_pretrained(folder, model, group)
    infini_hf.prefill(model, ids[:, 2 * SEGMENT :], cache=cache, chunk_size=100)
    # What it was begun from has not moved.
    assert begun.seen == (2 * SEGMENT,)
    return {"state": state_of(cache)}


def read_frozen(group=None):
    """The memory alone is trained, in evaluation mode: what needs a gradient must not depend on who reads it."""
    case = Case(columns=(16,), training=False)
    model, ids = case.model(), case.ids
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("memory_gate.bias")
    if group is None:
        loss = model(ids, labels=ids).loss
    else:
        cache = SequenceParallelCache(model.config, group)
        loss = model(**shard_row(ids, group, SEGMENT, labels=ids), past_key_values=cache).loss
    loss.backward()
    if group is not None:
        all_reduce_gradients(model, group)
    return {"loss": loss.detach(), "gradients": gradients_of(model)}


def read_fully_sharded(group=None):
    """Parameters and gradients lie in parts on the ranks of the row; FSDP averages the gradients."""
    from torch.distributed.fsdp import fully_shard

    case = Case(infini=WIDE, columns=(48,))
    model, ids = case.model(), case.ids
    if group is None:
        loss = model(ids, labels=ids).loss
    else:
        for layer in model.model.layers:
            fully_shard(layer, mesh=group)
        fully_shard(model, mesh=group)
        arguments = shard_row(ids, group, SEGMENT, labels=ids)
        arguments["num_items_in_batch"] = arguments["num_items_in_batch"] / group.size()
        loss = model(**arguments, past_key_values=SequenceParallelCache(model.config, group)).loss / group.size()
    loss.backward()
    if group is not None:
        gradients = {name: group.size() * tensor.full_tensor() for name, tensor in gradients_of(model).items()}
        return {"loss": loss.detach(), "gradients": gradients}
    return {"loss": loss.detach(), "gradients": gradients_of(model)}


def read_on_a_mesh(mesh=None):
    """Two rows, one on each line of a mesh of data by sequence, under DistributedDataParallel."""
    case = Case(infini={**DELTA, **WIDE}, columns=(61,), batch=2)
    model, ids = case.model(), case.ids
    if mesh is None:
        loss = model(ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach(), "gradients": gradients_of(model)}
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    row = mesh["data"].get_local_rank()
    arguments = shard_row(ids[row : row + 1], mesh["sequence"], SEGMENT, labels=ids[row : row + 1])
    # Of both rows, and the wrapper averages over all ranks.
    arguments["num_items_in_batch"] = 2 * arguments["num_items_in_batch"] / mesh.size()
    cache = SequenceParallelCache(model.config, mesh["sequence"])
    loss = wrapped(**arguments, past_key_values=cache).loss
    loss.backward()
    return {"loss": loss.detach() / mesh.size(), "gradients": gradients_of(model)}


def measure_traffic(group):
    """Bytes that this rank was sent in a forward pass, and in one with its backward pass, by rule and row length."""
    received = {}
    for rule in ("linear", "delta"):
        model = Case(infini={"memory_update": rule, **WIDE}).model()
        for segments in (2, 6):
            ids = random_ids(2, segments * SEGMENT * group.size())
            cache = SequenceParallelCache(model.config, group)
            loss = model(**shard_row(ids, group, SEGMENT, labels=ids), past_key_values=cache).loss
            forward = cache.group.received
            loss.backward()
            received[rule, segments] = forward, cache.group.received
    return received


def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def collect_refusals(mesh):
    """What each rank is told of calls that cannot be split."""
    group = mesh["sequence"]
    rank, case = group.get_local_rank(), Case(columns=(2 * SEGMENT * group.size(),), batch=2, training=False)
    model, ids = case.model(), case.ids

    def call(ids, cache=None, **kwargs):
        cache = SequenceParallelCache(model.config, group) if cache is None else cache
        model(ids, past_key_values=cache, **kwargs)
        return cache

    def graded():
        with torch.set_grad_enabled(rank == 0):
            call(ids[:, :SEGMENT])

    own = ids[:, :SEGMENT]
    read = call(own[:, : SEGMENT if rank == 0 else 3])
    ahead = call(own)
    ahead.layers[0].seen = ahead.layers[1].seen = (SEGMENT * group.size(), 0)
    other = call(own)
    for layer in other.layers:
        layer.seen = (SEGMENT * (rank + 1),) * 2
    hybrid = build_patched("gemma2", segment_length=SEGMENT)
    return {
        "padding": refusal(call, own, attention_mask=torch.ones_like(own).index_fill(1, torch.tensor([0]), rank)),
        "batch": refusal(call, own[: rank + 1]),
        "inside": refusal(call, own, cache=read),
        "uneven": refusal(call, own, cache=ahead),
        "place": refusal(call, own, cache=other),
        "run": refusal(call, own[:, :5]),
        "empty": refusal(call, own[:, : SEGMENT * rank]),
        "step": refusal(
            model.generate, own, past_key_values=SequenceParallelCache(model.config, group), max_new_tokens=3
        ),
        "grad": refusal(graded),
        "hybrid": refusal(SequenceParallelCache, hybrid.config, group),
        "score": refusal(infini_hf.score, model, own, cache=call(own)),
        "generate": refusal(infini_hf.generate, model, own, cache=call(own)),
        "scale": refusal(
            segment_major_loss,
            model,
            shard_segments(ids, shift_labels(ids), group, SEGMENT),
            SequenceParallelCache(model.config, group),
            1,
            StepOptions(write_scale=torch.ones(2, 2)),
        ),
        "group": refusal(SequenceParallelCache, model.config, "sequence"),
        "mesh": refusal(SequenceParallelCache, model.config, mesh),
        "checkpointing": refuse_checkpointing(group),
        # Nothing above has left a message on the wire.
        "afterwards": refusal(call, own),
    }


def refuse_checkpointing(group):
    model = Case().model()
    model.activation_checkpointing_enable()
    return refusal(model, random_ids(1, SEGMENT), past_key_values=SequenceParallelCache(model.config, group))


def run_case(name, mesh):
    group = mesh["sequence"]
    others = {
        "sharded-row": lambda: read_sharded_row(group),
        "segment-major-linear": lambda: read_segment_major("linear", group),
        "segment-major-delta": lambda: read_segment_major("delta", group),
        "generate": lambda: read_and_generate(group),
        "snapshot": lambda: read_after_a_snapshot(group),
        "frozen": lambda: read_frozen(group),
        "one": lambda: read(CASES["delta-window"], mesh["data"]),
        "fully-sharded": lambda: read_fully_sharded(group),
        "mesh": lambda: read_on_a_mesh(mesh),
        "traffic": lambda: measure_traffic(group),
        "refusals": lambda: collect_refusals(mesh),
    }
    return others[name]() if name in others else read(CASES[name], group)


def main():
    torch.set_num_threads(1)
    rank, ranks, meeting, folder, *names = sys.argv[1:]
    rank, ranks = int(rank), int(ranks)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    line = distributed.init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "sequence"))
    square = None
    if "mesh" in names:
        square = distributed.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "sequence"))
    results = {name: run_case(name, square if name == "mesh" else line) for name in names}
    torch.save(results, Path(folder) / f"rank_{rank}.pt")
    # All to the end: a rank that leaves early takes the others' connections with it.
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
