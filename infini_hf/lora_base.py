"""Which weights an adapter was trained on: a few of them, kept beside it, tell another base from its own."""

import logging

import torch
from accelerate.utils import align_module_device

from .auto import GATE

logger = logging.getLogger(__name__)

GATE_MODULE = GATE.split(".")[0]
# Values of a tensor that are kept.
VALUES = 4
# Other kinds of numbers are codes that a scale belongs to.
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What rounding to bfloat16 or float16 may change in a value, and the share of the values that may differ by more.
ROUNDING, TINY, MOST_APART = 2.0**-7, 1e-6, 0.1


def sample_base(model):
    """A few values of the weights of a base, of one layer and of what is not in layers.

    Args:
        model (`PreTrainedModel`): a patched model, not wrapped by PEFT yet.

    Returns:
        `dict[str, list[float]]`: by the names of the decoder's parameters, to four digits. Gates are left out, for an
        adapter brings its own, and so is what is quantised or sharded.
    """
    decoder = model.get_decoder()
    middle = f"layers.{len(decoder.layers) // 2}."
    found = {}
    for path, module in decoder.named_modules():
        if path.startswith("layers.") and not path.startswith(middle):
            continue
        with align_module_device(module):
            for name, weight in module.named_parameters(recurse=False):
                place = f"{path}.{name}".removeprefix(".")
                if GATE_MODULE not in place and is_plain(weight):
                    found[place] = values_of(weight.detach())
    return found


def is_plain(weight):
    """Whether a parameter holds its own numbers, all of them."""
    plain = type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.dtype in PLAIN
    return plain and weight.numel() > 0 and not weight.is_meta


def values_of(weight):
    flat = weight.flatten()
    index = torch.linspace(0, len(flat) - 1, VALUES, dtype=torch.float64).long()
    return [float(f"{value:.4g}") for value in flat[index.to(flat.device)].float().tolist()]


def warn_of_base(model, sample, directory, name=None):
    """Say so where a base has other weights than the one that an adapter was trained on.

    Args:
        model (`PreTrainedModel`): the patched base, before the adapter is on it.
        sample (`dict[str, list[float]]`, *optional*): as [`sample_base`] made it of the other; `None` says nothing.
        directory (`str`): the folder of the adapter.
        name (`str`, *optional*): what the other one was called.
    """
    apart = apart_of(sample_base(model), sample)
    if apart:
        hint = f", {name}" if name else ""
        logger.warning(
            "%s: the adapter was trained on other weights than those of this base (%s): pass the base that it was "
            "trained on%s",
            directory,
            apart,
            hint,
        )


def apart_of(own, sample):
    """How far two samples of a base, or `None` for one that was not taken, are apart, in words; else nothing."""
    own, sample = own or {}, sample or {}
    # Zeros alone are what a rank holds until the weights of another reach it.
    names = [name for name in own.keys() & sample.keys() if any(own[name]) and any(sample[name])]
    pairs = [pair for name in names for pair in zip(own[name], sample[name], strict=True)]
    apart = [a for a, b in pairs if abs(a - b) > TINY + ROUNDING * max(abs(a), abs(b))]
    several = len(apart) > MOST_APART * len(pairs)
    return f"{len(apart)} of {len(pairs)} values that were compared differ" if several else ""


def samples_of(model):
    """The samples that the adapters of a model were begun with, by the names of the adapters."""
    configs = getattr(model, "peft_config", None) or {}
    return {name: vars(config).get("base_sample") for name, config in configs.items()}


def check_same_base(folder, samples, model):
    """Refuse to go on with the adapters of a checkpoint on another base.

    Args:
        folder (`str`): the checkpoint, to begin the error with.
        samples (`dict`): what [`samples_of`] gave for the model of the checkpoint.
        model (`PreTrainedModel` or `peft.PeftModel`): the model that goes on.

    Raises:
        ValueError: when an adapter was begun on other weights.
    """
    for name, own in samples_of(model).items():
        apart = apart_of(own, samples.get(name))
        if apart:
            raise ValueError(
                f"{folder}: its adapter is trained on other weights than those of this base ({apart}): resume with "
                "the base that it began on, or start a new run in another output_dir"
            )
