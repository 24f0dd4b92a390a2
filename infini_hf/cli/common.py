"""What the commands share: loading a model with its tokenizer, reading a text, the options' help."""

from pathlib import Path

import psutil
import torch
import typer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..assets import shipped, shipped_adapters
from ..auto import AutoInfiniModelForCausalLM
from ..callbacks import gate_values
from ..data.local_parts import read_utf8
from .adapters import load_adapted
from .names import find_device, find_dtype, find_file, find_model, loading

MODEL = typer.Argument(help=f"A hub name, a folder, or a shipped checkpoint ({', '.join(shipped()) or 'none'}).")
MEMORY = typer.Option(help="Folder of the memory snapshot.")
ADAPTER = typer.Option(
    None,
    help=f"LoRA adapter for the model, which brings its own patch: a folder, a hub name, or a shipped one "
    f"({', '.join(shipped_adapters()) or 'none'}).",
)
DTYPE = typer.Option("auto", help="Weights' dtype: auto (the memory's or checkpoint's), float32, bfloat16, float16.")
DEVICE = typer.Option("", help="Device, such as cuda or cpu; the best one by default.")
THREADS = typer.Option(0, min=0, help="CPU threads; 0 takes the cores that are idle now, of torch's choice.")
# Seconds in which it is counted which cores are idle.
LOOK = 0.3
# What both numpy and torch take.
SEEDS = {"min": 0, "max": 2**63 - 1}


def load(model, infini_config, dtype, device, threads, adapter=None):
    """A patched model in evaluation mode, merged with what `find_adapter` found where given, and its tokenizer."""
    torch.set_num_threads(threads or idle_threads())
    # The commands have progress of their own.
    transformers_logging.disable_progress_bar()
    name, dtype = find_model(model), find_dtype(dtype)
    device = find_device(device)
    with loading(model):
        if adapter is None:
            loaded = AutoInfiniModelForCausalLM.from_pretrained(name, infini_config=infini_config, dtype=dtype)
        else:
            loaded = load_adapted(name, adapter, merge=True, dtype=dtype)
        return loaded.to(device).eval(), AutoTokenizer.from_pretrained(name)


def note_untrained(model):
    """Say so when no gate of a model is open: what it reads and is asked then knows the local window alone."""
    if not any(gates.any() for gates in gate_values(model).values()):
        why = "until they are trained, the memory is written and never read"
        typer.echo(f"note: all memory gates of this model are at zero: {why}", err=True)


def idle_threads():
    """`int`: as many threads as torch would take, or as there are idle cores where these are fewer, at least one.

    Threads wait for one another at the end of every product. With more of them than cores that are free, each wait
    lasts until the system gives a core to the last: a command beside other work is then many times slower.
    """
    busy = psutil.cpu_percent(interval=LOOK, percpu=True)
    idle = round(sum(100 - percent for percent in busy) / 100)
    return max(1, min(torch.get_num_threads(), idle))


def read_text(path: Path):
    """A text file, UTF-8.

    Raises:
        ValueError: when it is not there, empty or not text.
    """
    text = read_utf8(find_file(path, "text"))
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
