"""Memory across steps: every row of a micro-batch is a lane that goes on with its document in the next one."""

import json
from pathlib import Path

from .cache import InfiniCache
from .snapshot import check_contents, collect_tensors, fill, read_file, state_metadata, write_file

ABSENT = (
    "carry_memory=True needs the columns `document` and `part` in every row, as infini_hf.data.packing.pack_documents "
    "makes them: they say where a document begins and which row continues which"
)


class Lanes:
    """The memory of a rank's rows between micro-batches, and whose it is.

    A lane is a row index of the micro-batch. It holds a document and the last of its parts that was read.

    Args:
        config (`PreTrainedConfig`): the config of the patched model.
    """

    def __init__(self, config):
        self.config = config
        self.cache = InfiniCache(config)
        # For each lane (document, part), the last that was read.
        self.places = []

    def open(self, documents, parts):
        """The cache for the next micro-batch, with the lanes emptied where a document begins.

        Args:
            documents (`torch.Tensor`): `(batch,)` int64, the document of each row.
            parts (`torch.Tensor`): `(batch,)` int64, 0 where a document begins, else one more than the row before.

        Returns:
            [`InfiniCache`]: detached from the steps before.

        Raises:
            ValueError: when a row does not continue what its lane has read.
        """
        if documents is None or parts is None:
            raise ValueError(ABSENT)
        places = list(zip(documents.tolist(), parts.tolist(), strict=True))
        if self.places and len(self.places) != len(places):
            raise ValueError(
                f"the batch has {len(places)} rows and the memory holds {len(self.places)} lanes: with carry_memory "
                "every micro-batch must have the same number of rows (dataloader_drop_last=True for a dataset of "
                "your own order)"
            )
        for lane, (document, part) in enumerate(places):
            before = self.places[lane] if self.places else None
            if part and before != (document, part - 1):
                held = "nothing" if before is None else f"document {before[0]} up to part {before[1]}"
                raise ValueError(
                    f"row {lane} is part {part} of document {document}, and the memory of that lane holds {held}: the "
                    "rows are not in lane order. Let InfiniTrainer order a dataset that has a length (which it does "
                    "unless train_sampling_strategy='sequential'), or order a stream with "
                    "infini_hf.data.lane_order.lane_stream(rows, per_device_train_batch_size × args.row_groups)"
                )
        self.cache.reset_rows(parts.cpu() == 0)
        return self.cache

    def close(self, documents, parts, cache):
        """Keep the memory after a micro-batch, cut from the graph that computed it."""
        cache.detach()
        self.cache = cache
        self.places = list(zip(documents.tolist(), parts.tolist(), strict=True))

    def save(self, path):
        """Write the lanes of this rank into one file, whole or not at all; nothing where nothing was read."""
        if not self.places:
            return
        patch = json.dumps(self.cache.infini_config.to_dict())
        metadata = {"fingerprint": patch, "places": json.dumps(self.places), **state_metadata(self.cache)}
        write_file(Path(path), collect_tensors(self.cache), metadata)

    def load(self, path, decoder):
        """Continue from a file of [`save`].

        Raises:
            ValueError: when the file is not there, damaged, or no file of lanes.
        """
        tensors, metadata = read_file(Path(path))
        check_contents(path, tensors, metadata)
        if "places" not in metadata:
            raise ValueError(f"{path}: is a memory snapshot, not the lanes of a training run")
        self.cache = InfiniCache(self.config)
        fill(self.cache, tensors, metadata, decoder)
        self.places = [tuple(place) for place in json.loads(metadata["places"])]
