"""Padding between two tokens of a row, which layers that the patch leaves stock count as tokens."""

import logging

import torch

logger = logging.getLogger(__name__)


def warn_of_inner_padding(decoder, padding, columns, cache):
    """Stock sliding layers count columns: padding between two tokens of a row takes places in their window.

    `padding` is `(batch, held + columns)` bool, false at padding, or `None`. What stands right of a row's last token
    does no harm.
    """
    if padding is None or bool(padding.all()):
        return
    seen = cache.seen if cache is not None and cache.seen else (0,) * padding.shape[0]
    held = padding[:, : padding.shape[1] - columns].sum(1)
    started = (torch.tensor(seen, device=padding.device) > held)[:, None] | (padding.long().cumsum(1) > 0)
    inner = (started & ~padding).long().cumsum(1) > 0
    if bool((inner & padding)[:, -columns:].any()):
        logger.warning(
            "padding between the tokens of a row: the layers of %s that the patch leaves stock count it in their "
            "window, so such a row is not exactly the row alone; read rows of different length in caches of their own",
            type(decoder).__name__,
        )
