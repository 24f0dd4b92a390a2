"""Parameters that several ranks hold together."""

import contextlib

from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters):
    """A context in which parameters that ZeRO-3 divides over the ranks are whole, to be read: every rank enters it.

    Args:
        parameters (`list[torch.nn.Parameter]`): any of the model.
    """
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters)
