"""The arithmetic as tables: parts of a layer, prefill, decoding and memory, for a shape and a segment length."""

from .arithmetic import (
    FLOAT32,
    MEMORY_PARTS,
    decode_bytes,
    layer_parts,
    predicted_crossover,
    predicted_overhead,
    predicted_speedup,
    state_bytes,
    window_bytes,
)

LENGTHS = (8_192, 32_768, 131_072, 1_048_576)
MIB = 2**20


def markdown(heads, rows, aligned=False):
    """Lines of a markdown table; `aligned` pads its cells, for a reader of plain text."""
    cells = [heads, *rows]
    if aligned:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells = [
            [cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs)]
            for pairs in (list(zip(row, widths, strict=True)) for row in cells)
        ]
    rules = ["-" * max(3, len(head) + 2) if aligned else "---" for head in cells[0]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "|".join(rules) + "|", *lines[1:]]


def layer_table(shape, segment_length, carried=0, number=FLOAT32):
    """What each part of one layer does for one token, and its share of the layer.

    Args:
        shape ([`Shape`]): the model.
        segment_length (`int`): tokens of a segment.
        carried (`int`, *optional*, defaults to 0): sinks and overlap.
        number (`int`, *optional*, defaults to 4): bytes of a weight or an activation.

    Returns:
        `list[str]`: lines of markdown; the delta rule's write stands below the sum, instead of the linear one.
    """
    parts = layer_parts(shape, segment_length, carried, number=number)
    flops, moved = (sum(getattr(part, name) for part in parts.values()) for name in ("flops", "bytes"))
    memory = [parts[name] for name in MEMORY_PARTS]
    rows = {
        **parts,
        "**all**": type(memory[0])(flops, moved),
        "the memory alone": type(memory[0])(sum(part.flops for part in memory), sum(part.bytes for part in memory)),
        "write, delta rule": layer_parts(shape, segment_length, carried, "delta", number)["write"],
    }
    return markdown(
        ["part of a layer", "MFLOP a token", "share", "KiB a token", "share"],
        [
            [
                name,
                f"{part.flops / 1e6:,.3f}",
                f"{100 * part.flops / flops:.2f} %",
                f"{part.bytes / 1024:,.2f}",
                f"{100 * part.bytes / moved:.2f} %",
            ]
            for name, part in rows.items()
        ],
        aligned=True,
    )


def prefill_table(shape, segment_length, lengths=LENGTHS):
    """FLOPs of a prefill over those of blocks, and those of full attention over it, as lines of markdown."""
    overlap = segment_length // 8
    kinds = {
        "linear": (0, "linear"),
        "delta": (0, "delta"),
        f"linear, overlap {overlap:,}": (overlap, "linear"),
        f"linear, overlap {segment_length:,}": (segment_length, "linear"),
    }
    rows = [
        [
            name,
            f"{predicted_overhead(shape, segment_length, *kind):.4f}",
            f"{predicted_crossover(shape, segment_length, *kind):,}",
            *(f"{predicted_speedup(shape, segment_length, tokens, *kind):.2f}" for tokens in lengths),
        ]
        for name, kind in kinds.items()
    ]
    heads = [f"full at {tokens:,}" for tokens in lengths]
    return markdown(["memory", "over blocks", "full costs more from", *heads], rows, aligned=True)


def decode_table(shape, segment_length, number=FLOAT32, lengths=LENGTHS):
    """MiB that a decoded token moves, under Infini-attention and under full attention, as lines of markdown."""
    rows = []
    for context in lengths:
        moved = decode_bytes(shape, segment_length, context, number)
        ours = moved["weights"] + moved["window"] + moved["memory"]
        full = moved["weights"] + moved["full cache"]
        values = [moved[name] / MIB for name in ("weights", "window", "memory", "full cache")]
        rows.append([f"{context:,}", *(f"{value:,.1f}" for value in values), f"{full / ours:.2f}"])
    return markdown(["context", "weights", "window", "M and z", "full cache", "full / Infini"], rows, aligned=True)


def memory_table(shape, segment_length, number=FLOAT32, lengths=LENGTHS):
    """MiB that a stream holds, under Infini-attention and under full attention, as lines of markdown."""
    window, state = window_bytes(shape, segment_length, number), state_bytes(shape)
    rows = []
    for context in lengths:
        full = window_bytes(shape, context, number)
        values = [f"{size / MIB:,.1f}" for size in (state, window, full)]
        rows.append([f"{context:,}", *values, f"{full / (state + window):,.1f}"])
    return markdown(["tokens read", "M and z", "a full window", "full cache", "full / Infini"], rows, aligned=True)


def arithmetic_lines(shape, segment_length, number, title):
    """All tables of one shape, with headings, as lines of markdown."""
    return [
        f"## {title}, segments of {segment_length:,}, {number} bytes a number",
        "",
        *layer_table(shape, segment_length, number=number),
        "",
        "FLOPs of a prefill, without the head:",
        "",
        *prefill_table(shape, segment_length),
        "",
        "MiB that a decoded token moves, in the middle of a segment:",
        "",
        *decode_table(shape, segment_length, number),
        "",
        "MiB that a stream holds:",
        "",
        *memory_table(shape, segment_length, number),
    ]
