"""`infini-hf demo`: the shipped checkpoint reads a text, keeps its memory, and goes on."""

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..cache import InfiniCache
from ..config import InfiniConfig
from ..evaluation.perplexity import doubling_edges, spans_of
from ..streaming import generate, score
from .common import THREADS, encode, human_bytes, load, read_text

# Room for 512 + 64 + 4 tokens in the 640 positions that the checkpoint was trained on.
PATCH = InfiniConfig(segment_length=512, overlap=64, sink_tokens=4)


def installed_text():
    """A text that every Python installation carries: the topics of its `help()`, about 700,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def demo(
    text: Path = typer.Option(None, help="A text to read; by default one that every Python installation carries."),
    memory: Path = typer.Option(None, help="Keep the memory snapshot in this folder; a temporary one by default."),
    new_tokens: int = typer.Option(80, min=1, help="Tokens to write at the end."),
    max_tokens: int = typer.Option(0, min=0, help="Stop reading after this many tokens; 0 reads everything."),
    seed: int = typer.Option(0, help="Seed of the continuation."),
    threads: int = THREADS,
):
    """Patch the shipped checkpoint, stream a whole text through it, save the memory, reload it and continue the text.

    Offline, on the CPU. The table shows what matters of a stream: the state and the speed do not change with the
    position; inside a segment the state also holds the tokens of the open one. Perplexity follows the text, which by
    default is nothing like the novels that the checkpoint was trained on. The checkpoint is not trained to use its
    memory (its gates are zero), so what it writes is carried by the local window; the memory is written, saved and
    reloaded all the same.
    """
    console = Console()
    model, tokenizer = load("tiny-llama", PATCH, "float32", "cpu", threads)
    ids = encode(tokenizer, read_text(text) if text else installed_text())
    ids = ids[:, :max_tokens] if max_tokens else ids
    source = text.name if text else "the help topics of this Python"
    console.print(f"tiny-llama, {model.num_parameters():,} parameters, reads {source}: {ids.shape[1]:,} tokens")
    cache = InfiniCache(model.config)
    console.print(read_by_position(model, ids, cache))
    with tempfile.TemporaryDirectory() as temporary:
        folder = memory or Path(temporary) / "memory"
        cache.save_pretrained(folder)
        reloaded = InfiniCache.from_pretrained(folder, model=model)
        size = sum(file.stat().st_size for file in folder.iterdir())
        console.print(f"memory saved and reloaded: {human_bytes(size)} for {reloaded.seen[0]:,} tokens")
    torch.manual_seed(seed)
    # The snapshot holds the text; generation needs one new token to start from.
    start = encode(tokenizer, "\n\n", first=False)
    out = generate(model, start, cache=reloaded, max_new_tokens=new_tokens, do_sample=True, top_p=0.9)
    console.rule("the text goes on")
    console.print(tokenizer.decode(out[0], skip_special_tokens=True).strip(), markup=False, highlight=False)


def read_by_position(model, ids, cache):
    """Read `(1, tokens)` ids span by span, and make the table of what each span cost and how well it was predicted."""
    table = Table("tokens read", "tokens/s", "state", "perplexity", title="by position")
    for column in table.columns:
        column.justify = "right"
    edges = doubling_edges(ids.shape[1], 2 * PATCH.segment_length)
    for start, stop in pairwise(edges):
        began = time.perf_counter()
        losses = score(model, ids[:, start:stop], cache=cache)
        seconds = time.perf_counter() - began
        for span in spans_of(losses, [0, losses.shape[1]]):
            speed = (stop - start) / seconds
            table.add_row(f"{stop:,}", f"{speed:,.0f}", human_bytes(cache.state_bytes()), f"{span.perplexity:.1f}")
    return table
