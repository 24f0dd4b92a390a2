"""Pairs to leave out: those that lack a text or a summary, never without a word, and all but one of a text."""

import hashlib
import logging
from dataclasses import dataclass, field

from .source_digest import source_digest

logger = logging.getLogger(__name__)

COLUMNS = ["text", "summary"]


def drop_empty_pairs(pairs, where):
    """The pairs that have both a text and a summary.

    Args:
        pairs (`datasets.Dataset` or `datasets.IterableDataset`): with the columns `id`, `text` and `summary`.
        where (`str`): where they are from, to begin the message with.

    Returns:
        a dataset of the kind that was given. What was left out is counted in one warning (of a stream, which has no
        end to count at, the first one is told).

    Raises:
        ValueError: when no pair is left (of a table).
    """
    from datasets import Dataset

    eager = isinstance(pairs, Dataset)
    kept = pairs.filter(Whole(tell=not eager), input_columns=["id", *COLUMNS])
    dropped = len(pairs) - len(kept) if eager else 0
    if dropped:
        texts = sum(not text.strip() for text in pairs["text"])
        said = f"{texts} without a text and {dropped - texts} without a summary"
        if not len(kept):
            raise ValueError(f"{where}: of its {len(pairs)} pairs {said}, and none is left; name another split")
        logger.warning("%s: left out %d of %d pairs, %s", where, dropped, len(pairs), said)
    return kept


def keep_longest(pairs):
    """Of the pairs of each text the one with the longest summary, where the first of them stood.

    Args:
        pairs (`datasets.Dataset`): with the columns `text` and `summary`.
    """
    longest = {}
    for index, pair in enumerate(pairs.select_columns(COLUMNS)):
        key = hashlib.sha256(pair["text"].encode()).digest()
        if len(pair["summary"]) > longest.get(key, (-1, 0))[0]:
            longest[key] = (len(pair["summary"]), index)
    return pairs if len(longest) == len(pairs) else pairs.select([index for _, index in longest.values()])


@dataclass
class Whole:
    """Whether a pair has both; the first that has not is told of, where that is asked for."""

    tell: bool
    source: str = field(default_factory=source_digest)

    def __call__(self, pair_id, text, summary):
        whole = bool(text.strip() and summary.strip())
        if not whole and self.tell:
            lacking = "summary" if text.strip() else "text"
            logger.warning("pair %r is left out: it has no %s; others may be, and are not told", pair_id, lacking)
            self.tell = False
        return whole
