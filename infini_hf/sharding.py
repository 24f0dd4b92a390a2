"""Parameters that several ranks hold together."""

import contextlib

from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters, modifier_rank=None):
    """A context in which parameters that ZeRO-3 divides over the ranks are whole: every rank has to enter it.

    What is written to them stays where `modifier_rank` is the rank that wrote; other parameters are as they are.

    Args:
        parameters (`list[torch.nn.Parameter]`): any of the model.
        modifier_rank (`int`, *optional*): the rank whose values all have afterwards; by default none writes.
    """
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
