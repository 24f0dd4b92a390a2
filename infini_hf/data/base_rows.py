"""What a small base model is pretrained on: a tokenizer of its own, and rows of novels and in-context recall."""

from pathlib import Path

import numpy as np
import torch

from .local_parts import read_utf8
from .needles import STYLES, recall_document

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def read_texts(folder):
    """The `.txt` files of a folder in name order, as a list of strings.

    Raises:
        ValueError: when there is no such folder, or it holds none, or one that is not UTF-8.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"data folder {str(folder)!r}: there is no such folder; name one of plain-text books")
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise ValueError(f"data folder {str(folder)!r}: holds no .txt file; name a folder of plain-text books")
    return [read_utf8(file) for file in files]


def train_tokenizer(texts, vocab_size=4096):
    """A byte-level BPE tokenizer in which every digit is a token of its own, so that numbers can be copied.

    It adds no special token by itself: a stream of any length is then the concatenation of its parts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class BaseRows(torch.utils.data.Dataset):
    """Rows of `row_length` tokens: windows of the books, and a share of recall documents packed together.

    Row `i` depends on `(seed, i)` alone, so a resumed run sees the rows it would have seen. Windows walk through the
    books once before any part is repeated, shifted by a new offset each time.

    Args:
        texts (`list[str]`): the books.
        tokenizer: the tokenizer of the model.
        rows (`int`): the length of the dataset.
        row_length (`int`): tokens in a row.
        recall_fraction (`float`, *optional*, defaults to `0.25`): share of recall rows.
        recall_style (`str`, *optional*, defaults to `"mixed"`): a name in `infini_hf.data.needles.STYLES`.
        seed (`int`, *optional*, defaults to `0`): the seed of every draw.

    Each item is `{"input_ids": (row_length,), "labels": (row_length,)}`, both int64.
    """

    def __init__(self, texts, tokenizer, rows, row_length, recall_fraction=0.25, recall_style="mixed", seed=0):
        self.tokenizer, self.rows, self.row_length = tokenizer, rows, row_length
        self.style = STYLES[recall_style]
        self.recall_fraction, self.seed = recall_fraction, seed
        self.text = "\n\n".join(texts)
        encoded = [np.asarray(ids, dtype=np.int32) for ids in tokenizer(texts)["input_ids"]]
        end = np.asarray([tokenizer.eos_token_id], dtype=np.int32)
        self.tokens = np.concatenate([part for ids in encoded for part in (ids, end)])
        self.windows = len(self.tokens) // row_length - 1
        if self.windows < 1:
            raise ValueError(
                f"row_length={row_length}: the books hold {len(self.tokens)} tokens; give more text or shorter rows"
            )

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        ids = self._recall_row(rng) if rng.random() < self.recall_fraction else self._window(index)
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def _window(self, index):
        round_number, window = divmod(index, self.windows)
        offset = int(np.random.default_rng([self.seed, 1, round_number]).integers(0, self.row_length))
        start = window * self.row_length + offset
        return self.tokens[start : start + self.row_length]

    def _recall_row(self, rng):
        """Documents of log-uniform length, so that short distances are met often and the longest fill the row."""
        ids = []
        while len(ids) < self.row_length:
            room = max(self.row_length - len(ids), 48)
            length = min(np.exp(rng.uniform(np.log(48), np.log(self.row_length))), room)
            document = recall_document(rng, self.text, int(length * 3.2), self.style)
            ids += self.tokenizer(document)["input_ids"] + [self.tokenizer.eos_token_id]
        return np.asarray(ids[: self.row_length])
