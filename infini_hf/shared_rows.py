"""Rows of a training run that several ranks read together: which ranks, and what of a row each of them reads."""

from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh

from .cache import infini_config_of
from .collectives import RowGroup
from .segment_step import shift_labels, shift_weights, used_columns
from .sequence_parallel import SequenceParallelCache, shard_segments

PADDED = (
    "sequence_parallel_size={} with rows padded to one length: rows that are split over ranks have one length; set "
    "per_device_train_batch_size=1, or pack rows of equal length (infini_hf.data.packing.pack_documents)"
)


class SharedRows:
    """The ranks of this process's rows.

    Ranks that follow one another share: of four with `size=2`, ranks 0 and 1 read the same rows, and 2 and 3 others.

    Args:
        accelerator (`accelerate.Accelerator`): of the run.
        size (`int`): ranks that share a row; a divisor of their number.
        config (`PreTrainedConfig`): that of the patched model.
    """

    def __init__(self, accelerator, size, config):
        self.accelerator, self.size = accelerator, size
        shape = (accelerator.num_processes // size, size)
        # Names that accelerate deals by: ranks of one "cp" get the same rows.
        self.mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp_replicate", "cp"))
        self.group = RowGroup(self.mesh["cp"])
        self.length = infini_config_of(config).segment_length

    @contextmanager
    def dealing(self):
        """A context in which a loader that accelerate prepares gives the ranks of a row the same rows."""
        state = self.accelerator.state
        before, state.device_mesh = state.device_mesh, self.mesh
        try:
            yield
        finally:
            state.device_mesh = before

    def split(self, cache):
        """An [`InfiniCache`] for what this rank reads of its rows."""
        return SequenceParallelCache.from_cache(cache, self.group)

    def cut(self, input_ids, labels, attention_mask=None, loss_weights=None):
        """This rank's run of every piece of its rows, a segment for each rank.

        Args:
            input_ids (`torch.Tensor`): `(batch, seq_len)` int64, whole rows.
            labels (`torch.Tensor`): the same shape, -100 where nothing is learned.
            attention_mask (`torch.Tensor`, *optional*): the same shape, 0 behind the last token.
            loss_weights (`torch.Tensor`, *optional*): the same shape, what the loss of each token counts.

        Returns:
            `tuple`: `list[Segment]`, and the number of segments of the whole rows.

        Raises:
            ValueError: on all of its ranks, when they were given different rows, labels or weights.
            NotImplementedError: on all of its ranks, for rows that are padded to one length.
        """
        targets = shift_labels(labels)
        columns = used_columns(input_ids, attention_mask, targets)
        padded = attention_mask is not None and not bool(attention_mask[:, :columns].all())
        input_ids, targets = input_ids[:, :columns], targets[:, :columns]
        weights = None if loss_weights is None else shift_weights(loss_weights)[:, :columns]
        self.check_alike(input_ids, targets, weights)
        if padded:
            raise NotImplementedError(PADDED.format(self.size))
        pieces = shard_segments(input_ids, targets, self.group, self.length, weights=weights)
        return pieces, -(-columns // self.length)

    def check_alike(self, *columns):
        """Raise when the ranks hold different rows: their losses would be of no row at all."""
        marks = [fingerprint(column) for column in columns if column is not None]
        table = self.group.gather([*columns[0].shape, *marks], columns[0].device)
        if any(row != table[0] for row in table):
            raise ValueError(
                f"the {self.size} ranks of a row were given different rows, labels or weights, of "
                f"{[tuple(row[:2]) for row in table]}: let dataset, order and collator give the same on every rank "
                "(one seed, use_seedable_sampler; nothing drawn at random in dataloader workers)"
            )


def fingerprint(column):
    """A whole number that differs where the values `(batch, seq_len)` or their places do."""
    whole = column.view(torch.int32) if column.dtype == torch.float32 else column
    places = torch.arange(1, whole.numel() + 1, device=whole.device).view(whole.shape)
    return int((whole.long() * places).sum())
