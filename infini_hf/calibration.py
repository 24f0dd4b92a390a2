"""Centering what the memory is asked and written with, so that no constant channel drowns the others.

Keys and queries of pretrained models have channels that are large for every token. Under the exponential feature maps
such a channel outweighs all others, and the memory returns the mean of everything: an answer that no gradient step
soon mends. Subtracting the mean of each channel, once, before training, leaves what differs from token to token.
"""

import torch

from .attention import InfiniAttention
from .cache import InfiniCache, infini_config_of
from .projections import watched
from .streaming import prefill, require_patched


class ChannelMean:
    """Running mean over the tokens of `(batch, heads, seq_len, head_dim)`, in float64."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, states):
        # Apple's GPUs have no float64.
        states = states.cpu() if states.device.type == "mps" else states
        self.total = self.total + states.double().sum((0, 2))
        self.count += states.shape[0] * states.shape[2]

    @property
    def value(self):
        return self.total / self.count


def calibrate_memory(model, ids, progress=True):
    """Center the memory's queries and keys on their means over a text, in place; not for `feature_map="elu"`.

    Do it once, before training: gates and weights learn with the shifts, which are saved with the gates. A memory that
    was written before means nothing afterwards.

    Args:
        model (`PreTrainedModel`): a patched model.
        ids (`torch.Tensor`, `list`, or iterator): what [`infini_hf.prefill`] reads, without padding: a few thousand
            tokens of the text that the model will meet.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar when it takes more than two seconds.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: when the model is not patched, its feature map is another, the memory has projections of its own,
            or there is nothing to read.
    """
    inner = require_patched(model)
    feature_map = infini_config_of(inner.config).feature_map
    if feature_map == "elu":
        raise ValueError(
            f"feature_map={feature_map!r}: only the exponential maps need centered channels; patch with "
            "feature_map='exp' or 'softmax', or leave the calibration out"
        )
    layers = [module for module in inner.modules() if isinstance(module, InfiniAttention)]
    if any(layer.memory_gate.query_projection is not None for layer in layers):
        raise ValueError(
            "the memory has projections of its own, which have learned with the channels as they are: calibrate "
            "first, then call add_memory_projections"
        )
    means = {layer: (ChannelMean(), ChannelMean()) for layer in layers}

    def note(layer, *projected):
        for mean, states in zip(means[layer], projected, strict=True):
            mean.add(states)

    with watched(layers, note):
        cache = prefill(inner, ids, cache=InfiniCache(inner.config), progress=progress)
    if not cache.seen or not cache.seen[0]:
        raise ValueError("ids hold no token: give a few thousand tokens of text")
    for layer, (queries, keys) in means.items():
        layer.memory_gate.set_shifts(queries.value, keys.value)
    return model


def add_memory_projections(model, layers=None, mix_heads=False):
    """Give the memory an affine map of its own for the queries and keys of each head, in place.

    The memory and local attention share their queries and keys. With these maps, as before the feature maps of
    Hedgehog (arXiv 2402.04347), the memory can tell tokens apart by what local attention has no use for. They begin as
    what [`calibrate_memory`] has made, or as the identity, so that nothing changes before they are trained; they are
    saved with the gates. A model that has them stays as it is.

    Args:
        model (`PreTrainedModel`): a patched model.
        layers (`list[int]`, *optional*): indices of the patched layers whose memory gets them; all by default.
        mix_heads (`bool`, *optional*, defaults to `False`): map the states of all heads of a layer together. What
            tells tokens apart then need not lie in the few channels that a head has for its local attention; it
            costs as many times the weights as there are heads.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: when the model is not patched, or `layers` name none of its patched layers.
    """
    patched = [layer for layer in require_patched(model).modules() if isinstance(layer, InfiniAttention)]
    indices = {layer.layer_idx for layer in patched}
    wanted = indices if layers is None else set(layers)
    absent = sorted(wanted - indices)
    if absent or not wanted:
        raise ValueError(
            f"layers={layers}: {absent or 'none'} are not among the patched {sorted(indices)}: name patched layers, "
            "or leave it out for all"
        )
    for layer in patched:
        gate = layer.memory_gate
        if layer.layer_idx not in wanted or gate.query_projection is not None:
            continue
        gate.add_projections(gate.bias.numel() // layer.num_key_value_groups, layer.head_dim, mix_heads)
    return model


@torch.no_grad()
def renew_memory_projections(model, layers, ids, spread=1.0):
    """Begin the memory's projections of some layers anew, in place: a random map of standardised queries and keys.

    For projections that were trained to tell a few facts apart, and learn little else from there (docs/language.md).
    What the layers' memory held is lost to what reads it: train on.

    Args:
        model (`PreTrainedModel`): a patched model with projections.
        layers (`list[int]`): indices of the layers.
        ids (`torch.Tensor`): `(1, seq_len)` int64: a text that means and deviations are taken from.
        spread (`float`, *optional*, defaults to `1.0`): the standard deviation of what comes out of the map.

    Raises:
        ValueError: when the model is not patched, or a layer has no projections.
    """
    inner = require_patched(model)
    patched = [layer for layer in inner.modules() if isinstance(layer, InfiniAttention)]
    having = {layer.layer_idx: layer for layer in patched if layer.memory_gate.query_projection is not None}
    if absent := sorted(set(layers) - set(having)):
        raise ValueError(
            f"layers={layers}: the memory of {absent} has no projections; call add_memory_projections first, or name "
            f"others of {sorted(having)}"
        )
    chosen = [having[index] for index in sorted(set(layers))]
    states = {layer.layer_idx: ([], []) for layer in chosen}

    def note(layer, *projected):
        for parts, part in zip(states[layer.layer_idx], projected, strict=True):
            parts.append(part[0].double().cpu())

    with watched(chosen, note):
        prefill(inner, ids, cache=InfiniCache(inner.config), progress=False)
    for layer in chosen:
        projections = layer.memory_gate.query_projection, layer.memory_gate.key_projection
        for parts, projection in zip(states[layer.layer_idx], projections, strict=True):
            projection.weight.copy_(random_map(torch.cat(parts, dim=1), projection.weight.shape, spread))


def random_map(states, shape, spread):
    """A weight of a [`HeadProjection`] of that shape: states `(heads, n, head_dim)`, standardised, at random."""
    if shape[1] - 1 != states.shape[-1]:
        # Every head gets the states of all.
        states = states.transpose(0, 1).flatten(1)[None].expand(shape[0], -1, -1)
    linear = torch.randn(shape[0], shape[1] - 1, shape[2], dtype=torch.float64) * spread / (shape[1] - 1) ** 0.5
    linear /= states.std(1).clamp_min(1e-6).unsqueeze(-1)
    return torch.cat([linear, -states.mean(1, keepdim=True) @ linear], dim=1)
