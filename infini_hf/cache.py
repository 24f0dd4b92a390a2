"""`InfiniCache`: everything a model remembers of a stream, as a transformers `Cache`.

Tensors are never changed in place: every write binds a new one. A copy of the cache is therefore as cheap as its
references, and a cache handed to a training step keeps its values.
"""

import copy

import torch
from transformers.cache_utils import Cache, DynamicCache

from .config import InfiniConfig
from .layer_state import CROP_REFUSED, InfiniLayer


def infini_config_of(config):
    """The [`InfiniConfig`] in a model's config.

    Raises:
        ValueError: when the config belongs to a model that is not patched.
    """
    values = vars(config.get_text_config(decoder=True)).get("infini_attention")
    if values is None:
        raise ValueError(
            f"the config of this {config.model_type!r} model holds no infini_attention: patch the model first "
            "(infini_hf.patch_model) and pass its config"
        )
    return InfiniConfig.from_dict(values)


def global_layers(config):
    """Indices of the layers with global attention in a model's config."""
    return [index for index, layer in enumerate(DynamicCache(config=config).layers) if not layer.is_sliding]


def tensor_names(layer):
    """The attributes of a cache layer that hold its state."""
    return InfiniLayer.TENSORS if isinstance(layer, InfiniLayer) else ("keys", "values")


