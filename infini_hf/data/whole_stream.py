"""Streams as several processes read them: each the whole, of whose batches it keeps its own; and with full batches."""

import torch
from transformers.utils import is_datasets_available

from .collator import IGNORED


class WholeStream(torch.utils.data.IterableDataset):
    """Hides from accelerate that a stream has several shards.

    Given shards of their own, processes would come to the end of a pass at different steps, and wait for each other in
    what they gather and reduce. Each reads, and tokenises, the whole stream instead.

    Args:
        dataset (`datasets.IterableDataset`): the stream.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from self.dataset

    def set_epoch(self, epoch):
        """Shuffle a stream that is shuffled anew."""
        self.dataset.set_epoch(epoch)


class FilledStream(torch.utils.data.IterableDataset):
    """A stream whose last batch is full: rows follow that are read and of which nothing is counted.

    Accelerate fills it with the first rows once more, and of a stream cannot tell afterwards how many these were.

    Args:
        dataset (`torch.utils.data.IterableDataset`): the stream; rows without `labels` are left as they are.
        size (`int`): rows of a batch of all processes.
    """

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def set_epoch(self, epoch):
        # Streams of torch alone have no epochs.
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self):
        count, row = 0, {}
        for row in self.dataset:
            count += 1
            yield row
        if "labels" in row:
            for _ in range(-count % self.size):
                yield {**row, "labels": nothing_of(row["labels"])}


def nothing_of(labels):
    """Labels of the same length and kind that count for nothing."""
    return torch.full_like(labels, IGNORED) if isinstance(labels, torch.Tensor) else [IGNORED] * len(labels)


def filled_stream(dataset, processes, size):
    """A dataset as several processes evaluate it: a stream with full batches of `size` rows, others as they are."""
    several = processes > 1 and isinstance(dataset, torch.utils.data.IterableDataset)
    return FilledStream(dataset, size) if several else dataset


def whole_stream(dataset, processes):
    """A dataset as several processes should read it: a stream with a shard for each as a whole, others as they are.

    Args:
        dataset: whatever a trainer was given.
        processes (`int`): how many there are.
    """
    if processes == 1 or not is_datasets_available():
        return dataset
    from datasets import IterableDataset

    split = isinstance(dataset, IterableDataset) and dataset.n_shards >= processes
    return WholeStream(dataset) if split else dataset
