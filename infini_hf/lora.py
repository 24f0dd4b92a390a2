"""LoRA on a patched model: adapters that hold the gates and say which patch they were trained under."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
)
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .auto import AutoInfiniModelForCausalLM, resolve_config
from .cache import infini_config_of
from .config import InfiniConfig
from .lora_base import GATE_MODULE, sample_base, warn_of_base
from .lora_room import check_gate_parts, check_gates, make_room
from .lora_targets import check_targets
from .patching import is_patched, patch_model, unpatch_model
from .streaming import require_patched

# Options of a hub or of accelerate, which the base and the adapter need alike, and those of PEFT alone.
SHARED_OPTIONS = "cache_dir force_download local_files_only token max_memory offload_folder".split()
PEFT_OPTIONS = "adapter_name autocast_adapter_dtype ephemeral_gpu_offload low_cpu_mem_usage torch_device".split()
HUB_OPTIONS = "cache_dir force_download local_files_only token revision subfolder".split()


@dataclass
class InfiniLoraConfig(LoraConfig):
    """A [`peft.LoraConfig`] that records the patch; stock PEFT reads its file and leaves the record out.

    Args:
        infini_attention (`dict`, *optional*): the options of the patch, as in `config.infini_attention`.
        base_sample (`dict`, *optional*): a few weights of the base, see [`infini_hf.lora_base`].
    """

    infini_attention: dict | None = None
    base_sample: dict | None = None

    @classmethod
    def from_peft_type(cls, infini_attention=None, base_sample=None, **kwargs):
        """What PEFT calls with the contents of an `adapter_config.json`; one without a record stays a stock config."""
        config = super().from_peft_type(**kwargs)
        if infini_attention is None:
            return config
        values = {field.name: vars(config)[field.name] for field in dataclasses.fields(config) if field.init}
        return cls(**{**values, "infini_attention": infini_attention, "base_sample": base_sample})


def lora_config(model, **lora_kwargs):
    """The configuration of a LoRA that trains the gates too.

    Args:
        model (`PreTrainedModel`): a patched model.
        lora_kwargs: what [`peft.LoraConfig`] takes. `task_type` is `"CAUSAL_LM"` by default, and the gates are added
            to `modules_to_save`.

    Returns:
        [`InfiniLoraConfig`]: for `peft.get_peft_model(model, config)`; the folder of the adapter then records the
        patch, which [`load_adapter`] needs.

    Raises:
        TypeError: when `model` is no module, or `modules_to_save` is one name instead of a list.
        ValueError: when the model is not patched, or has no layer of a name in `target_modules`.

    Example:

    ```python
    peft_model = get_peft_model(model, lora_config(model, r=16, target_modules=["q_proj", "v_proj"]))
    ```
    """
    inner = require_patched(model)
    patch = infini_config_of(inner.config)
    check_targets(inner, lora_kwargs.get("target_modules"))
    named = lora_kwargs.pop("modules_to_save", None) or ()
    if isinstance(named, str):
        raise TypeError(f"modules_to_save={named!r}: must be a list of names, as in [{named!r}]")
    lora_kwargs.setdefault("task_type", "CAUSAL_LM")
    saved = list(dict.fromkeys([*named, GATE_MODULE]))
    record = {"infini_attention": patch.to_dict(), "base_sample": sample_base(inner)}
    return InfiniLoraConfig(modules_to_save=saved, **record, **lora_kwargs)


def add_lora(model, **lora_kwargs):
    """A patched model with adapters and trainable gates: `get_peft_model` with [`lora_config`].

    A base in 4 or 8 bits is prepared for training first, without the checkpointing inside layers that PEFT would turn
    on by default: it drops the memory.

    Args:
        model (`PreTrainedModel`): a patched model.
        lora_kwargs: what [`lora_config`] takes.

    Returns:
        `peft.PeftModel`

    Raises:
        ValueError: as [`lora_config`] does.
    """
    config = lora_config(model, **lora_kwargs)
    if vars(model.config).get("quantization_config") is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, config)


def load_adapter(base, directory, is_trainable=False, revision=None, subfolder=None, **kwargs):
    """Load an adapter that was made with [`lora_config`], with its gates, onto the plain base or a patched one.

    A base with other weights than those that the adapter was trained on is warned of.

    Args:
        base (`str`, `Path`, `PreTrainedModel` or `peft.PeftModel`): the name or folder of the base, or an instance,
            which is patched and adapted in place. One that is adapted already gets another adapter, of an
            `adapter_name` of its own and of the same patch, which `set_adapter` switches to.
        directory (`str` or `Path`): the folder of the adapter, or its name on the hub.
        is_trainable (`bool`, *optional*, defaults to `False`): go on training it, as the active one; otherwise it is
            frozen, in evaluation mode.
        revision (`str`, *optional*): of the adapter on the hub.
        subfolder (`str`, *optional*): of `directory`.
        kwargs: how the base is loaded when it is a name (`dtype`, `device_map`, `quantization_config`, …), the hub's
            `token` and the like for both, and PEFT's `adapter_name`, `autocast_adapter_dtype` and `torch_device`.

    Returns:
        `peft.PeftModel`: the adapted model; `merge_and_unload()` gives a patched model without PEFT (merge on a base
        that is not quantized: a 4-bit weight rounds the adapter away).

    Raises:
        TypeError: when `base` is of another kind, or an instance comes with options of loading one.
        ValueError: when an adapted base has an adapter of that name, there is no adapter, it does not record its patch
            or lacks gates, the base is patched differently, or a weight of the file has no place in the model. An
            instance loses its new patch, or its new adapter, again.
    """
    directory = os.fspath(directory)
    if isinstance(base, PeftModel):
        check_free(base, kwargs.get("adapter_name", "default"))
    options = {key: kwargs.pop(key) for key in PEFT_OPTIONS if key in kwargs}
    options |= {key: kwargs[key] for key in SHARED_OPTIONS if key in kwargs}
    options |= {"revision": revision, "subfolder": subfolder}
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = read_config(directory, hub)
    patch = InfiniConfig.from_dict(config.infini_attention)
    shapes = read_shapes(directory, hub)
    name = options.get("adapter_name", "default")
    model = open_base(base, patch, directory, kwargs)
    with contextlib.ExitStack() as undo:
        if not is_patched(model):
            patch_model(model, patch)
            undo.callback(unpatch_model, model)
        check_gates(model, shapes, directory)
        make_room(model, shapes, undo)
        check_gate_parts(model, shapes, directory)
        warn_of_base(model, config.base_sample, directory, config.base_model_name_or_path)
        # Sizes are compared below: PEFT would stop in the middle, with its layers left in the model.
        options["ignore_mismatched_sizes"] = True
        if isinstance(base, PeftModel):
            peft_model = base
            undo.callback(take_out, base, name, config, standing_of(base))
            add_to(base, name, directory, config, is_trainable, options)
        else:
            options |= {"config": config, "is_trainable": is_trainable}
            peft_model = PeftModel.from_pretrained(model, directory, **options)
            undo.callback(take_off, peft_model)
        check_loaded(peft_model, name, shapes, directory)
        undo.pop_all()
    return peft_model


def check_free(base, name):
    """Raise when an adapted model has an adapter of that name already."""
    if name in base.peft_config:
        raise ValueError(
            f"adapter_name={name!r}: the model has an adapter of that name; give another, as in "
            "load_adapter(peft_model, directory, adapter_name='second')"
        )


def add_to(peft_model, name, directory, config, is_trainable, options):
    """Another adapter for an adapted model, with the record of its patch, which PEFT's own way of loading drops."""
    config.inference_mode = not is_trainable
    known = {key: value for key, value in options.items() if key not in ("adapter_name", "ephemeral_gpu_offload")}
    making = {key: known[key] for key in ("autocast_adapter_dtype", "low_cpu_mem_usage") if key in known}
    peft_model.add_adapter(name, config, **making)
    peft_model.load_adapter(directory, name, **known)
    if is_trainable:
        peft_model.set_adapter(name)


