"""What a result is held against: the same weights with the memory closed, over windows of any size."""

from contextlib import contextmanager
from dataclasses import replace

from ..cache import InfiniCache, infini_config_of
from ..gate import MemoryGate
from ..streaming import require_patched


@contextmanager
def closed_memory(model):
    """Every gate at exactly nothing inside the `with`: block-local attention of the same weights.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.

    Raises:
        ValueError: when the model is not patched.
    """
    require_patched(model)
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    before = [gate.closed for gate in gates]
    for gate in gates:
        gate.closed = True
    try:
        yield model
    finally:
        for gate, closed in zip(gates, before, strict=True):
            gate.closed = closed


@contextmanager
def another_window(model, patch):
    """The model in another window inside the `with`, with the memory that it has; caches belong inside too.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        patch ([`InfiniConfig`]): the model's own, but for `segment_length`, `overlap` and `sink_tokens`.

    Raises:
        ValueError: when the model is not patched.
    """
    config = require_patched(model).get_decoder().config.get_text_config(decoder=True)
    own = config.infini_attention
    config.infini_attention = patch.to_dict()
    try:
        yield model
    finally:
        config.infini_attention = own


@contextmanager
def local_attention(model, segment_length=None, overlap=0, sink_tokens=0):
    """The memory closed and the window another, inside the `with`; caches belong inside too.

    Blocks with `overlap=0`; a Transformer-XL (arXiv 1901.02860) with `overlap` of a segment; full attention, as the
    stock model has it, with a segment as long as the text.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        segment_length (`int`, *optional*): tokens in a segment; by default the model's.
        overlap (`int`, *optional*, defaults to `0`): tokens of the segment before that stay visible.
        sink_tokens (`int`, *optional*, defaults to `0`): first tokens of a text that stay visible.

    Raises:
        ValueError: when the model is not patched, or the window is none.
    """
    patch = infini_config_of(require_patched(model).config)
    length = patch.segment_length if segment_length is None else segment_length
    window = replace(patch, segment_length=length, overlap=overlap, sink_tokens=sink_tokens)
    with closed_memory(model), another_window(model, window):
        yield model


def local_start(config, tokens):
    """The first of `tokens` tokens that can matter to what follows them while the memory is closed.

    A layer with overlap looks back to the start of the segment before at most, and a sliding layer as far as its
    window, so that what lies further back than all layers together look is out of reach. Reading from here, a segment
    boundary, is then exact, and costs the same at any length.

    Args:
        config (`PreTrainedConfig`): the config of a patched model.
        tokens (`int`): tokens that are to be read.

    Returns:
        `int`
    """
    cache = InfiniCache(config)
    length, overlap = cache.infini_config.segment_length, cache.infini_config.overlap
    stock = cache.stock_layers.values()
    if cache.infini_config.sink_tokens or not all(layer.is_sliding for layer in stock):
        # The first tokens stay in sight.
        return 0
    reach = sum(layer.sliding_window for layer in stock)
    if overlap or stock:
        reach += len(cache.infini_layers) * (length + overlap)
    # The segment of the last token is read in any case.
    open_segment = max(0, tokens - 1) // length * length
    return max(0, open_segment - reach) // length * length
