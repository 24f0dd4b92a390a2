"""Whole documents as rows of segments: tokenised once each, cut without a gap, their boundaries recorded."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .documents import check_count, generated
from .source_digest import source_digest

# A row of one token has nothing to predict.
LEAST_TOKENS = 2


def pack_documents(documents, tokenizer, segment_length, segments_per_row, join=False, min_tokens=LEAST_TOKENS):
    """Rows of `segments_per_row` segments for language modelling, in the order of the documents.

    Each document begins a new row, with the tokenizer's BOS if it has one; its last token is EOS if the tokenizer has
    one. The rows of a document follow each other and, put together, are the document token by token; its last row may
    be shorter. A last row of fewer than `min_tokens` tokens is left out (by default: a single token, the EOS), and so
    is a document that has no more than that.

    With `join=True` the documents make one stream with EOS after each (and BOS before it, where that is another
    token): every row is full except the last, which is left out under the same rule.

    A stream is read as rows are asked for, and its `state_dict` resumes at the next row: by reading the open document
    again, or, joined, everything before. Several `DataLoader` workers each take a part of the files of a stream, so
    that rows of different documents alternate: keep to one where the memory is carried from row to row.

    Args:
        documents (`datasets.Dataset` or `datasets.IterableDataset`): what
            [`~infini_hf.data.documents.load_documents`] returns, or any dataset with a column `"text"`.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        segment_length (`int`): tokens in a segment.
        segments_per_row (`int`): segments in a row.
        join (`bool`, *optional*, defaults to `False`): let rows run over the ends of documents.
        min_tokens (`int`, *optional*, defaults to `2`): the fewest tokens in a row.

    Returns:
        a dataset of the kind that was given, with the columns
        - `input_ids`, `labels`: the same token ids, `segment_length * segments_per_row` of them or fewer,
        - `document`: the number of the document, from 0 (joined: 0; in a worker of several: a number of its own),
        - `part`: the number of the row in its document (joined: in the stream), from 0,
        - `starts` (joined only): where in the row documents begin.

    Raises:
        TypeError: when `documents` or `tokenizer` is of another kind.
        ValueError: when a number is out of range, there is no column `"text"`, a document is empty (of a stream, when
            it is reached), or `join` lacks an EOS token.
    """
    row_length = check_row(segment_length, segments_per_row, min_tokens)
    documents = text_alone(documents)
    require_tokenizer(tokenizer)
    features = row_features(join)
    if join:
        if tokenizer.eos_token_id is None:
            raise ValueError("join=True: the tokenizer has no EOS to part documents with; set tokenizer.eos_token")
        arguments = {"tokenizer": tokenizer, "row_length": row_length, "min_tokens": min_tokens}
        return generated(type(documents), joined_rows, features, documents=documents, **arguments)
    rows = DocumentRows(tokenizer, row_length, min_tokens)
    # One document at a time: a stream that resumes has no more than one to read again.
    return documents.map(
        rows, with_indices=True, batched=True, batch_size=1, remove_columns=["text"], features=features
    )


@dataclass(frozen=True)
class DocumentRows:
    """The rows of a batch of documents, each document apart."""

    tokenizer: Any
    row_length: int
    min_tokens: int
    source: str = field(default_factory=source_digest)

    def __call__(self, batch, indices):
        rows = {"input_ids": [], "document": [], "part": []}
        for text, index in zip(batch["text"], indices, strict=True):
            ids = text_ids(self.tokenizer, text, f"document {index}")
            ids = [*token(self.tokenizer.bos_token_id), *ids, *token(self.tokenizer.eos_token_id)]
            for part, start in enumerate(range(0, len(ids), self.row_length)):
                if len(ids) - start >= self.min_tokens:
                    rows["input_ids"].append(ids[start : start + self.row_length])
                    rows["document"].append(document_number(index))
                    rows["part"].append(part)
        return {**rows, "labels": rows["input_ids"]}


def joined_rows(documents, tokenizer, row_length, min_tokens, source=None):
    """Yields the rows of one stream of documents; what is held is one document and one row."""
    refuse_parts_of_a_stream(documents)
    bos = [] if tokenizer.bos_token_id == tokenizer.eos_token_id else token(tokenizer.bos_token_id)
    open_ids, starts, part = [], [], 0

    def row(ids):
        return {"input_ids": ids, "labels": ids, "document": 0, "part": part, "starts": starts}

    for number, document in enumerate(documents):
        # What is open is less than a row, so that a document begins in the first row that it fills.
        starts.append(len(open_ids))
        open_ids += [*bos, *text_ids(tokenizer, document["text"], f"document {number}"), tokenizer.eos_token_id]
        whole = len(open_ids) - len(open_ids) % row_length
        for first in range(0, whole, row_length):
            yield row(open_ids[first : first + row_length])
            starts, part = [], part + 1
        open_ids = open_ids[whole:]
    if len(open_ids) >= min_tokens:
        yield row(open_ids)


def refuse_parts_of_a_stream(documents):
    """In a `DataLoader` worker a stream yields its share of the files alone: the rest would be lost without a word."""
    from datasets import IterableDataset

    worker = torch.utils.data.get_worker_info()
    alone = worker is None or worker.num_workers == 1
    if not alone and isinstance(documents, IterableDataset) and documents.num_shards > 1:
        raise ValueError(
            f"{worker.num_workers} DataLoader workers: joined documents are one stream in one order; set "
            f"dataloader_num_workers to 0 or 1, or join=False"
        )


def document_number(index):
    """A number that no other document has, also where each worker of a `DataLoader` counts its own documents."""
    worker = torch.utils.data.get_worker_info()
    return index if worker is None else index * worker.num_workers + worker.id


def text_ids(tokenizer, text, which):
    """The token ids of a text, as a list; a `ValueError` when there are none."""
    ids = plain_ids(tokenizer, text) if text and not text.isspace() else []
    if not ids:
        raise ValueError(f"{which} is empty; leave it out, as load_documents(..., drop_empty=True) does")
    return ids


def plain_ids(tokenizer, text):
    """The token ids of a text without special tokens, as a list."""
    # `verbose=False`: a book is longer than the model's context, which is the point.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def token(token_id):
    """A special token as a list: empty when the tokenizer has none."""
    return [] if token_id is None else [token_id]


def check_row(segment_length, segments_per_row, min_tokens):
    """Tokens in a row."""
    check_count("segment_length", segment_length)
    check_count("segments_per_row", segments_per_row)
    check_count("min_tokens", min_tokens, LEAST_TOKENS)
    row_length = segment_length * segments_per_row
    if row_length < min_tokens:
        raise ValueError(
            f"segment_length={segment_length}, segments_per_row={segments_per_row}: a row holds {row_length} tokens, "
            f"fewer than min_tokens={min_tokens}; give it more"
        )
    return row_length


def text_alone(documents):
    """The column `"text"` of a dataset of either kind, as a dataset."""
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(documents, (DatasetDict, IterableDatasetDict)):
        raise TypeError(f"documents has the splits {', '.join(map(repr, documents))}: pass one, as documents['train']")
    if not isinstance(documents, (Dataset, IterableDataset)):
        raise TypeError(
            f"documents is a {type(documents).__name__}: pass a dataset, as of load_documents or "
            f"datasets.Dataset.from_dict({{'text': [...]}})"
        )
    if documents.column_names is not None and "text" not in documents.column_names:
        raise ValueError(
            f"documents has the columns {documents.column_names}: rename the one with the documents to 'text'"
        )
    return documents.select_columns(["text"])


def require_tokenizer(tokenizer):
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}: pass a tokenizer, as of AutoTokenizer.from_pretrained"
        )


def row_features(join):
    from datasets import Features, List, Value

    ids = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    numbers = {"document": Value("int64"), "part": Value("int64")}
    return Features({**ids, **numbers, **({"starts": List(Value("int32"))} if join else {})})
