"""What losses on the shares of the compressive memory have in common: the layers they are for, and watching these."""

import logging

import torch

from . import memory as memory_math
from .attention import InfiniAttention

logger = logging.getLogger(__name__)


class ToldLayers:
    """What it counts that the memory of some layers returns the right tokens.

    Args:
        weight (`float`): what it counts for each told token, beside the loss of one token; 0 is off.
        layers (`list[int]`, *optional*): indices of the patched layers that are told; all of them by default.
        reach (`str`, *optional*, defaults to `"model"`): how far the gradient goes: `"model"`, to every weight below,
            or `"projections"`, to the memory's own projections of the layers that are told, and no further.

    Attributes:
        shares (`torch.Tensor`): `(2,)` float32: of the step, on this rank, the sum of the shares that the memory gave
            to what it should return, and the number of the told tokens.
        noted (`torch.Tensor`): `(2,)` float64: the same of all ranks and all steps since a log.
    """

    # What the options and the logged share are called, and what to do where no token is told of anything.
    NAME = REMEDY = None

    def __init__(self, weight, layers=None, reach="model"):
        self.weight, self.layers, self.reach, self.warned = weight, layers, reach, False
        self.shares, self.noted = torch.zeros(2), torch.zeros(2, dtype=torch.float64)

    def layers_of(self, model):
        """The patched layers that are told.

        Raises:
            ValueError: names the indices that are no patched layers, or have no projections where these are all
                that is to learn.
        """
        patched = {module.layer_idx: module for module in model.modules() if isinstance(module, InfiniAttention)}
        wanted = sorted(patched) if self.layers is None else sorted(set(self.layers))
        absent = sorted(set(wanted) - set(patched))
        if absent or not wanted:
            raise ValueError(
                f"{self.NAME}_layers={self.layers}: {absent or 'none'} are not among the patched {sorted(patched)}: "
                "name patched layers, or leave it out for all"
            )
        bare = [index for index in wanted if patched[index].memory_gate.query_projection is None]
        if self.reach == "projections" and bare:
            raise ValueError(
                f"retrieval_reach='projections': the memory of layers {bare} has no projections that could learn: "
                f"call infini_hf.calibration.add_memory_projections first, or name others in {self.NAME}_layers"
            )
        return [patched[index] for index in wanted]

    def note(self, shares):
        """Count the shares of a step, of all ranks together, `(2,)`."""
        self.noted += shares.cpu().double()
        self.shares.zero_()

    def metrics(self):
        """What is logged: the mean share since this was last asked. Where there is none, it is said once why."""
        total, count = self.noted.tolist()
        self.noted.zero_()
        if self.weight and not count and not self.warned:
            found = f"{self.NAME}_weight={self.weight:g}, and no token of the steps before this log "
            logger.warning("%s%s", found, self.REMEDY)
        self.warned = True
        return {f"{self.NAME}_share": total / count} if count else {}


class ToldReading:
    """A micro-batch that is read segment after segment while the queries and keys of some layers are watched.

    Args:
        config ([`InfiniConfig`], *optional*): that of the patched model.
        layers (`int`, *optional*, defaults to 0): how many layers are told; of none, it hands on what it is told.
        reach (`str`, *optional*, defaults to `"model"`): as in [`ToldLayers`].
        watch (`Callable`, *optional*): told of each segment as well.

    Attributes:
        loss (`torch.Tensor` or `float`): the sum of what the told tokens cost, the mean over the layers.
        shares (`torch.Tensor`): `(2,)` float32, the sum of the shares and the number of the told tokens.
    """

    def __init__(self, config=None, layers=0, reach="model", watch=None):
        self.config, self.layers, self.reach, self.watch = config, layers, reach, watch
        # No segment has begun: ranks may read filling first.
        self.index, self.norms = None, {}
        self.loss, self.shares = 0.0, torch.zeros(2)

    def begin(self, index, cache):
        """Called before segment `index` (`int`) with the cache that enters it."""
        if self.watch is not None:
            self.watch(index, cache)
        self.index = index
        self.norms = {layer_index: layer.memory_norm for layer_index, layer in cache.infini_layers.items()}
        if self.layers and index and is_cut(cache):
            # The gradient does not go around it.
            self.cut()

    def note(self, layer, queries, keys):
        """Called by each layer with what it has projected of the segment, before RoPE, in the graph of autograd.

        Args:
            layer ([`InfiniAttention`]): the layer.
            queries (`torch.Tensor`): `(batch, num_heads, columns, head_dim)`, any floating dtype.
            keys (`torch.Tensor`): `(batch, num_kv_heads, columns, head_dim)`, likewise.
        """
        if self.index is None or not self.layers:
            return
        if self.reach == "projections":
            queries, keys = queries.detach(), keys.detach()
        with memory_math.no_autocast(queries):
            self.note_segment(layer, queries, keys)

    def add(self, loss, share, count):
        """Add what `count` (`int`) told tokens cost in one layer, and the sum of their shares, scalars."""
        device = self.shares.device
        self.loss = self.loss + loss.to(device) / self.layers
        self.shares += torch.stack([share.detach(), share.new_tensor(count)]).to(device) / self.layers


def is_cut(cache):
    """`bool`: whether no gradient goes back through the state of a cache."""
    return not any(torch.is_tensor(tensor) and tensor.requires_grad for tensor in cache.tensors())
