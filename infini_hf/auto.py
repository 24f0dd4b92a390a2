"""`AutoInfiniModelForCausalLM`: a checkpoint, vanilla or patched, loaded and patched in one call."""

import copy
import json
import logging
import os

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .attention import InfiniAttention
from .config import InfiniConfig
from .families import family_of
from .patching import patch_model

logger = logging.getLogger(__name__)

GATE = "memory_gate.bias"
# What a calibrated gate has beside it.
SHIFTS = ("memory_gate.query_shift", "memory_gate.key_shift")
# What a gate with projections of its own has in their place.
PROJECTIONS = ("memory_gate.query_projection.weight", "memory_gate.key_projection.weight")
# What `cached_file` needs to find the same files as `from_pretrained`.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class AutoInfiniModelForCausalLM:
    """Loads a causal language model with Infini-attention."""

    def __init__(self):
        raise TypeError("AutoInfiniModelForCausalLM is made by its from_pretrained(name_or_folder)")

    @classmethod
    def from_pretrained(cls, name_or_path, infini_config=None, **kwargs):
        """Load a checkpoint and patch it.

        A vanilla checkpoint gets gates at exactly zero; a patched one its own options and gates.

        Args:
            name_or_path (`str` or `Path`): a hub name or a folder.
            infini_config ([`InfiniConfig`], *optional*):
                the options; by default those in the checkpoint, else the defaults.
            kwargs: what `AutoModelForCausalLM.from_pretrained` takes (`dtype`, `device_map`, `attn_implementation`,
                `quantization_config`, `revision`, …), but `output_loading_info`. Gates are read from safetensors.

        Returns:
            `PreTrainedModel`: the model, of its own stock class, patched.

        Raises:
            TypeError: when `infini_config` is not an [`InfiniConfig`].
            ValueError: when the options do not fit the model or the checkpoint lacks some of its gates.
            NotImplementedError: when the family is not supported.
        """
        if infini_config is not None and not isinstance(infini_config, InfiniConfig):
            raise TypeError(f"infini_config is a {type(infini_config).__name__}: pass an InfiniConfig")
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        config, kwargs = resolve_config(name_or_path, kwargs)
        # Before any weight is read.
        family_of(config)
        stored = vars(config).pop("infini_attention", None)
        chosen = choose_config(infini_config, stored, name_or_path)
        model, info = load_stock(name_or_path, config, kwargs)
        patch_model(model, chosen)
        if stored is not None:
            gates = read_gates(name_or_path, hub, kwargs.get("variant"))
            if gates or infini_config is None:
                load_gates(model, gates, InfiniConfig.from_dict(stored).layers, name_or_path)
            else:
                logger.warning("%s: its weights hold no gate, so that all begin at zero", name_or_path)
        warn_of_keys(info, name_or_path)
        return model


def resolve_config(name, kwargs):
    """The config, with the options among `kwargs` that are its own, and the rest of them."""
    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    if isinstance(config, (str, os.PathLike)):
        # As transformers: another name or folder, to read the config from.
        name, config = config, None
    if config is not None:
        return copy.deepcopy(config), kwargs
    # Both are fields of a config too, and mean the loading here.
    loading = {key: kwargs.pop(key) for key in ("dtype", "quantization_config") if key in kwargs}
    kept = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    config, rest = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
    return config, {**rest, **kept, **loading}


def choose_config(given, stored, name):
    """The options asked for, else those of the checkpoint, else the defaults."""
    stored = None if stored is None else InfiniConfig.from_dict(stored)
    if given is None:
        return stored or InfiniConfig()
    if stored is not None and given != stored:
        logger.warning("%s was trained with %s and is loaded with %s, as asked", name, stored, given)
    return given


def load_stock(name, config, kwargs):
    """The stock model and the loading info. The loading report is silenced: gates are left over by design there, and
    `warn_of_keys` says what else is."""
    library = logging.getLogger("transformers.modeling_utils")
    library.addFilter(is_no_report)
    try:
        return AutoModelForCausalLM.from_pretrained(name, config=config, **{**kwargs, "output_loading_info": True})
    finally:
        library.removeFilter(is_no_report)


