"""A stream that every process reads as a whole, and of whose batches it keeps its own."""

import torch


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


def whole_stream(dataset, processes):
    """A dataset as several processes should read it: a stream with a shard for each as a whole, others as they are.

    Args:
        dataset: whatever a trainer was given.
        processes (`int`): how many there are.
    """
    from datasets import IterableDataset

    split = processes > 1 and isinstance(dataset, IterableDataset) and dataset.n_shards >= processes
    return WholeStream(dataset) if split else dataset
