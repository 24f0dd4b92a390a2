"""Room in a base for the gates of an adapter: what it is given, and where the two do not fit."""

import torch

from .attention import InfiniAttention
from .auto import GATE, PROJECTIONS, SHIFTS
from .lora_base import GATE_MODULE

GATE_PARTS = ("query_shift", "key_shift", "query_projection", "key_projection")
# What PEFT puts before the names of the model that it wraps.
PREFIX = "base_model.model."


def own_gates(model):
    """The gates of a base's layers, by the name of the layer, without what PEFT may have put around them."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, InfiniAttention)}
    return {path: getattr(layer.memory_gate, "original_module", layer.memory_gate) for path, layer in layers.items()}


def make_room(model, shapes, undo):
    """Give a base the shifts, or the projections, that the adapter's gates were trained with, where it has none.

    What it is given changes nothing while the adapter is switched off.
    """
    for path, gate in own_gates(model).items():
        if gate.query_projection is not None:
            continue
        for part in GATE_PARTS:
            undo.callback(setattr, gate, part, getattr(gate, part))
        shifts, projections = ([f"{PREFIX}{path}.{name}" for name in names] for names in (SHIFTS, PROJECTIONS))
        if projections[1] in shapes:
            # A single KV head has no others to be mixed with: the queries tell.
            _, inputs, dim = shapes[projections[0]]
            gate.add_projections(shapes[projections[1]][0], dim, mix_heads=inputs - 1 != dim)
        elif shifts[0] in shapes and gate.query_shift is None:
            gate.set_shifts(*(torch.zeros(shapes[key]) for key in shifts))


def check_gates(model, shapes, directory):
    """Raise when a patched layer has no gate in the adapter, for which PEFT has a bare `KeyError` or no word."""
    layers = [name for name, module in model.named_modules() if isinstance(module, InfiniAttention)]
    absent = [f"{name}.{GATE}" for name in layers if f"{PREFIX}{name}.{GATE}" not in shapes]
    if absent:
        raise ValueError(
            f"{directory}: the adapter holds no gate for {absent}: it was made for another base, or without the gates "
            "in modules_to_save; make it with infini_hf.lora.lora_config(model)"
        )


def check_gate_parts(model, shapes, directory):
    """Raise when a base's gates have shifts or projections that the adapter's were trained without."""
    names = [f"{path}.{GATE_MODULE}.{part}" for path, gate in own_gates(model).items() for part in gate.state_dict()]
    absent = [name for name in names if f"{PREFIX}{name}" not in shapes]
    if absent:
        raise ValueError(
            f"{directory}: the adapter's gates were trained without {absent}, which the base has: pass the base that "
            "it was trained on, and beside adapters with such parts load this one first"
        )