class InfiniCache(Cache):
    """The memory state of a patched model, passed as `past_key_values`. Its size does not depend on what was read.

    Args:
        config (`PreTrainedConfig`): the config of a patched model.
        offloading (`bool`, *optional*, defaults to `False`): keep the layers on the CPU between their turns.

    Raises:
        ValueError: when the config belongs to a model that is not patched.

    Example:

    ```python
    cache = InfiniCache(model.config)
    model(ids, past_key_values=cache)  # reads; the next call continues
    ```
    """

    def __init__(self, config, offloading=False):
        config = config.get_text_config(decoder=True)
        self.infini_config = infini_config_of(config)
        patched = self.infini_config.layers
        patched = global_layers(config) if patched is None else patched
        layers = DynamicCache(config=config).layers
        for index in patched:
            layers[index] = InfiniLayer(self.infini_config)
        # On the CPU there is nowhere to offload to.
        super().__init__(layers=layers, offloading=offloading and torch.cuda.is_available())
        # Stock layers as they begin: their own reset zeroes tensors that a copy may share.
        self.fresh = {index: copy.copy(layer) for index, layer in self.stock_layers.items()}
        # Padding of the columns that stock layers still hold, `(batch, columns)` bool, and the column it ends at;
        # `None` while there was none. Noted before the layers run, so after an interruption its end lies too far.
        self.padding = None
        self.padding_end = 0
        # Columns read before `infini_hf.generate` was entered: the stock loop must not learn of them, or every token
        # would cost a mask and ids of the whole past.
        self.hidden_columns = 0
        # Cosines and sines of the window positions, the same at every call.
        self.rope = None
        # The decoder that fed this cache, for the fingerprint of a snapshot.
        self.reader = None
        # Whatever should travel with a snapshot: a dict that JSON can hold.
        self.notes = {}

    @property
    def infini_layers(self):
        """The layers that hold a memory, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, InfiniLayer)}

    @property
    def stock_layers(self):
        """The layers that the patch left as they were, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, InfiniLayer)}

    @property
    def seen(self):
        """`tuple[int, ...]`: valid tokens read, for each row; empty before the first."""
        return next(iter(self.infini_layers.values())).seen

    @property
    def columns(self):
        """`int`: columns read, padding included."""
        return next(iter(self.infini_layers.values())).columns

    @property
    def batch_size(self):
        """`int`: rows, or -1 before the first token."""
        return len(self.seen) or -1

    def check_whole(self):
        """Raise if a forward was interrupted between layers.

        Raises:
            ValueError: when the layers have not all read the same tokens.
        """
        rows = {layer.seen for layer in self.infini_layers.values()}
        columns = {layer.get_seq_length() for layer in self.layers}
        if len(columns) > 1 or len(rows) > 1:
            raise ValueError(
                f"the layers of this cache have read {sorted(columns)} columns: a forward "
                "was interrupted. Reset the cache (cache.reset()), or read with infini_hf.prefill, which undoes a "
                "broken chunk"
            )

    @property
    def is_split(self):
        """`bool`: whether the rows are split over ranks, each of which reads a part of them."""
        return False

    def begin(self, batch, columns, valid, device):
        """Called before the layers read `columns` of `batch` rows: valid tokens read, for each row.

        Args:
            batch (`int`): rows of the call.
            columns (`int`): columns of the call.
            valid (`torch.Tensor`, *optional*): `(batch, columns)` bool, false at padding.
            device (`torch.device`): where the tokens are.

        Returns:
            `tuple[int, ...]`
        """
        return self.seen or (0,) * batch

    def get_seq_length(self, layer_idx=0):
        return super().get_seq_length(layer_idx) - self.hidden_columns

    def fetch(self, layer_idx):
        """The state of a layer, on its device; the next layer's transfer is started when the cache is offloaded."""
        layer = self.layers[layer_idx]
        if self.offloading and layer.is_initialized and layer.device.type != "cpu":
            torch.cuda.default_stream(layer.device).wait_stream(self.prefetch_stream)
            layer.prefetch()
            # What this stream brings back, the other may still be taking away.
            self.prefetch_stream.wait_stream(torch.cuda.default_stream(layer.device))
            self.prefetch(layer_idx + 1, self.only_non_sliding)
        return layer

    def settle(self):
        """Wait for layers of an offloaded cache that are on their way, to the device or off it."""
        if self.offloading:
            torch.cuda.synchronize()

    def stow(self, layer_idx):
        """Take a layer's state off the device when the cache is offloaded."""
        if self.offloading:
            self.offload(layer_idx, self.only_non_sliding)

    def detach(self):
        """Cut the state from the graph that computed it: what truncated backpropagation does between steps."""
        for layer in self.layers:
            if isinstance(layer, InfiniLayer):
                layer.detach()
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def reset(self):
        """Forget everything; the object stays."""
        for layer in self.infini_layers.values():
            layer.reset()
        for index, layer in self.fresh.items():
            self.layers[index] = copy.copy(layer)
        # The next reader may be another model, with other positions.
        self.padding = self.reader = self.rope = None
        self.padding_end = self.hidden_columns = 0
        self.notes = {}

    def reset_rows(self, rows):
        """Forget some rows, as where a new document begins in them; the others stay.

        Args:
            rows (`torch.Tensor`): `(batch,)` bool, true for the rows to forget.

        Raises:
            ValueError: when the cache holds another number of rows.
        """
        if not self.seen:
            return
        if rows.shape != (len(self.seen),):
            raise ValueError(f"rows of shape {tuple(rows.shape)}: the cache holds {len(self.seen)} rows")
        if not bool(rows.any()):
            return
        if bool(rows.all()):
            self.reset()
            return
        self.settle()
        for layer in self.infini_layers.values():
            layer.reset_rows(rows)
        if self.fresh:
            # Stock layers cannot drop a row's columns: from here on they are padding.
            held = max(layer.get_mask_sizes(1)[0] - 1 for layer in self.stock_layers.values())
            padding = torch.ones(rows.shape[0], held, dtype=torch.bool, device=rows.device)
            if self.padding is not None:
                known = self.known_padding
                known = known[:, max(0, known.shape[1] - held) :].to(rows.device)
                padding[:, held - known.shape[1] :] = known
            self.padding, self.padding_end = padding & ~rows[:, None], self.columns

    @property
    def known_padding(self):
        """`(batch, n)` bool or `None`: `padding` of what was read, without the columns of a call that failed."""
        if self.padding is None:
            return None
        return self.padding[:, : self.padding.shape[1] - (self.padding_end - self.columns)]

    def tensors(self):
        """The state as a tuple of tensors, for a function that must take and return it: see [`with_tensors`]."""
        return tuple(
            getattr(layer, name) for layer in self.layers if layer.is_initialized for name in tensor_names(layer)
        )

    def with_tensors(self, tensors):
        """A copy of this cache that holds `tensors`, as from [`tensors`], in place of its own."""
        twin, remaining = copy.copy(self), iter(tensors)
        for layer in twin.layers:
            if layer.is_initialized:
                for name in tensor_names(layer):
                    setattr(layer, name, next(remaining))
        return twin

    def reorder_cache(self, beam_idx):
        self.settle()
        super().reorder_cache(beam_idx)
        self._select_padding(beam_idx)

    def batch_select_indices(self, indices):
        self.settle()
        super().batch_select_indices(indices)
        self._select_padding(indices)

    def batch_repeat_interleave(self, repeats):
        self.settle()
        super().batch_repeat_interleave(repeats)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(repeats, dim=0)

    def _select_padding(self, index):
        if self.padding is not None:
            self.padding = self.padding[torch.as_tensor(index).to(self.padding.device)]

    def crop(self, tokens_to_remove):
        raise NotImplementedError(CROP_REFUSED)

    def __getstate__(self):
        # A weak reference cannot be pickled, and the model is not the cache's to carry.
        return {**self.__dict__, "reader": None}

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __copy__(self):
        """A cache of its own that shares the tensors, which nobody changes."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.notes = copy.deepcopy(self.notes)
        return twin

    def restore(self, earlier):
        """Go back to an earlier copy of this cache; the notes stay."""
        self.__dict__.update({**copy.copy(earlier).__dict__, "notes": self.notes})

    def state_bytes(self):
        """`int`: bytes of all tensors of the state."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def save_pretrained(self, directory):
        """Write a memory snapshot; see [`infini_hf.snapshot.save_snapshot`]."""
        from .snapshot import save_snapshot

        save_snapshot(self, directory)

    @classmethod
    def from_pretrained(cls, directory, model):
        """Read a memory snapshot for `model`; see [`infini_hf.snapshot.load_snapshot`]."""
        from .snapshot import load_snapshot

        return load_snapshot(cls(model.config), directory, model)
