"""Rows in lane order: row `i` of a batch continues the document that row `i` of the batch before it has read."""

import logging
from collections import defaultdict
from itertools import groupby

import torch
from transformers.utils import is_datasets_available

from .packing import refuse_parts_of_a_stream

logger = logging.getLogger(__name__)

# Share of the rows that an epoch may leave out unsaid.
MOST_LOST = 0.05


def too_few(documents, lanes):
    """What is wrong with so few documents."""
    return (
        f"{documents} documents for {lanes} lanes (per_device_train_batch_size × args.row_groups): with carry_memory "
        "every row of a batch reads a document of its own; use a smaller batch and more gradient_accumulation_steps"
    )


class LaneSampler(torch.utils.data.Sampler):
    """Row indices in lane order, of an equal number of rows in every epoch.

    Documents are shuffled, never their parts, and dealt one by one to the lane with the least to read. A lane that
    ends early reads documents of its own again, one that is too long leaves the end of its last one out.

    Args:
        documents (`list[int]`): the document of every row of the dataset.
        parts (`list[int]`): its part: 0 where the document begins, 1, 2 … after that.
        lanes (`int`): rows of a global micro-batch, those of all processes together.
        seed (`int`, *optional*, defaults to `0`): the order depends on it and on the epoch alone.
        shuffle (`bool`, *optional*, defaults to `True`): shuffle the documents anew in every epoch.

    Raises:
        ValueError: when a document's parts are not 0, 1, 2 …, or there are fewer documents than lanes.
    """

    def __init__(self, documents, parts, lanes, seed=0, shuffle=True):
        self.lanes, self.seed, self.shuffle, self.epoch = lanes, seed, shuffle, 0
        rows = defaultdict(list)
        for index, (document, part) in enumerate(zip(documents, parts, strict=True)):
            rows[document].append((part, index))
        for document, places in rows.items():
            found = sorted(part for part, _ in places)
            if found != list(range(len(places))):
                raise ValueError(f"document {document} has the parts {found[:8]}: they must be 0, 1, 2 …, each once")
        if len(rows) < lanes:
            raise ValueError(too_few(len(rows), lanes))
        self.rows = [[index for _, index in sorted(places)] for places in rows.values()]
        self.steps = -(-sum(map(len, self.rows)) // lanes)
        self.warn_of_ends()

    def warn_of_ends(self):
        """Say how much of the first epoch is left out, where that is more than the ends of a few documents."""
        total = sum(map(len, self.rows))
        lost = total - len({row for lane in self.deal() for row in lane})
        if lost > MOST_LOST * total:
            logger.warning(
                "%d of %d rows are left out of an epoch: they lie beyond the mean length of %d lanes, and what is "
                "shorter is read twice. A smaller batch with more gradient_accumulation_steps leaves out fewer",
                lost,
                total,
                self.lanes,
            )

    def set_epoch(self, epoch):
        self.epoch = epoch

    def deal(self):
        """For every lane the indices it reads, `steps` of them."""
        order = list(range(len(self.rows)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        lanes = [[] for _ in range(self.lanes)]
        for document in order:
            min(lanes, key=len).extend(self.rows[document])
        return [(lane * -(-self.steps // len(lane)))[: self.steps] for lane in lanes]

    def __iter__(self):
        for step in zip(*self.deal(), strict=True):
            yield from step

    def __len__(self):
        return self.lanes * self.steps


def interleave(rows, lanes):
    """Order rows that come document after document so that batches of `lanes` rows continue each other.

    Args:
        rows (`Iterable[dict]`): rows with `document` and `part`.
        lanes (`int`): rows of a global micro-batch, those of all processes together.

    Yields:
        `dict`: a row of each lane in turn. It ends where a lane has no document left.

    Raises:
        ValueError: when there are fewer documents than lanes.
    """
    documents = (list(group) for _, group in groupby(rows, key=lambda row: row["document"]))
    waiting = [next(documents, []) for _ in range(lanes)]
    if not all(waiting):
        raise ValueError(too_few(sum(map(bool, waiting)), lanes))
    while all(waiting):
        for lane in waiting:
            yield lane.pop(0)
        waiting = [lane or next(documents, []) for lane in waiting]


def lane_stream(dataset, lanes):
    """[`interleave`] over a streamed dataset, as a dataset that `Trainer` takes.

    Args:
        dataset (`datasets.IterableDataset`): rows with `document` and `part`, document after document.
        lanes (`int`): `per_device_train_batch_size` × `args.row_groups`.

    Returns:
        `datasets.IterableDataset`

    Raises:
        TypeError: when the dataset is of another kind: one with a length is ordered by [`LaneSampler`].
        ValueError: when several `DataLoader` workers would each read a part of it.
    """
    from datasets import IterableDataset

    if not isinstance(dataset, IterableDataset):
        raise TypeError(f"dataset is a {type(dataset).__name__}: lane_stream takes a datasets.IterableDataset")
    return IterableDataset.from_generator(interleave_whole, gen_kwargs={"rows": dataset, "lanes": lanes})


def interleave_whole(rows, lanes):
    """[`interleave`] over all of a stream: a worker of several would be given a part of it, the rest lost."""
    refuse_parts_of_a_stream(rows)
    yield from interleave(rows, lanes)


def lane_column(dataset, name):
    """One column of a dataset, as a list."""
    first = dataset[0]
    if name not in first:
        raise ValueError(
            f"carry_memory=True needs the column {name!r} in every row, and the dataset has {sorted(first)}: make it "
            "with infini_hf.data.packing.pack_documents"
        )
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset):
            return [int(value) for value in dataset[name]]
    return [int(row[name]) for row in dataset]