def standing_of(peft_model):
    """What taking an adapter out again may change: which are active, what is trained, and what is in training mode."""
    trained = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    return list(peft_model.active_adapters), trained, {part: part.training for part in peft_model.modules()}


def take_out(peft_model, name, config, standing):
    """Remove an adapter that could not be loaded, and put the others back as they stood."""
    active, trained, modes = standing
    # PEFT takes a name back where it could not make all of an adapter, and leaves what it had made.
    peft_model.peft_config.setdefault(name, config)
    peft_model.delete_adapter(name)
    peft_model.base_model.set_adapter(active)
    for parameter_name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(trained.get(parameter_name, parameter.requires_grad))
    for part, mode in modes.items():
        part.training = mode


def read_config(directory, hub):
    """The adapter's [`InfiniLoraConfig`]."""
    try:
        config = InfiniLoraConfig.from_pretrained(directory, **hub)
    except ValueError as error:
        raise ValueError(
            f"{directory}: no adapter can be read there ({error}): pass the folder that save_pretrained of the PEFT "
            "model wrote, or the name of an adapter on the hub"
        ) from error
    if not isinstance(config, InfiniLoraConfig):
        raise ValueError(
            f"{directory}: its adapter_config.json has no infini_attention, so this is a stock adapter that does not "
            "say which patch it was trained under: train with infini_hf.lora.lora_config(model), or patch the base "
            "yourself and load it with peft.PeftModel.from_pretrained"
        )
    return config