def is_no_report(record):
    """Lets everything pass but the loading report."""
    return "LOAD REPORT" not in record.getMessage()


def warn_of_keys(info, name):
    """Say what the checkpoint has too much or too little of, gates apart."""
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith((GATE, *SHIFTS, *PROJECTIONS)))
    missing = sorted(info["missing_keys"])
    if unexpected:
        logger.warning("%s: the model has no place for %s", name, unexpected)
    if missing:
        logger.warning("%s: not in the checkpoint and newly initialised: %s", name, missing)


def read_gates(name, hub, variant=None):
    """All gates in a safetensors checkpoint, by name, float32."""
    # In the order of transformers: an index may be left of weights that were in several files once.
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    # What was asked to be fetched anew has been, with the weights.
    hub = {**hub, "force_download": False}
    whole, index = (_add_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    table = None
    if cached_file(name, whole, **hub, **missing_ok) is None:
        table = cached_file(name, index, **hub, **missing_ok)
    if table is None:
        files = [whole]
    else:
        with open(table, encoding="utf-8") as file:
            places = json.load(file)["weight_map"]
        files = sorted({place for key, place in places.items() if key.endswith((GATE, *SHIFTS, *PROJECTIONS))})
    gates = {}
    for file_name in files:
        with safe_open(cached_file(name, file_name, **hub), framework="pt") as file:
            names = [key for key in file.keys() if key.endswith((GATE, *SHIFTS, *PROJECTIONS))]  # noqa: SIM118 (no mapping)
            gates.update({key: file.get_tensor(key).float() for key in names})
    return gates


def load_gates(model, gates, trained, name):
    """Copy the checkpoint's gates into the patched layers.

    Args:
        model (`PreTrainedModel`): the patched model.
        gates (`dict[str, torch.Tensor]`): what [`read_gates`] found; what is taken is removed.
        trained (`list[int]`, *optional*): the layers that the checkpoint was patched in; all global ones by default.
        name (`str`): of the checkpoint.

    Raises:
        ValueError: when a layer that was patched has no gate in the checkpoint, or half of what belongs to one, or
            when others have one that a layer of this patch lacks.
    """
    absent, lost = [], []
    for path, module in model.named_modules():
        if not isinstance(module, InfiniAttention):
            continue
        # A decoder that was saved alone has names of its own.
        alone = path.removeprefix(f"{model.base_model_prefix}.")
        path = alone if f"{alone}.{GATE}" in gates else path
        key = f"{path}.{GATE}"
        if key not in gates:
            absent.append(key)
            if trained is None or module.layer_idx in trained:
                lost.append(key)
            continue
        gate = module.memory_gate
        with torch.no_grad():
            gate.bias.copy_(gates.pop(key))
        for names, place in ((SHIFTS, gate.set_shifts), (PROJECTIONS, gate.set_projections)):
            found = [gates.pop(f"{path}.{name}", None) for name in names]
            if all(part is not None for part in found):
                place(*found)
            elif any(part is not None for part in found):
                lost += [f"{path}.{name}" for name, part in zip(names, found, strict=True) if part is None]
    if absent and gates:
        raise ValueError(
            f"{name}: the patch covers {absent}, which the checkpoint has no gate for, and the checkpoint has "
            f"{sorted(gates)}: pass the layers it was trained with (infini_config=None takes them from the checkpoint)"
        )
    if lost:
        raise ValueError(
            f"{name}: its config says that it is patched, and its weights lack {lost}, without which the memory would "
            "be shut: a stock class saved it, or something converted it. Take the checkpoint from before that; where "
            "no gate is left, infini_config begins with fresh ones"
        )
    if gates:
        logger.warning("%s: gates left out by the patch: %s", name, sorted(gates))
