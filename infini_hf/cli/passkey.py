"""`infini-hf passkey`: hide keys in streams of any length and ask for them, with controls."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.base_rows import read_texts
from ..evaluation.passkey import (
    CONTROLS,
    DEPTHS,
    HAYSTACKS,
    STRADDLING,
    Haystacks,
    PasskeyCell,
    passkey_table,
    run_passkeys,
)
from .common import DEVICE, DTYPE, MODEL, THREADS, load

UNITS = {"k": 1024, "m": 1024 * 1024}


def passkey(
    model: Annotated[str, MODEL],
    lengths: str = typer.Option("4k,32k", help="Tokens of a stream, such as 4k,32k,128k,1m."),
    depths: str = typer.Option(
        "", help="Depths from 0 to 1, and straddling; all of 0, 0.1 … 1, straddling by default."
    ),
    samples: int = typer.Option(20, min=1, help="Streams for each haystack, length and depth."),
    haystack: Path = typer.Option(None, help="Folder of plain-text novels; the benchmark's grass alone without it."),
    digits: int = typer.Option(5, min=1, help="Digits of a key."),
    output: Path = typer.Option(Path("passkey.jsonl"), help="Every sample, a line each; a later run goes on from it."),
    batch_size: int = typer.Option(8, min=1, help="Streams read at once."),
    seed: int = typer.Option(0, help="Seed of keys, filler and places."),
    dtype: str = DTYPE,
    device: str = DEVICE,
    threads: int = THREADS,
):
    """Exact match of keys hidden in grass filler and in novels, with the memory, with it closed, and with another's.

    The memory is closed, or exchanged with that of another stream, while the question is asked: what is left is the
    local window and chance.
    """
    language_model, tokenizer = load(model, None, dtype, device, threads)
    segment_length = language_model.config.infini_attention["segment_length"]
    texts = read_texts(haystack) if haystack else ()
    kinds = HAYSTACKS if haystack else HAYSTACKS[:1]
    places = [parse_depth(text) for text in depths.split(",")] if depths else [*DEPTHS, STRADDLING]
    cells = [
        PasskeyCell(kind, length, depth)
        for length in map(parse_length, lengths.split(","))
        for kind in kinds
        for depth in places
    ]
    haystacks = Haystacks(tokenizer, segment_length, texts, digits, seed)
    found = run_passkeys(language_model, tokenizer, cells, samples, haystacks, output, CONTROLS, batch_size)
    typer.echo("\n".join(passkey_table(found)))


def parse_length(text):
    """`"32k"` as 32,768 tokens."""
    number, unit = (text[:-1], UNITS[text[-1].lower()]) if text[-1:].lower() in UNITS else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError as error:
        raise ValueError(f"--lengths {text!r}: give numbers of tokens, such as 4k,32k,1m") from error


def parse_depth(text):
    """A number from 0 to 1, or `"straddling"`."""
    if text.strip() == STRADDLING:
        return STRADDLING
    try:
        depth = float(text)
    except ValueError as error:
        raise ValueError(f"--depths {text!r}: give numbers from 0 to 1, or {STRADDLING}") from error
    if not 0 <= depth <= 1:
        raise ValueError(f"--depths {text}: must be between 0 and 1")
    return depth
