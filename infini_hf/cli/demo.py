"""`infini-hf demo`: a passkey before a million tokens, asked for after them, with the memory and with it closed."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ..cache import InfiniCache, infini_config_of
from ..data.needle_tasks import first_number
from ..data.needles import GRASS, PASSKEY_HEADER, draw_key, passkey_fact
from ..evaluation.needles.questions import ask_with
from ..snapshot import FILE_NAME
from ..streaming import prefill
from .common import SEEDS, THREADS, encode, human_bytes, load, read_text
from .names import check_target

# Looks at the state, the first of which is at its beginning.
REPORTS = 8
# The key's digits, and what may stand before them.
SPARE_TOKENS = 5


def demo(
    model: str = typer.Option("tiny-llama-infini", help="A checkpoint with a trained memory."),
    tokens: int = typer.Option(1_000_000, min=256, help="Tokens of the stream."),
    key: str = typer.Option("", help="The number to hide; by default one drawn from the seed."),
    text: Path = typer.Option(None, help="What to hide it in; by default the grass filler of the benchmark."),
    memory: Path = typer.Option(None, help="Keep the memory in this folder, to go on with `infini-hf ask`."),
    seed: int = typer.Option(0, **SEEDS, help="Seed of the key."),
    threads: int = THREADS,
):
    """Hide a passkey at the start of a stream of a million tokens, read it once, and ask for the key.

    Offline, on the CPU, in minutes. The state has the same size at every segment boundary. The control asks the
    same question of the same cache with the memory closed: what is left is the local window, with the trace that the
    memory left in its keys and values. A text that is shorter than the stream begins again.
    """
    console = Console()
    if memory:
        check_target(memory, "--memory ")
        if (memory / FILE_NAME).is_file():
            raise ValueError(f"--memory {memory}: holds a memory already, which the demo would replace; name another")
    language_model, tokenizer = load(model, None, "float32", "cpu", threads)
    key = key or draw_key(np.random.default_rng(seed), split="test")
    if not key.isdigit():
        raise ValueError(f"--key {key}: give a number")
    start = encode(tokenizer, f"{PASSKEY_HEADER}\n\n{passkey_fact(key).statement}\n\n")
    filler = encode(tokenizer, read_text(text) if text else (GRASS + " ") * 16, first=False)
    if start.shape[1] >= tokens:
        raise ValueError(f"--tokens {tokens}: the key alone takes {start.shape[1]}; give more")
    times = -(-tokens // filler.shape[1])
    ids = torch.cat([start, filler.repeat(1, times)], dim=1)[:, :tokens]
    source = text.name if text else "the benchmark's filler"
    console.print(
        f"{model}, {language_model.num_parameters():,} parameters: the pass key {key} comes first, "
        f"then {tokens - start.shape[1]:,} tokens of {source}"
    )
    cache = InfiniCache(language_model.config)
    console.print(read_with_reports(language_model, ids, cache))
    prompt = encode(tokenizer, "\n\n" + passkey_fact(key).prompt, first=False)[0].numpy()
    table = Table("asked with", "the model says", title=passkey_fact(key).prompt)
    for control, name in (("memory", "the memory"), ("closed", "the memory closed")):
        said = ask_with(control, language_model, tokenizer, cache, [prompt], len(key) + SPARE_TOKENS)[0]
        number, found = first_number(said, (key,))
        table.add_row(name, f"{number or said.strip()!r}: " + ("right" if found else "wrong"))
    console.print(table)
    if memory:
        cache.save_pretrained(memory)
        console.print(f"the memory is in {memory}: infini-hf ask {model} QUESTION --memory {memory}")


def read_with_reports(model, ids, cache):
    """Read `(1, tokens)` ids, and make the table of what that cost at every stage."""
    table = Table("tokens read", "tokens/s", "state", title="reading")
    for column in table.columns:
        column.justify = "right"
    # At segment boundaries, where the state holds no open segment.
    length, tokens = infini_config_of(model.config).segment_length, ids.shape[1]
    boundaries = (round(part * tokens / REPORTS / length) * length for part in range(REPORTS))
    # The last may round to one beyond the stream.
    edges = sorted({*(min(boundary, tokens) for boundary in boundaries), tokens})
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc="reading", leave=False) as bar:
        for left, right in pairwise(edges):
            began = time.perf_counter()
            for chunk in ids[:, left:right].split(8192, dim=1):
                prefill(model, chunk, cache=cache, progress=False)
                bar.update(chunk.shape[1])
            speed = (right - left) / (time.perf_counter() - began)
            table.add_row(f"{right:,}", f"{speed:,.0f}", human_bytes(cache.state_bytes()))
    return table
