"""`infini-hf ask`: put a question to a memory."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import TextStreamer

from ..cache import InfiniCache
from ..snapshot import read_dtype, read_patch
from ..streaming import generate
from .common import ADAPTER, DEVICE, DTYPE, MEMORY, MODEL, SEEDS, THREADS, encode, load, note_untrained
from .names import find_adapter


def ask(
    model: Annotated[str, MODEL],
    prompt: Annotated[str, typer.Argument(help="What the text goes on with: a question, or its next words.")],
    memory: Annotated[Path, MEMORY],
    max_new_tokens: int = typer.Option(100, min=1, help="Tokens to write."),
    temperature: float = typer.Option(
        0.0, min=0.0, help="0 is greedy; the paper's BookSum setting is 0.5 with top-p 0.95."
    ),
    top_p: float = typer.Option(0.95, min=0.0, max=1.0, help="Nucleus sampling, when the temperature is not 0."),
    seed: int = typer.Option(0, **SEEDS, help="Seed of the sampling."),
    save: bool = typer.Option(False, "--save", help="Keep question and answer in the memory, for the next turn."),
    adapter: str = ADAPTER,
    dtype: str = DTYPE,
    device: str = DEVICE,
    threads: int = THREADS,
):
    """Continue a saved memory with a prompt. The snapshot stays as it is, unless --save is given.

    A memory that was read with an adapter is asked with it.
    """
    folder = find_adapter(adapter)
    dtype = read_dtype(memory) if dtype == "auto" else dtype
    language_model, tokenizer = load(model, read_patch(memory), dtype, device, threads, folder)
    cache = InfiniCache.from_pretrained(memory, model=language_model)
    note_untrained(language_model)
    torch.manual_seed(seed)
    options = {"do_sample": temperature > 0}
    if temperature > 0:
        # Transformers would draw from the 50 likeliest tokens alone.
        options.update(temperature=temperature, top_p=top_p, top_k=0)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    ids = encode(tokenizer, prompt, first=False)
    generate(language_model, ids, cache=cache, max_new_tokens=max_new_tokens, streamer=streamer, **options)
    if save:
        cache.save_pretrained(memory)
