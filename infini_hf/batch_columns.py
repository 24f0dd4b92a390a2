"""Columns of a batch that `InfiniTrainer` reads, and what it says of those that it does not."""

from .data.collator import SOURCES, WEIGHTS

# Columns that say where a row belongs.
LANE_COLUMNS = ("document", "part")
ROW_COLUMNS = (*LANE_COLUMNS, "dilute", SOURCES)
NO_LABELS = (
    "the batch has no labels: InfiniTrainer trains on `labels` as long as `input_ids`, -100 where nothing is learned. "
    "For language modelling add labels equal to input_ids (pack_documents does)"
)


def check_columns(input_ids, others):
    """Refuse a batch without ids, or with columns that nothing reads.

    Args:
        input_ids (`torch.Tensor`, *optional*): the ids.
        others: the names of the columns beside those that every row has.

    Raises:
        ValueError: names them.
    """
    if unread := sorted(set(others) - {"attention_mask", WEIGHTS}):
        raise ValueError(
            f"the batch has {unread}, which InfiniTrainer does not read: it takes input_ids, labels, attention_mask, "
            "loss_weights, sources, dilute, document, part; drop them, or use the stock Trainer"
        )
    if input_ids is None:
        raise ValueError("the batch has no input_ids: InfiniTrainer reads rows of ids")
