"""Memory snapshots: the state of a cache in one safetensors file, bound to the model that read the text."""

import hashlib
import json
import os
import time
import uuid
import weakref
from itertools import chain
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache import infini_config_of, tensor_names
from .config import InfiniConfig
from .fingerprint import check_fingerprint, fingerprint
from .layer_state import InfiniLayer
from .version import __version__

FILE_NAME = "memory.safetensors"
FORMAT = "infini_hf memory snapshot 1"
# Seconds after which a file that was never put in its place is nobody's.
LEFT_OVER = 3600


def save_snapshot(cache, directory):
    """Write the state of `cache` into `directory`, so that reading can go on tomorrow.

    The file is written beside the old one and put in its place in one step: a kill in the middle leaves the old one.

    Args:
        cache ([`InfiniCache`]): a cache that has read something.
        directory (`str` or `Path`): made if it is not there.

    Raises:
        ValueError: when the cache is empty, holds NaN, was interrupted inside a forward, or its model is gone.
    """
    cache.check_whole()
    if not cache.seen:
        raise ValueError("the cache is empty: read something with it before it is saved")
    decoder = cache.reader() if cache.reader is not None else None
    if decoder is None:
        raise ValueError("the model that filled this cache is gone: save the snapshot while the model is alive")
    if vars(decoder.config).get("infini_attention") is None or infini_config_of(decoder.config) != cache.infini_config:
        raise ValueError(
            f"the model that filled this cache is no longer patched with {cache.infini_config}: save the memory "
            "before the model is unpatched or patched anew"
        )
    tensors = collect_tensors(cache)
    check_finite(tensors, "the cache")
    metadata = {"fingerprint": json.dumps(fingerprint(decoder)), **state_metadata(cache)}
    write_file(Path(directory) / FILE_NAME, tensors, metadata)


def state_metadata(cache):
    """What a state is beside its tensors, as texts."""
    return {
        "seen": json.dumps(cache.seen),
        "columns": json.dumps(cache.columns),
        "lengths": json.dumps({index: layer.get_seq_length() for index, layer in cache.stock_layers.items()}),
        "notes": json.dumps(cache.notes),
        "dtype": str(cache.layers[0].keys.dtype).removeprefix("torch."),
    }


