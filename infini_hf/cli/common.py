"""What the commands share: loading a model with its tokenizer, reading a text, the options' help."""

from pathlib import Path

import torch
import typer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..assets import shipped
from ..auto import AutoInfiniModelForCausalLM
from .adapters import load_adapted
from .names import find_dtype, find_file, find_model, loading

MODEL = typer.Argument(help=f"A hub name, a folder, or a shipped checkpoint ({', '.join(shipped()) or 'none'}).")
MEMORY = typer.Option(help="Folder of the memory snapshot.")
DTYPE = typer.Option("auto", help="Weights' dtype: auto (the memory's or checkpoint's), float32, bfloat16, float16.")
DEVICE = typer.Option("", help="Device, such as cuda or cpu; the best one by default.")
THREADS = typer.Option(0, help="CPU threads; 0 leaves torch's choice.")


def load(model, infini_config, dtype, device, threads, adapter=None):
    """A patched model in evaluation mode, with the folder of an adapter merged into it, and its tokenizer."""
    if threads:
        torch.set_num_threads(threads)
    # The commands have progress of their own.
    transformers_logging.disable_progress_bar()
    name, dtype = find_model(model), find_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: is not to be had here ({error}); leave the option out") from error
    with loading(model):
        if adapter is None:
            loaded = AutoInfiniModelForCausalLM.from_pretrained(name, infini_config=infini_config, dtype=dtype)
        else:
            loaded = load_adapted(name, adapter, merge=True, dtype=dtype)
        return loaded.to(device).eval(), AutoTokenizer.from_pretrained(name)


def read_text(path: Path):
    """A text file, UTF-8.

    Raises:
        ValueError: when it is not there, empty or not text.
    """
    try:
        text = find_file(path, "text").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); convert it first") from error
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    return text


def encode(tokenizer, text, first=True):
    """Token ids `(1, seq_len)`; the tokenizer's own first token only at the start of a stream."""
    # A whole book is longer than any tokenizer's limit, and that is the point.
    options = {"add_special_tokens": first, "return_tensors": "pt", "verbose": False}
    return tokenizer(text, **options)["input_ids"]


def human_bytes(count):
    """A size as people write it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
