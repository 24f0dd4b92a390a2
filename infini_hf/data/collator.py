"""`InfiniCollator`: rows of any length as one right-padded batch that still knows which document each row is of."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from .documents import check_count

logger = logging.getLogger(__name__)

IGNORED = -100
WEIGHTS = "loss_weights"
SOURCES = "sources"
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", WEIGHTS, SOURCES)
ADD_LABELS = (
    "add labels (for language modelling: the input_ids themselves), or make the rows with pack_documents or "
    "summarization_rows"
)


@dataclass
class InfiniCollator:
    """Pads rows on the right, so that segments begin where the row begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): whose padding token to use, or, without one, its EOS.
        pad_to_multiple_of (`int`, *optional*): make the length a multiple of this, as of the segment length.

    Returns, when called with a list of rows:
        `dict[str, torch.Tensor]`: `input_ids`, `labels` (-100 at padding) and `attention_mask` (0 at padding), each
        `(batch, seq_len)` int64; when every row has them, `document` and `part`, `(batch,)` int64; when a row has one,
        `loss_weights` `(batch, seq_len)` float32 (0 at padding, 1 in rows without), `sources` `(batch, seq_len)` int64
        (the column of the token that a token repeats, or -1), and `dilute`, `(batch,)` bool: whether memory dilution
        may scale the row's writes. Other columns are left out.

    Raises:
        ValueError: when the tokenizer has neither token, a row has no `input_ids` or no `labels`, is empty, or its
            columns differ in length, or a source is no earlier column; the message names the row.
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None
    warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        if self.pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.pad_id is None:
            raise ValueError("the tokenizer has neither a padding token nor EOS: set tokenizer.pad_token")

    @property
    def pad_id(self):
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def __call__(self, rows):
        rows = [checked(row, index) for index, row in enumerate(rows)]
        batch = {
            "input_ids": self.padded(rows, "input_ids", self.pad_id),
            "labels": self.padded(rows, "labels", IGNORED),
            "attention_mask": self.padded(rows, "attention_mask", 0),
        }
        if any(WEIGHTS in row for row in rows):
            rows = [{WEIGHTS: torch.ones(len(row["input_ids"])), **row} for row in rows]
            batch[WEIGHTS] = self.padded(rows, WEIGHTS, 0.0)
        if any(SOURCES in row for row in rows):
            rows = [{SOURCES: torch.full((len(row["input_ids"]),), -1), **row} for row in rows]
            batch[SOURCES] = self.padded(rows, SOURCES, -1)
        if any("dilute" in row for row in rows):
            batch["dilute"] = torch.tensor([bool(row.get("dilute", True)) for row in rows])
        for name in ("document", "part"):
            if all(name in row for row in rows):
                batch[name] = torch.tensor([int(row[name]) for row in rows])
        self.warn_if_nothing_to_learn(batch["labels"])
        return batch

    def padded(self, rows, name, value):
        length = max(len(row[name]) for row in rows)
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        batch = torch.full((len(rows), length), value)
        for index, row in enumerate(rows):
            batch[index, : len(row[name])] = row[name]
        return batch

    def warn_if_nothing_to_learn(self, labels):
        # The label of the first token is never predicted.
        if not self.warned and bool((labels[:, 1:] == IGNORED).all()):
            logger.warning(
                "a batch has no label to learn from: all of them are masked, which is not said again; look at how "
                "labels are made if it is not the filling of a last batch"
            )
            self.warned = True


def checked(row, index):
    """A row with its token columns as tensors, or an error that names it; what is `None` counts as absent."""
    row = {name: value for name, value in row.items() if value is not None}
    which = f"row {index} of the batch" + (f" (document {int(row['document'])})" if "document" in row else "")
    for name, remedy in (("input_ids", "tokenise it, as pack_documents does"), ("labels", ADD_LABELS)):
        if row.get(name) is None:
            raise ValueError(f"{which} has no {name}: {remedy}")
    length = len(row["input_ids"])
    if not length:
        raise ValueError(f"{which} is empty: leave it out of the dataset")
    columns = {name: row[name] for name in TOKEN_COLUMNS if row.get(name) is not None}
    for name, values in columns.items():
        if len(values) != length:
            raise ValueError(f"{which} has {len(values)} {name} for {length} input_ids: give one for each token")
    tensors = {name: torch.as_tensor(values) for name, values in columns.items()}
    for name, values in tensors.items():
        if values.ndim != 1 or values.is_floating_point() != (name == WEIGHTS):
            raise ValueError(
                f"{which} has {name} of shape {tuple(values.shape)} and {values.dtype}: give a plain list of "
                f"{'floats' if name == WEIGHTS else 'ids'}"
            )
    if SOURCES in tensors:
        check_sources(tensors[SOURCES], which)
    return {**row, "attention_mask": torch.ones(length, dtype=torch.int64), **tensors}


def check_sources(sources, which):
    """Raise where a token's source is neither -1 nor a column before it."""
    odd = ((sources < -1) | (sources >= torch.arange(len(sources)))).nonzero().flatten().tolist()
    if odd:
        raise ValueError(
            f"{which} has the source {int(sources[odd[0]])} for token {odd[0]}: a source is the column of an earlier "
            "token, or -1 for none"
        )
