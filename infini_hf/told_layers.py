"""Which layers a loss on what the memory returns is for, how far its gradient goes, and what was found meanwhile."""

import torch

from .attention import InfiniAttention


class ToldLayers:
    """What counts for how much, in which layers.

    Args:
        weight (`float`): what it counts for each told token, beside the loss of one token.
        layers (`list[int]`, *optional*): indices of the patched layers that are told; all of them by default.
        reach (`str`, *optional*, defaults to `"model"`): how far the gradient goes: `"model"`, to every weight below,
            or `"projections"`, to the memory's own projections of the layers that are told, and no further.
    """

    # What the options and the logged share are called.
    NAME = "retrieval"

    def __init__(self, weight, layers=None, reach="model"):
        self.weight, self.layers, self.reach = weight, layers, reach
        self.restart()

    def restart(self):
        """Begin to count anew."""
        # The sum of the shares of the sources, and their number: of the step, on this rank, and of all since a log.
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
        """What is logged: the mean share of the sources since this was last asked."""
        total, count = self.noted.tolist()
        self.noted.zero_()
        return {f"{self.NAME}_share": total / count} if count else {}
