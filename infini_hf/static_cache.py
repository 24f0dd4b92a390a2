"""`StaticInfiniCache`: the state of a patched model in tensors whose shapes and addresses never change.

A token then costs the same kernels on the same memory wherever it falls in its segment, which is what a compiler and
CUDA graphs ask for. Everything is written in place: a cache for inference. A copy has tensors of its own.
"""

import copy
import weakref

import torch

from .cache import InfiniCache, infini_config_of
from .call_arguments import check_reader
from .inner_padding import warn_of_inner_padding
from .inputs import input_device
from .rope import window_tables
from .static_layer import StaticInfiniLayer, StaticSlidingLayer

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StaticInfiniCache(InfiniCache):
    """An [`InfiniCache`] for decoding: `generate` compiles a step on it once, on devices that it compiles for.

    `generate(..., cache_implementation="static")` makes one. A call of one token takes fixed shapes, for rows at any
    place of their segments; a longer call reads as with an [`InfiniCache`].

    Args:
        config (`PreTrainedConfig`): the config of a patched model.

    Raises:
        ValueError: when the config belongs to a model that is not patched.
        NotImplementedError: when the patch leaves a layer of global attention stock, whose cache grows without end, or
            sliding layers under an attention backend that takes no plain mask.

    Example:

    ```python
    static = StaticInfiniCache.from_cache(prefill(model, ids), model)
    step = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        logits = step(token, past_key_values=static).logits
    cache = static.to_infini_cache()
    ```
    """

    def __init__(self, config):
        super().__init__(config)
        config = config.get_text_config(decoder=True)
        growing = [index for index, layer in self.stock_layers.items() if not layer.is_sliding]
        if growing:
            raise NotImplementedError(
                f"a static cache with layers={self.infini_config.layers}: the global attention of layers {growing} is "
                "left stock, and its cache grows with the text; patch them too, or generate without "
                "cache_implementation='static'"
            )
        if self.stock_layers and config._attn_implementation not in ("eager", "sdpa"):
            raise NotImplementedError(
                f"a static cache for {config.model_type!r} with attn_implementation={config._attn_implementation!r}: "
                "its sliding layers need 'eager' or 'sdpa'; load the model with one of them, or generate without "
                "cache_implementation='static'"
            )
        self.fresh = {index: StaticSlidingLayer(layer.sliding_window) for index, layer in self.stock_layers.items()}
        self.layers = [
            copy.copy(self.fresh[index]) if index in self.fresh else StaticInfiniLayer(self.infini_config)
            for index in range(len(self.layers))
        ]
        # For sliding layers: `(batch, sliding_window)` bool, the slots that hold a token, no padding.
        self.real = None
        # The layer that a call of more than one token is reading into.
        self.opened = None

    @classmethod
    def from_cache(cls, cache, model):
        """A static cache with the state of an [`InfiniCache`] of `model`, which is not changed.

        Raises:
            ValueError: for a cache that another model or patch has filled.
        """
        static, decoder = cls(model.config), model.get_decoder()
        cache.check_whole()
        cache.settle()
        own = {name: value for name, value in vars(cache).items() if name not in ("layers", "fresh", "offloading")}
        vars(static).update(own, notes=copy.deepcopy(cache.notes))
        static.check_owner(decoder)
        tokens = torch.empty(0, dtype=torch.int64, device=input_device(decoder))
        window_tables(decoder, static.infini_config, tokens, static)
        for index, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                continue
            layer = copy.copy(layer)
            # Where an offloaded cache keeps it elsewhere.
            layer.prefetch()
            if index in static.fresh:
                cast_window(layer, decoder.layers[index].self_attn)
                static.layers[index].load(layer)
            else:
                static.load_memory(index, layer)
        if static.fresh and static.padding is not None:
            # A step is compiled, and says nothing of what it reads beside.
            known = static.known_padding
            warn_of_inner_padding(decoder, torch.nn.functional.pad(known, (0, 1), value=True), 1, static)
        static.load_padding()
        return static

    def load_memory(self, layer_idx, layer):
        """Take over the state of an [`InfiniLayer`] that has read something."""
        rope, attention = self.rope[1], self.reader().layers[layer_idx].self_attn
        cast_window(layer, attention)
        self.layers[layer_idx].load(layer, rope, attention.memory_gate)
        for table in rope:
            torch._dynamo.mark_static_address(table)

    def check_owner(self, decoder):
        """Raise for a decoder of another patch, or that did not fill this cache.

        Raises:
            ValueError: names the patches.
        """
        config = infini_config_of(decoder.config)
        if self.infini_config != config:
            raise ValueError(f"this cache was made for {self.infini_config} and the model is patched with {config}")
        check_reader(self, decoder)
        self.reader = weakref.ref(decoder)

    def to_infini_cache(self):
        """The same state as an [`InfiniCache`] with tensors of its own."""
        self.check_whole()
        self.unload_padding()
        cache = object.__new__(InfiniCache)
        own = ("real", "opened")
        cache.__dict__.update({name: value for name, value in vars(self).items() if name not in own})
        cache.notes = copy.deepcopy(self.notes)
        cache.layers = [layer.unload() for layer in self.layers]
        cache.fresh = {index: type(cache.layers[index])(layer.sliding_window) for index, layer in self.fresh.items()}
        return cache

    @property
    def first(self):
        """The first layer that holds a memory."""
        return next(layer for layer in self.layers if isinstance(layer, StaticInfiniLayer))

    # A step never comes here, so what is compiled once for all need not know it.
    @torch.compiler.disable
    def fetch(self, layer_idx):
        self.opened = self.layers[layer_idx].unload()
        return self.opened

    @torch.compiler.disable
    def stow(self, layer_idx):
        layer, self.opened = self.opened, None
        self.load_memory(layer_idx, layer)
        self.load_padding()

    @torch.compiler.disable
    def load_padding(self):
        """Write `padding`, of the last columns up to `padding_end`, into the slots of the sliding layers."""
        if not self.fresh or not self.first.is_initialized:
            return
        window, read = next(iter(self.fresh.values())).sliding_window, self.columns
        with torch.inference_mode(False):
            slots = torch.arange(max(0, read - window + 1), read, device=self.first.device) % window
            real = torch.zeros(self.first.tokens.shape[0], window, dtype=torch.bool, device=self.first.device)
            real[:, slots] = True
            if self.padding is not None:
                known = self.known_padding
                count = min(known.shape[1], slots.shape[0])
                real[:, slots[slots.shape[0] - count :]] = known[:, known.shape[1] - count :].to(real.device)
            if self.real is not None and self.real.shape == real.shape:
                self.real.copy_(real)
            else:
                self.real = real
            torch._dynamo.mark_static_address(self.real)

    @torch.compiler.disable
    def unload_padding(self):
        """Read `padding` back from the slots, before a call that looks at it."""
        if self.real is not None:
            sliding = next(iter(self.stock_layers.values()))
            padding = self.real[:, sliding.held_slots()]
            self.padding, self.padding_end = None if bool(padding.all()) else padding, self.columns

    def note_token(self, valid):
        """The slots of the sliding layers that the next token of a step sees, itself too: `(batch, sliding_window)`.

        `valid` is `(batch,)` bool, false at padding, or `None`.
        """
        sliding = next(iter(self.stock_layers.values()))
        slot = torch.arange(self.real.shape[1], device=self.real.device) == sliding.columns_read % self.real.shape[1]
        valid = torch.ones_like(self.real[:, 0]) if valid is None else valid
        self.real.copy_(torch.where(slot[None], valid[:, None], self.real))
        # Padding sees itself, so that no row sees nothing.
        return self.real | slot[None]

    def reset(self):
        super().reset()
        self.real = None

    def reset_rows(self, rows):
        self.unload_padding()
        super().reset_rows(rows)
        self.load_padding()

    def batch_repeat_interleave(self, repeats):
        self.unload_padding()
        super().batch_repeat_interleave(repeats)
        self.load_padding()

    def batch_select_indices(self, indices):
        self.unload_padding()
        super().batch_select_indices(indices)
        self.load_padding()

    def reorder_cache(self, beam_idx):
        self.unload_padding()
        super().reorder_cache(beam_idx)
        self.load_padding()

    def __copy__(self):
        """A cache with tensors of its own: these are written in place."""
        twin = super().__copy__()
        with torch.inference_mode(False):
            for layer in twin.layers:
                layer.map_tensors(torch.clone)
            if self.real is not None:
                twin.real = self.real.clone()
                torch._dynamo.mark_static_address(twin.real)
        return twin

    def with_tensors(self, tensors):
        raise NotImplementedError("a StaticInfiniCache is written in place, for inference: train with an InfiniCache")

    def save_pretrained(self, directory):
        self.to_infini_cache().save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory, model):
        return cls.from_cache(InfiniCache.from_pretrained(directory, model), model)


def cast_window(layer, attention):
    """Bring a layer's keys and values to the dtype of the weights, which is that of the next ones.

    What has read under autocast holds narrower ones, a model that was cast since had wider ones, and tensors that are
    written in place take no others. Weights that are quantised say nothing of it.
    """
    weight = getattr(attention.o_proj, "weight", None)
    if weight is not None and weight.dtype in PLAIN_DTYPES:
        layer.keys, layer.values = layer.keys.to(weight.dtype), layer.values.to(weight.dtype)
