"""`infini-hf read`: stream files into a memory snapshot, and go on where an earlier run stopped."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..cache import InfiniCache
from ..config import InfiniConfig
from ..snapshot import FILE_NAME, read_dtype, read_patch
from ..streaming import prefill
from .adapters import adapter_patch
from .common import (
    ADAPTER,
    DEVICE,
    DTYPE,
    MEMORY,
    MODEL,
    THREADS,
    encode,
    human_bytes,
    load,
    note_untrained,
    read_text,
)
from .names import check_target, find_adapter, find_model, loading


def read(
    model: Annotated[str, MODEL],
    files: Annotated[list[Path], typer.Argument(help="Text files, UTF-8, read in this order.", exists=True)],
    memory: Annotated[Path, MEMORY],
    segment_length: int = typer.Option(
        None,
        help="Tokens in a segment, for a stock checkpoint; by default 2048, or what its positions leave.",
    ),
    overlap: int = typer.Option(
        None, help="Tokens of the previous segment that stay visible, likewise; by default 0."
    ),
    sink_tokens: int = typer.Option(None, help="First tokens that stay visible, likewise; by default 0."),
    memory_update: str = typer.Option(None, help="linear (default) or delta, likewise."),
    feature_map: str = typer.Option(None, help="elu (default), exp or softmax, likewise."),
    chunk_size: int = typer.Option(2048, min=1, help="Tokens in one forward: speed and peak memory only."),
    save_every: int = typer.Option(262_144, min=1, help="Tokens between two writes of the snapshot."),
    adapter: str = ADAPTER,
    dtype: str = DTYPE,
    device: str = DEVICE,
    threads: int = THREADS,
):
    """Read text files of any length into a memory, and save it.

    The snapshot is written every so often, on Ctrl-C and at the end. Run the same command again and it goes on where
    it stopped; name further files and they are read after the earlier ones.
    """
    texts = [read_text(file) for file in files]
    check_target(memory, "--memory ")
    resume = (memory / FILE_NAME).is_file()
    dtype = read_dtype(memory) if resume and dtype == "auto" else dtype
    asked = {
        "segment_length": segment_length,
        "overlap": overlap,
        "sink_tokens": sink_tokens,
        "memory_update": memory_update,
        "feature_map": feature_map,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    folder = find_adapter(adapter)
    begun = read_patch(memory) if resume else None
    patch = choose_patch(model, asked, begun) if folder is None else adapter_patch(folder, asked)
    language_model, tokenizer = load(model, patch, dtype, device, threads, folder)
    note_untrained(language_model)
    cache = InfiniCache.from_pretrained(memory, model=language_model) if resume else InfiniCache(language_model.config)
    records = cache.notes.setdefault("files", [])
    for file, text in zip(files, texts, strict=True):
        record = find_record(records, file, text)
        # Noted where the file begins: later the memory may hold the questions and answers of `ask --save` too.
        first = record.setdefault("begins_stream", tokens_in(cache) == record["tokens"])
        ids = encode(tokenizer, text, first=first)
        start = tokens_in(cache) - record["tokens"]
        try:
            read_file(language_model, ids, cache, record, memory, chunk_size, save_every)
        except KeyboardInterrupt:
            # The cache knows what was read, wherever the interruption fell.
            record["tokens"] = tokens_in(cache) - start
            record["done"] = record["tokens"] == ids.shape[1]
            if cache.seen:
                cache.save_pretrained(memory)
            typer.echo(
                f"\nstopped after {record['tokens']:,} tokens of {file.name}; the same command goes on from there"
            )
            raise typer.Exit(130) from None
    typer.echo(
        f"{memory}: {cache.seen[0]:,} tokens of {len(records)} file(s) in {human_bytes(cache.state_bytes())} of state"
    )


def choose_patch(model, asked, snapshot):
    """The options of the snapshot to go on with, else those of a patched checkpoint, else the ones asked for.

    Raises:
        ValueError: when an option asked for is not that of the snapshot or the checkpoint.
    """
    name = find_model(model)
    with loading(model):
        config = AutoConfig.from_pretrained(name)
    stored = vars(config).get("infini_attention")
    settled = snapshot if snapshot is not None or stored is None else InfiniConfig.from_dict(stored)
    if settled is None:
        # A window beyond the trained positions would spoil the text.
        carried = asked.get("overlap", 0) + asked.get("sink_tokens", 0)
        room = config.max_position_embeddings - carried
        if "segment_length" not in asked and room < max(1, asked.get("overlap", 0)):
            raise ValueError(
                f"overlap and sinks of {carried:,} tokens: leave too little of the {config.max_position_embeddings:,} "
                f"positions of {model} for a segment; carry fewer tokens, or give --segment-length"
            )
        return InfiniConfig(**{"segment_length": max(1, min(InfiniConfig().segment_length, room)), **asked})
    for name, value in asked.items():
        if getattr(settled, name) != value:
            owner = "the memory was begun" if snapshot is not None else "the checkpoint was trained"
            raise ValueError(f"{name}={value}: {owner} with {getattr(settled, name)}; leave the option out")
    return settled


def tokens_in(cache):
    """Tokens that the one row of a cache has read."""
    return cache.seen[0] if cache.seen else 0


def find_record(records, file, text):
    """The record of a file, known by its contents, with the tokens read so far; a new one if it was never met."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    for record in records:
        if record["sha256"] == digest:
            return record
    if records and not records[-1]["done"]:
        raise ValueError(
            f"the memory stopped in the middle of {records[-1]['name']}: name that file first, so that it is finished "
            f"before {file.name}"
        )
    records.append({"name": file.name, "sha256": digest, "tokens": 0, "done": False})
    return records[-1]


def read_file(model, ids, cache, record, memory, chunk_size, save_every):
    """Read one file from where its record stands, saving on the way."""
    total, unsaved = ids.shape[1], 0
    if record["done"]:
        typer.echo(f"{record['name']}: read already ({record['tokens']:,} tokens)")
        return
    with tqdm(total=total, initial=record["tokens"], unit="tok", unit_scale=True, desc=record["name"]) as bar:
        while record["tokens"] < total:
            chunk = ids[:, record["tokens"] : record["tokens"] + chunk_size]
            prefill(model, chunk, cache=cache, chunk_size=chunk_size, progress=False)
            record["tokens"] += chunk.shape[1]
            record["done"] = record["tokens"] == total
            bar.update(chunk.shape[1])
            unsaved += chunk.shape[1]
            if unsaved >= save_every or record["done"]:
                cache.save_pretrained(memory)
                unsaved = 0
