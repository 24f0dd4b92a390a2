"""What the arithmetic says of a contender: its shape, the FLOPs of a token, and what grows with a context."""

from dataclasses import replace

from .arithmetic import decode_bytes, forward_flops, mean_keys, window_bytes
from .contenders import parse_contender


def shape_of(text, settings):
    """The [`Shape`] of a contender's model."""
    name, options = parse_contender(text)
    heads = settings.heads if name == "package" else options.get("kv_heads", settings.kv_heads)
    return replace(settings.shape, kv_heads=heads)


def token_flops(text, settings, tokens):
    """FLOPs of a token, the mean over an input of so many: forward, without the head, half of a causal square.

    Args:
        text (`str`): the contender.
        settings ([`BenchmarkSettings`]): of the benchmark.
        tokens (`int`): length of the input.
    """
    name, options = parse_contender(text)
    shape, segment = shape_of(text, settings), settings.segment_length
    # The first segment has nothing behind it: no overlap, and a memory that is empty.
    later = max(0.0, 1 - segment / tokens)
    if name == "infini":
        carried = options.get("overlap", 0) + options.get("sink_tokens", 0)
        rule = options.get("memory_update", "linear")
        return forward_flops(shape, mean_keys(segment, later * carried), rule, later)
    if name == "package":
        return forward_flops(shape, mean_keys(segment), "delta" if options.get("delta") else "linear", later)
    if name == "window":
        width = min(options.get("width", segment), tokens)
        return forward_flops(shape, width - width * (width - 1) / (2 * tokens))
    return forward_flops(shape, mean_keys(segment if name == "blocks" else tokens))


def context_bytes(text, settings, tokens):
    """Bytes of keys and values that a contender holds of a context, before they are quantised."""
    name, _ = parse_contender(text)
    grows = name in ("full", "quantized")
    return window_bytes(shape_of(text, settings), tokens, settings.number_bytes) if grows else 0


def work(cell, settings):
    """What the time of a [`Cell`] is in proportion to, for cells of one measure and contender."""
    if cell.measure == "read_on":
        return 1.0
    if cell.measure == "decode":
        moved = decode_bytes(shape_of(cell.contender, settings), settings.segment_length, 0, settings.number_bytes)
        return sum(moved.values()) + context_bytes(cell.contender, settings, cell.tokens)
    return cell.tokens * token_flops(cell.contender, settings, cell.tokens)


def projected_seconds(seconds, measured, cell, settings):
    """Seconds of a run of `cell`, from those of a shorter one."""
    return seconds * work(cell, settings) / work(measured, settings)
