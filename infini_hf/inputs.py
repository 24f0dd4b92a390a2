"""Token ids as users hand them in: a tensor, a list, or a stream of pieces, checked before any work is done."""

import itertools
import logging
from collections.abc import Mapping

import numpy as np
import torch

logger = logging.getLogger(__name__)


def refuse_mapping(ids):
    """What a tokenizer returns is a mapping, and iterating it gives names."""
    if isinstance(ids, Mapping):
        raise TypeError(f"ids of type {type(ids).__name__}: pass its ids, as in tokenizer(text)['input_ids']")


def as_batch(ids, vocabulary):
    """One piece of input as a `(batch, seq_len)` int64 tensor.

    Raises:
        TypeError: when it holds no token ids.
        ValueError: when an id is outside the vocabulary, or rows differ in length.
    """
    refuse_mapping(ids)
    if not isinstance(ids, torch.Tensor):
        try:
            ids = torch.tensor(ids)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"ids of type {type(ids).__name__}: pass token ids, as a tensor or a list ({error})"
            ) from error
        ids = ids.long() if ids.numel() == 0 else ids
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids of dtype {ids.dtype}: token ids are whole numbers")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"ids of shape {tuple(ids.shape)}: must be (batch, seq_len)")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(
            f"ids from {int(ids.min())} to {int(ids.max())}: the model's vocabulary has ids 0 to {vocabulary - 1}; "
            "was the text tokenised with another tokenizer?"
        )
    return ids.long()


def check_mask(attention_mask, ids):
    """A padding mask that fits `ids`, or `None`."""
    if attention_mask is None:
        return None
    mask = torch.as_tensor(attention_mask)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: must be that of ids, {tuple(ids.shape)}")
    return mask


def warn_of_padding(ids, pad, ends):
    """Say that rows which begin with the padding token are read as text, where no mask says otherwise.

    Args:
        ids (`torch.Tensor`): `(batch, seq_len)` int64.
        pad (`int`, *optional*): the padding token.
        ends (`list[int]`): tokens that end a text; one of them that pads, too, may be meant.
    """
    rows = [] if pad is None or pad in ends or len(ids) == 1 else (ids[:, 0] == pad).nonzero()[:, 0].tolist()
    if rows:
        logger.warning(
            f"rows {rows} begin with the padding token {pad}, and without attention_mask it is read as text and "
            "written to the memory: pass the tokenizer's attention_mask"
        )


def refuse_right_padding(mask):
    """Raise where a row ends in padding: what continues it would be predicted from there.

    Args:
        mask (`torch.Tensor`): `(batch, seq_len)`, 0 at padding.

    Raises:
        ValueError: names the rows.
    """
    rows = (mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"attention_mask ends in padding in rows {rows}: generation goes on from the last column; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )


def check_size(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")


def stream_chunks(ids, attention_mask, chunk_size, vocabulary):
    """Pairs of ids and mask, `(batch, at most chunk_size)`, and the number of columns if it is known."""
    refuse_mapping(ids)
    whole = isinstance(ids, (torch.Tensor, np.ndarray)) or (
        isinstance(ids, (list, tuple)) and not any(isinstance(piece, (torch.Tensor, np.ndarray)) for piece in ids)
    )
    if whole:
        ids = as_batch(ids, vocabulary)
        mask = check_mask(attention_mask, ids)
        masks = itertools.repeat(None) if mask is None else mask.split(chunk_size, dim=1)
        return zip(ids.split(chunk_size, dim=1), masks, strict=False), ids.shape[1]
    if attention_mask is not None:
        raise ValueError(
            "attention_mask with an iterator of ids: padding is read from one tensor; pass ids as a tensor"
        )
    return gather_pieces(ids, chunk_size, vocabulary), None


def gather_pieces(pieces, chunk_size, vocabulary):
    """Join an iterator of pieces of any size into chunks of `chunk_size` columns."""
    held, count = [], 0
    for piece in pieces:
        piece = as_batch(piece, vocabulary)
        if held and piece.shape[0] != held[0].shape[0]:
            raise ValueError(
                f"a piece of {piece.shape[0]} rows after pieces of {held[0].shape[0]}: rows keep their places"
            )
        held.append(piece)
        count += piece.shape[1]
        while count >= chunk_size:
            joined = torch.cat(held, dim=1)
            yield joined[:, :chunk_size], None
            held, count = [joined[:, chunk_size:]], count - chunk_size
    if count:
        yield torch.cat(held, dim=1), None


def input_device(inner):
    """Where token ids go, also when accelerate keeps the embeddings elsewhere between calls."""
    embeddings = inner.get_input_embeddings()
    hook = vars(embeddings).get("_hf_hook")
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return embeddings.weight.device
