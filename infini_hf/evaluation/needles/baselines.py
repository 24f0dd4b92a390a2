"""The same weights without a memory, which read in a way of their own: the window, blocks, a Transformer-XL, all."""

from contextlib import contextmanager

from ...cache import infini_config_of
from ..controls import closed_memory, local_attention, local_start

BASELINES = ("window", "local", "txl", "full")


@contextmanager
def baseline(model, name, tokens, room):
    """The model as one of `BASELINES` inside the `with`; it is given the first token that has to be read.

    Args:
        model (`PreTrainedModel`): a patched model.
        name (`str`): `"window"` (the model's own window), `"local"` (blocks of a segment), `"txl"` (a segment of
            overlap) or `"full"` (full attention).
        tokens (`int`): tokens of a stream.
        room (`int`): tokens of the longest question with its answer.
    """
    if name == "window":
        with closed_memory(model):
            yield local_start(model.config, tokens)
        return
    if name == "full":
        # One segment that holds it all: within a segment a patched model is the stock one.
        window = {"segment_length": tokens + room}
    else:
        length = infini_config_of(model.config).segment_length
        window = {"segment_length": length, "overlap": length if name == "txl" else 0}
    with local_attention(model, **window):
        yield local_start(model.config, tokens)
