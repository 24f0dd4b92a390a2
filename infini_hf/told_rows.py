"""What layers ask and write of rows whose answers have known sources, gathered once for fitting projections to it."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .cache import InfiniCache, infini_config_of
from .projections import watched
from .retrieval_supervision import told_tokens
from .streaming import PATIENCE, prefill


@dataclass
class ToldRow:
    """One row as the memory of some layers meets it.

    Attributes:
        ids (`torch.Tensor`): `(seq_len,)` int64.
        target (`torch.Tensor`): `(n,)` int64: the columns that the n told tokens are to be read from.
        held (`torch.Tensor`): `(n, seq_len)` bool: what the memory holds when each of them is asked for.
        queries (`dict`): by layer, `(num_heads, n, head_dim)` float16 or float32, uncentered, of the tokens that ask.
        keys (`dict`): by layer, `(num_kv_heads, seq_len, head_dim)`, likewise, of the whole row.
    """

    ids: torch.Tensor
    target: torch.Tensor
    held: torch.Tensor
    queries: dict
    keys: dict


def read_told_rows(inner, layers, rows, progress=True):
    """Read rows, each with a memory of its own, and keep what the layers project; rows that are told nothing are left.

    Args:
        inner (`PreTrainedModel`): the patched causal model.
        layers (`list[InfiniAttention]`): the layers to look at.
        rows (iterable of `dict`): `input_ids` and `sources`, `(seq_len,)` int64, the latter the column of the token
            that each token repeats, or -1.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar when it takes more than two seconds.

    Returns:
        `list[ToldRow]`
    """
    found = []
    rows = [{name: torch.as_tensor(row[name]) for name in ("input_ids", "sources")} for row in rows]
    length = infini_config_of(inner.config).segment_length
    for row in tracked(rows, progress):
        _, asked, target, segment, _ = told_tokens(row["sources"][None], None, (), length)
        if not len(asked):
            continue
        states = {layer.layer_idx: ([], []) for layer in layers}

        def note(layer, *projected, states=states):
            for parts, part in zip(states[layer.layer_idx], projected, strict=True):
                parts.append(part[0].detach())

        with watched(layers, note):
            prefill(inner, row["input_ids"][None], cache=InfiniCache(inner.config), progress=False)
        states = {index: [torch.cat(parts, dim=1).cpu() for parts in pair] for index, pair in states.items()}
        found.append(
            ToldRow(
                row["input_ids"].cpu(),
                target,
                segment[0] < segment[0, asked, None],
                {index: compact(queries[:, asked]) for index, (queries, _) in states.items()},
                {index: compact(keys) for index, (_, keys) in states.items()},
            )
        )
    return found


def thinned(row, known, share, generator):
    """A row without some of its filler.

    Args:
        row ([`ToldRow`]): the row.
        known (`torch.Tensor`): `(seq_len,)` bool: the columns that stay, sources among them.
        share (`float`): how much of the other columns is drawn to stay too.
        generator (`torch.Generator`): what they are drawn with.

    Returns:
        `tuple`: the [`ToldRow`], and which of its columns are known, bool.
    """
    stay = known | (torch.rand(len(known), generator=generator) < share)
    keys = {index: states[:, stay] for index, states in row.keys.items()}
    target = (stay.cumsum(0) - 1)[row.target]
    return ToldRow(row.ids[stay], target, row.held[:, stay], row.queries, keys), known[stay]


def compact(states):
    """In half precision where it can hold them: channels of pretrained models may be large for every token."""
    half = states.half()
    return half if half.isfinite().all() else states.float()


def tracked(items, progress, description="reading"):
    """The items, with a progress bar when they take more than two seconds."""
    return tqdm(items, desc=description, disable=not progress, delay=PATIENCE)
