"""Sequence parallelism: a row over several ranks, each of which reads a run of whole segments.

Ranks exchange the state of the memory, layer by layer, and nothing that grows with the row.
"""

import copy

import torch
from torch import distributed

from .cache import InfiniCache
from .collectives import row_group
from .layer_state import InfiniLayer
from .segment_step import IGNORED, Segment, shift_labels
from .sequence_layer import RowSplit, SequenceParallelLayer

STOCK = (
    "sequence parallelism with layers {} left stock by the patch: a stock layer cannot see the tokens of other ranks; "
    "use data parallelism, or a model whose layers are all patched"
)


class SequenceParallelCache(InfiniCache):
    """An [`InfiniCache`] for a row that is split over several ranks, the same on all of them between calls.

    Each rank calls the model on its run of the row, in the order of the ranks: whole segments, as many as it has, and
    what is left of the row on the last rank that has any. Losses and gradients are those of one process that reads all
    of it; each rank has its own part, and their sum is the whole.

    Args:
        config (`PreTrainedConfig`): the config of a patched model.
        group (`DeviceMesh` or `ProcessGroup`): the ranks of the row: a dimension of a mesh, beside that of data
            parallelism, or a group of processes.

    Raises:
        TypeError: for a group of another kind.
        ValueError: when the config belongs to a model that is not patched, or the mesh has several dimensions.
        NotImplementedError: when the patch leaves layers stock.

    Example:

    ```python
    cache = SequenceParallelCache(model.config, mesh["sequence"])
    loss = model(**shard_row(ids, mesh["sequence"], 2048, labels=ids), past_key_values=cache).loss
    ```
    """

    def __init__(self, config, group):
        super().__init__(config)
        if self.stock_layers:
            raise NotImplementedError(STOCK.format(sorted(self.stock_layers)))
        self.group = row_group(group)
        self.layers = [SequenceParallelLayer(self.infini_config, self.group) for _ in self.layers]

    @classmethod
    def from_cache(cls, cache, group):
        """A cache for `group` with the state of an [`InfiniCache`] that every rank holds alike."""
        if cache.stock_layers:
            raise NotImplementedError(STOCK.format(sorted(cache.stock_layers)))
        if any(type(layer) not in (InfiniLayer, SequenceParallelLayer) for layer in cache.layers):
            raise TypeError(f"cache is a {type(cache).__name__}: pass an InfiniCache, as from cache.to_infini_cache()")
        twin, group = object.__new__(cls), row_group(group)
        twin.__dict__.update(cache.__dict__)
        twin.group, twin.layers, twin.notes = group, [], copy.deepcopy(cache.notes)
        for layer in cache.layers:
            twin.layers.append(SequenceParallelLayer(layer.infini_config, group))
            twin.layers[-1].__dict__.update({**vars(layer), "group": group, "split": None})
        return twin

    def to_infini_cache(self):
        """The same state as an [`InfiniCache`], for what every rank then does alike, such as generation."""
        twin = object.__new__(InfiniCache)
        twin.__dict__.update({name: value for name, value in vars(self).items() if name != "group"})
        twin.layers, twin.notes = [], copy.deepcopy(self.notes)
        for layer in self.layers:
            twin.layers.append(InfiniLayer(layer.infini_config))
            kept = {name: value for name, value in vars(layer).items() if name not in ("group", "split")}
            twin.layers[-1].__dict__.update(kept)
        return twin

    @classmethod
    def from_pretrained(cls, directory, model, group):
        """Read a memory snapshot on every rank; see [`infini_hf.snapshot.load_snapshot`]."""
        return cls.from_cache(InfiniCache.from_pretrained(directory, model), group)

    @property
    def is_split(self):
        """`bool`: whether another rank reads a part of the rows."""
        return self.group.size > 1

    def run_of(self, columns):
        """Which of a row's `columns` this rank reads, a slice."""
        return run_of(columns, self.group, self.infini_config.segment_length)

    def begin(self, batch, columns, valid, device):
        """Agree on who reads what: the tokens read of each row before this rank's run.

        Raises:
            ValueError: on every rank, when runs do not join at segment boundaries, or calls do not belong together.
            NotImplementedError: on every rank, for padding, or rows that have read different numbers of tokens.
        """
        if self.group.size == 1:
            return super().begin(batch, columns, valid, device)
        padded = valid is not None and not bool(valid.all())
        seen = self.seen or (0,) * batch
        said = (batch, columns, seen[0], len(set(seen)) > 1, padded, torch.is_grad_enabled())
        table = self.group.gather([int(number) for number in said], device)
        split = RowSplit(table[0][2], tuple(row[1] for row in table))
        self.check_calls(table)
        self.check_runs(split)
        for layer in self.layers:
            layer.split = split
        return (split.start(self.group.rank),) * batch

    def check_calls(self, table):
        """Raise when what the ranks said of their calls does not fit together; all raise alike."""
        batches, _, seen, uneven, padded, grad = zip(*table, strict=True)
        if any(padded):
            raise NotImplementedError(
                f"padding in the runs of ranks {[rank for rank, flag in enumerate(padded) if flag]}: rows that are "
                "split over ranks have one length; read padded rows on one rank each (data parallelism)"
            )
        if any(uneven):
            raise NotImplementedError(
                "the rows of this cache have read different numbers of tokens: rows that are split over ranks stand "
                "at one place; give them caches of their own"
            )
        for name, values in (("rows", batches), ("tokens read before", seen), ("gradients switched on", grad)):
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name} of the ranks' calls: {list(values)}. Every rank calls the model on its run of the same "
                    "rows, with a cache that has read the same; see infini_hf.sequence_parallel.shard_row"
                )

    def check_runs(self, split):
        """Raise when a run begins inside a segment."""
        length = self.infini_config.segment_length
        if split.began % length:
            raise ValueError(
                f"the cache has read {split.began} tokens, which ends inside a segment of {length}: what is split "
                "over ranks begins a segment; go on with cache.to_infini_cache(), on every rank alike"
            )
        wrong = [rank for rank in range(split.last) if not split.lengths[rank] or split.lengths[rank] % length]
        if wrong:
            raise ValueError(
                f"runs of {list(split.lengths)} tokens: all before the last one must be whole segments of {length}, "
                f"and that of rank {wrong[0]} is not; cut rows with infini_hf.sequence_parallel.shard_row. To "
                "generate, go on with cache.to_infini_cache(), on every rank alike"
            )