def write_file(path, tensors, metadata):
    """Write tensors with their metadata and a checksum of both, whole or not at all."""
    metadata = {"format": FORMAT, "version": __version__, **metadata}
    metadata["checksum"] = checksum(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    # What an earlier process left when it was killed in the middle of writing. Younger ones may be another's work.
    for leftover in path.parent.glob(f".{path.name}.*"):
        if time.time() - leftover.stat().st_mtime > LEFT_OVER:
            leftover.unlink(missing_ok=True)
    # Unlike any of another process, on this machine or on one that shares the folder.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        save_file(tensors, partial, metadata=metadata)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_snapshot(cache, directory, model):
    """Fill a fresh cache from a snapshot.

    Args:
        cache ([`InfiniCache`]): an empty cache of `model`.
        directory (`str` or `Path`): where [`save_snapshot`] wrote.
        model (`PreTrainedModel`): the patched model that will go on.

    Returns:
        [`InfiniCache`]: the same cache.

    Raises:
        ValueError: when the snapshot is not there, damaged, holds NaN, or belongs to another model or weights.
    """
    path = Path(directory) / FILE_NAME
    tensors, metadata = read_file(path)
    decoder = model.get_decoder()
    check_fingerprint(path, json.loads(metadata["fingerprint"]), fingerprint(decoder))
    check_contents(path, tensors, metadata)
    fill(cache, tensors, metadata, decoder)
    return cache


def check_contents(path, tensors, metadata):
    """Raise when a file is not what was written."""
    if checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError(
            f"{path}: the contents do not match their checksum, so the file is damaged: read the text again"
        )
    check_finite(tensors, path)


def check_finite(tensors, place):
    """Raise when a memory is spoilt, before it is kept or used."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{place}: {name} holds NaN or infinity: the memory is spoilt, read the text again")


def read_patch(directory):
    """The [`InfiniConfig`] that a snapshot was written under.

    Raises:
        ValueError: when the snapshot is not there or cannot be read.
    """
    metadata = read_metadata(Path(directory) / FILE_NAME)
    return InfiniConfig.from_dict(json.loads(json.loads(metadata["fingerprint"])["patch"]))


def read_dtype(directory):
    """The dtype, as `"float32"`, of the model that wrote a snapshot."""
    return read_metadata(Path(directory) / FILE_NAME)["dtype"]


def collect_tensors(cache):
    """All tensors of the state, on the CPU, by the name they have in the file."""
    tensors, padding = {}, cache.known_padding
    cache.settle()
    for index, layer in enumerate(cache.layers):
        for name in tensor_names(layer):
            tensors[f"layers.{index}.{name}"] = getattr(layer, name).detach().cpu().contiguous()
    if padding is not None:
        tensors["padding"] = padding.cpu().contiguous()
    return tensors


def read_metadata(path):
    """The metadata of a snapshot file; the tensors stay on the disk."""
    return read_file(path, names=())[1]


def read_file(path, names=None):
    """Tensors (all, or those named) and metadata of a snapshot file."""
    if not path.is_file():
        raise ValueError(f"{path}: no memory snapshot is there; write one with cache.save_pretrained(directory)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if names is None else names
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read, so it is damaged or truncated ({error}): read the text again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: is no memory snapshot of this format ({metadata.get('format')!r}, not {FORMAT!r})")
    absent = sorted({"fingerprint", "seen", "columns", "lengths", "notes", "dtype", "checksum"} - metadata.keys())
    if absent:
        raise ValueError(f"{path}: lacks {absent}, so it is damaged: read the text again")
    return tensors, metadata


def fill(cache, tensors, metadata, decoder):
    """Put the tensors where a forward would have left them, each on the device of its layer."""
    seen, columns = tuple(json.loads(metadata["seen"])), json.loads(metadata["columns"])
    lengths = {int(index): length for index, length in json.loads(metadata["lengths"]).items()}
    for index, layer in enumerate(cache.layers):
        device = layer_device(decoder.layers[index])
        state = {name: placed(tensors[f"layers.{index}.{name}"], device) for name in ("keys", "values")}
        layer.lazy_initialization(state["keys"], state["values"])
        layer.keys, layer.values = state["keys"], state["values"]
        if isinstance(layer, InfiniLayer):
            layer.memory = tensors[f"layers.{index}.memory"].to(device)
            layer.memory_norm = tensors[f"layers.{index}.memory_norm"].to(device)
            layer.seen, layer.columns = seen, columns
        elif layer.is_sliding:
            layer.cumulative_length = lengths[index]
    cache.padding = tensors.get("padding")
    cache.padding_end = columns
    cache.notes = json.loads(metadata["notes"])
    cache.reader = weakref.ref(decoder)


def placed(tensor, device):
    """A tensor on a device; an empty one of the file would share its place with the next, which torch.save refuses."""
    return tensor.to(device) if tensor.numel() else torch.empty_like(tensor, device=device)


def layer_device(layer):
    """Where a decoder layer computes, also when accelerate keeps its weights elsewhere."""
    projection = layer.self_attn.q_proj
    device = first_tensor(projection).device
    if device.type != "meta":
        return device
    with align_module_device(projection):
        return first_tensor(projection).device


def first_tensor(module):
    """A weight of a layer; packed ones of a quantised layer may have any name, and be buffers."""
    return next(chain(module.parameters(), module.buffers()))


def checksum(tensors, metadata):
    """SHA-256 of all tensors in name order."""
    total = hashlib.sha256()
    for name in sorted(metadata.keys() - {"checksum"}):
        total.update(f"{name}={metadata[name]}\n".encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].flatten().view(torch.uint8).numpy())
    return total.hexdigest()