def read_shapes(directory, hub):
    """The shape of every tensor in the adapter's file, by name."""
    try:
        weights = load_peft_weights(directory, device="cpu", **hub)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{directory}: the adapter's weights are not there or cannot be read ({error}): save the adapter again"
        ) from error
    return {key: weight.shape for key, weight in weights.items()}


def open_base(base, patch, directory, kwargs):
    """The model that the adapter goes on: an instance as it is, a name loaded and patched."""
    if isinstance(base, PeftModel):
        base = require_patched(base)
    if isinstance(base, PreTrainedModel):
        loading = sorted(kwargs.keys() - set(SHARED_OPTIONS))
        if loading:
            raise TypeError(f"{loading} say how a base is loaded, and this base is an instance: leave them out")
        if is_patched(base):
            check_patch(infini_config_of(base.config), patch, directory)
        return base
    if not isinstance(base, (str, Path)):
        raise TypeError(
            f"base is a {type(base).__name__}: pass a name, a folder, or a transformers model, adapted or not"
        )
    config, kwargs = resolve_config(base, kwargs)
    stored = vars(config).get("infini_attention")
    if stored is not None:
        check_patch(InfiniConfig.from_dict(stored), patch, directory)
    return AutoInfiniModelForCausalLM.from_pretrained(base, infini_config=patch, config=config, **kwargs)


def check_patch(own, patch, directory):
    if own != patch:
        raise ValueError(
            f"{directory}: the adapter was trained under {patch}, and the base is patched with {own}: pass the plain "
            "base (infini_hf.unpatch_model takes a patch off), which is then patched to fit"
        )


def check_loaded(peft_model, adapter_name, shapes, directory):
    """Raise when a tensor of the file found no place, or a part of the adapter was not in the file."""
    own = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    places = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=True)
    dropped = sorted(shapes.keys() - places.keys())
    absent = sorted(own.keys() - shapes.keys())
    misfits = [
        f"{key} {tuple(shape)} where {tuple(places[key].shape)} goes"
        for key, shape in shapes.items()
        if key in places and places[key].shape != shape
    ]
    problems = [("no place for", dropped), ("nothing in the file for", absent), ("another size in", misfits)]
    found = "; ".join(f"{what} {names}" for what, names in problems if names)
    if found:
        raise ValueError(f"{directory}: the adapter does not fit this base: {found}. Pass the base it was trained on")


def take_off(peft_model):
    """Remove the adapter; PEFT's own `unload` leaves the gates that it trained in the place of the base's."""
    modules = peft_model.get_base_model().named_modules()
    originals = {name: module.original_module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}
    model = peft_model.unload()
    for name, module in originals.items():
        model.set_submodule(name, module)
