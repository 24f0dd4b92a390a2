"""`infini-hf read`: stream files into a memory snapshot, and go on where an earlier run stopped."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..assets import resolve
from ..cache import InfiniCache
from ..config import InfiniConfig
from ..snapshot import FILE_NAME, read_patch
from ..streaming import prefill
from .common import DEVICE, DTYPE, MEMORY, MODEL, THREADS, encode, human_bytes, load, read_text


def read(
    model: Annotated[str, MODEL],
    files: Annotated[list[Path], typer.Argument(help="Text files, UTF-8, read in this order.", exists=True)],
    memory: Annotated[Path, MEMORY],
    segment_length: int = typer.Option(
        0, help="Tokens in a segment, for a checkpoint that is not patched yet; 0: 2048, or what its positions leave."
    ),
    overlap: int = typer.Option(0, help="Tokens of the previous segment that stay visible, likewise."),
    sink_tokens: int = typer.Option(0, help="First tokens that stay visible, likewise."),
    memory_update: str = typer.Option("linear", help="linear or delta, likewise."),
    feature_map: str = typer.Option("elu", help="elu or exp, likewise."),
    chunk_size: int = typer.Option(8192, help="Tokens in one forward: speed and peak memory only."),
    save_every: int = typer.Option(262_144, help="Tokens between two writes of the snapshot."),
    dtype: str = DTYPE,
    device: str = DEVICE,
    threads: int = THREADS,
):
    """Read text files of any length into a memory, and save it.

    The snapshot is written every so often, on Ctrl-C and at the end. Run the same command again and it goes on where
    it stopped; name further files and they are read after the earlier ones.
    """
    texts = [read_text(file) for file in files]
    resume = (memory / FILE_NAME).is_file()
    asked = {
        "segment_length": segment_length,
        "overlap": overlap,
        "sink_tokens": sink_tokens,
        "memory_update": memory_update,
        "feature_map": feature_map,
    }
    patch = read_patch(memory) if resume else choose_patch(model, asked)
    language_model, tokenizer = load(model, patch, dtype, device, threads)
    cache = InfiniCache.from_pretrained(memory, model=language_model) if resume else InfiniCache(language_model.config)
    records = cache.notes.setdefault("files", [])
    for file, text in zip(files, texts, strict=True):
        record = find_record(records, file, text)
        ids = encode(tokenizer, text, first=record is records[0])
        try:
            read_file(language_model, ids, cache, record, memory, chunk_size, save_every)
        except KeyboardInterrupt:
            if cache.seen:
                cache.save_pretrained(memory)
            typer.echo(
                f"\nstopped after {record['tokens']:,} tokens of {file.name}; the same command goes on from there"
            )
            raise typer.Exit(130) from None
    typer.echo(
        f"{memory}: {cache.seen[0]:,} tokens of {len(records)} file(s) in {human_bytes(cache.state_bytes())} of state"
    )


def choose_patch(model, asked):
    """The options for a fresh memory: `None` for a patched checkpoint, which has its own, else the ones asked for."""
    config = AutoConfig.from_pretrained(resolve(model))
    if "infini_attention" in vars(config):
        return None
    if not asked["segment_length"]:
        # A window beyond the trained positions would spoil the text.
        room = config.max_position_embeddings - asked["overlap"] - asked["sink_tokens"]
        asked = {**asked, "segment_length": max(1, min(InfiniConfig().segment_length, room))}
    return InfiniConfig(**asked)


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
