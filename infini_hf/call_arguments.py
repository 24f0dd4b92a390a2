"""What a call of a patched decoder brings beside its tokens: read, or refused where no memory can honour it."""

import torch


def read_padding(attention_mask, batch, columns, past, cache):
    """Padding of the call as `(batch, columns)` bool, or `None` when nobody spoke of any.

    Raises:
        NotImplementedError: for a mask that is not two-dimensional.
        ValueError: for one that fits neither the call nor the call with everything before it.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        shape = (
            tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise NotImplementedError(
            f"attention_mask of {shape}: Infini-attention takes a padding mask of two dimensions (batch, tokens); "
            "packed or custom attention patterns are not supported, give each document a row of its own"
        )
    hidden = 0 if cache is None else cache.hidden_columns
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (
        columns,
        past + columns,
        past + columns - hidden,
    ):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: the call has {batch} rows of {columns} tokens "
            f"after {past}; the mask must cover the {columns} new columns, or all {past + columns}"
        )
    if columns > 1 and past and not hidden and attention_mask.shape[1] == past + columns:
        check_past(attention_mask[:, :past], cache)
    return attention_mask[:, -columns:].bool() if columns else attention_mask[:, :0].bool()


def read_scale(scale, config, batch, device):
    """How many times segments are written, `(batch, n)` float32, or `None` for once.

    Raises:
        ValueError: when it does not fit the batch or holds what is no number of writes, or the update rule is not
            linear.
    """
    if scale is None:
        return None
    if config.memory_update != "linear":
        raise ValueError(
            f"memory_scale with memory_update={config.memory_update!r}: a scaled write equals repeated ones under the "
            "linear rule alone; patch with memory_update='linear', or leave memory_scale out"
        )
    if not isinstance(scale, torch.Tensor) or scale.ndim not in (1, 2) or scale.shape[0] != batch:
        what = tuple(scale.shape) if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise ValueError(f"memory_scale of {what}: must be a tensor (batch,) or (batch, segments) for {batch} rows")
    scale = scale.to(dtype=torch.float32)
    wrong = scale[~((scale > 0) & scale.isfinite())]
    if wrong.numel():
        raise ValueError(
            f"memory_scale={wrong[0].item()}: must be a finite number above 0, how many times a segment is written; 1 "
            "is once. A segment that is not written would leave an empty memory to be read: leave it out of the text"
        )
    scale = scale.to(device)
    return scale[:, None] if scale.ndim == 1 else scale


def check_past(past_mask, cache):
    """What the mask says of the past must be what was read: it cannot be unread.

    Raises:
        ValueError: names both counts.
    """
    said = tuple(past_mask.bool().sum(1).tolist())
    if said != cache.seen:
        raise ValueError(
            f"attention_mask says that {list(said)} of the earlier tokens of each row are real, and the cache has "
            f"read {list(cache.seen)}: pass the mask that was used then, or that of the new tokens alone"
        )


def check_positions(positions, mask, columns):
    """Refuse position ids that do not go on by one inside a row: a packed document may begin at any of them.

    Where a row begins to count does not matter: RoPE tells distances, and tokens are counted by the cache.

    Raises:
        NotImplementedError: names the first two that do not follow one another.
    """
    if positions is None or columns < 2:
        return
    jumps = positions[:, 1:] != positions[:, :-1] + 1
    if mask is not None:
        jumps = jumps & mask[:, 1:] & mask[:, :-1]
    if bool(jumps.any()):
        row, column = jumps.nonzero()[0].tolist()
        # One row of positions may stand for all.
        before, after = positions[min(row, positions.shape[0] - 1), column : column + 2].tolist()
        raise NotImplementedError(
            f"position_ids go from {before} to {after} inside a row, as where documents are packed into one: their "
            "memories would mix. Give each document a row of its own (padded rows are fine), or join them into one "
            "text on purpose and leave position_ids out"
        )


def check_packing(kwargs):
    """Refuse the arguments by which several texts lie in one row.

    Raises:
        NotImplementedError: names them.
    """
    found = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(name) is not None]
    if found:
        raise NotImplementedError(
            f"{found[0]} says that several texts lie in one row, as in packed batches and in generate_batch "
            "(continuous batching): their memories would mix. Give each text a row of its own; padded rows are fine"
        )


def check_reader(cache, decoder):
    """Raise for a cache that another model has filled, one that is gone included.

    Raises:
        ValueError: with the way from one model to an equal one.
    """
    reader = decoder if cache.reader is None else cache.reader()
    if reader is not decoder:
        which = "another model" if reader is not None else "a model that is gone"
        raise ValueError(
            f"this cache was filled by {which}, whose memory means nothing here: make a cache for each model, or "
            "carry it over between equal models with cache.save_pretrained, while the first is there, and "
            "InfiniCache.from_pretrained; else read the text again"
        )