def refuse_split(cache):
    """Raise for a cache whose row is split over ranks, where every rank is to do the same."""
    if isinstance(cache, SequenceParallelCache):
        raise NotImplementedError(
            "a SequenceParallelCache reads a row that is split over ranks: to generate or to score, go on with "
            "cache.to_infini_cache(), on every rank alike"
        )


def run_of(columns, group, segment_length):
    """Which of a row's `columns` this rank reads, a slice: whole segments, evenly, the row's rest after them.

    Args:
        columns (`int`): those of the whole row.
        group ([`RowGroup`]): the ranks.
        segment_length (`int`): tokens of a segment.
    """
    segments, extra = divmod(-(-columns // segment_length), group.size)
    ends = [min(columns, segment_length * (r * segments + min(r, extra))) for r in (group.rank, group.rank + 1)]
    return slice(*ends)


def shard_row(ids, group, segment_length, labels=None):
    """The arguments of this rank's call for its run of a row.

    Labels are shifted on the whole row, before it is cut, so that every token but the first is a target of some rank;
    the loss of a rank is the sum over its targets divided by those of the whole row.

    Args:
        ids (`torch.Tensor`): `(batch, seq_len)` int64, the whole row, the same on every rank.
        group (`DeviceMesh` or `ProcessGroup`): the ranks of the row.
        segment_length (`int`): tokens of a segment.
        labels (`torch.Tensor`, *optional*): `(batch, seq_len)` int64, -100 where nothing is to be learned.

    Returns:
        `dict`: `input_ids`, and with labels `labels`, `shift_labels` and `num_items_in_batch`; a row of fewer segments
        than ranks leaves the last ranks runs of no token, which they have to call the model on all the same.
    """
    run = run_of(ids.shape[1], row_group(group), segment_length)
    if labels is None:
        return {"input_ids": ids[:, run]}
    targets = shift_labels(labels)
    count = (targets != IGNORED).sum()
    mine = targets[:, run].contiguous()
    return {"input_ids": ids[:, run], "labels": mine, "shift_labels": mine, "num_items_in_batch": count}


def shard_segments(ids, targets, group, segment_length, segments_per_call=1, weights=None):
    """The row as [`segment_major_loss`] reads it over several ranks: pieces, and of each this rank's run.

    Args:
        ids (`torch.Tensor`): `(batch, seq_len)` int64, the whole row, the same on every rank.
        targets (`torch.Tensor`): `(batch, seq_len)` int64, as from [`shift_labels`].
        group (`DeviceMesh` or `ProcessGroup`): the ranks of the row.
        segment_length (`int`): tokens of a segment.
        segments_per_call (`int`, *optional*, defaults to 1): segments that a rank reads in one call.
        weights (`torch.Tensor`, *optional*): `(batch, seq_len)` float32, as from [`shift_weights`].

    Returns:
        `list[Segment]`
    """
    group = row_group(group)
    columns = segment_length * segments_per_call * group.size
    pieces = []
    for start in range(0, ids.shape[1], columns):
        run = run_of(min(columns, ids.shape[1] - start), group, segment_length)
        run = slice(start + run.start, start + run.stop)
        parts = (None if whole is None else whole[:, run].contiguous() for whole in (ids, None, targets, weights))
        pieces.append(Segment(*parts))
    return pieces


@torch.no_grad()
def all_reduce_gradients(model, group):
    """Sum the gradients of all trained parameters over the ranks of a row, in place, where no wrapper does.

    Args:
        model (`torch.nn.Module`): the model that every rank has gone backward through.
        group (`DeviceMesh` or `ProcessGroup`): the ranks.
    """
    group = row_group(group)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad, group=group.group)
