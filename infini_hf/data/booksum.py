"""BookSum: texts with their summaries, and the rows that teach a model to write one after reading the other."""

import logging
from dataclasses import dataclass, field
from typing import Any

from .collator import IGNORED
from .documents import check_count, columns_of, open_rows, take
from .packing import document_number, plain_ids, require_tokenizer, row_features, token
from .pair_filter import drop_empty_pairs, keep_longest
from .pair_forms import PAIR_COLUMNS, Pairs
from .source_digest import source_digest

logger = logging.getLogger(__name__)

# The levels of a dataset of the hub, and the configuration that holds each; the first is the default.
LEVELS = {
    "kmfoda/booksum": {"chapters": None},
    "ubaada/booksum-complete-cleaned": {"books": "books", "chapters": "chapters"},
}
SUMMARIES = ("all", "longest")
CUT_COLUMNS = ["text_cut", "summary_cut"]
# The question stands at the end, where it is read last, and at the beginning, so that the memory knows what to keep.
DEFAULT_PROMPT = "Read the following text, then write a summary of it.\n\n{text}\n\nA summary of the text above:\n"


def load_booksum(
    source="kmfoda/booksum",
    split="train",
    level=None,
    streaming=False,
    limit=None,
    summaries="all",
    drop_empty=False,
):
    """Pairs of a text and a summary of it, as a dataset with the columns `id`, `text` and `summary`.

    A text with several summaries gives a pair for each, one after the other. What a source lacks is an empty string.

    Args:
        source (`str` or `Path`, *optional*, defaults to `"kmfoda/booksum"`): that dataset of the hub (chapters),
            `"ubaada/booksum-complete-cleaned"` (whole books), or what
            [`~infini_hf.data.documents.load_documents`] takes, with the fields of either: `chapter` and
            `summary_text` (or `summary`, the JSON of an object that has it), or `text` and `summary` (a string, or a
            list of `{"source", "text"}`).
        split (`str`, *optional*, defaults to `"train"`): the split; of a local folder, the file of that name.
        level (`str`, *optional*): `"chapters"` or `"books"`, where the dataset has both; of another dataset of the
            hub, the name of its configuration.
        streaming (`bool`, *optional*, defaults to `False`): read while training instead of before it.
        limit (`int`, *optional*): pairs to keep, the first ones.
        summaries (`str`, *optional*, defaults to `"all"`): `"all"`, or `"longest"` for one pair a text (of a stream,
            for one pair a row: rows that share a text are not brought together).
        drop_empty (`bool`, *optional*, defaults to `False`): leave out pairs without a text or without a summary, and
            count them in one warning (of a stream, which has no end to count at, the first one is told).

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming=True`.

    Raises:
        ValueError: when the source, split or level does not exist, its fields are others, a summary is not JSON, a
            text is no text, or no pair is left (of a table).
    """
    if summaries not in SUMMARIES:
        raise ValueError(f"summaries={summaries!r}: must be one of {', '.join(map(repr, SUMMARIES))}")
    if limit is not None:
        check_count("limit", limit)
    rows = open_rows(source, split, configuration(source, level), streaming)
    columns = columns_of(rows, source)
    # Beside a text, a chapter is its name or its number.
    text_column = "text" if "text" in columns else "chapter"
    if text_column not in columns or not {"summary", "summary_text"} & set(columns):
        raise ValueError(
            f"source={str(source)!r} has the columns {columns}: pairs need chapter and summary_text, or text and "
            "summary"
        )
    pairs = rows.map(
        Pairs(text_column, summaries),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=columns,
        features=pair_features(),
    )
    if drop_empty:
        pairs = drop_empty_pairs(pairs, f"source={str(source)!r}, split={split!r}")
    if summaries == "longest" and not streaming:
        pairs = keep_longest(pairs)
    return pairs if limit is None else take(pairs, limit)


def configuration(source, level):
    """The name of the configuration that holds a level of a source."""
    levels = LEVELS.get(str(source))
    if levels is None:
        return level
    if level is not None and level not in levels:
        others = [other for other, has in LEVELS.items() if level in has]
        raise ValueError(
            f"level={level!r}: {source} has {', '.join(map(repr, levels))}"
            + (f"; for {level} use source={others[0]!r}" if others else "")
        )
    return levels[next(iter(levels)) if level is None else level]


def summarization_prompt(text, tokenizer, prompt=DEFAULT_PROMPT, max_text_tokens=None):
    """The token ids that a summary follows, in training and when one is asked for: BOS if there is one, then `prompt`.

    Args:
        text (`str`): what to summarise.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        prompt (`str`, *optional*): words around the text, with `{text}` in its place.
        max_text_tokens (`int`, *optional*): keep this many tokens of the text, the first ones.

    Returns:
        `list[int]`: the ids. What stands before the text, the text, and what stands after it are tokenised apart,
        so that the ends of a text change no token of the instruction.
    """
    return prompt_around(tokenizer, prompt, plain_ids(tokenizer, text)[:max_text_tokens])


def prompt_around(tokenizer, prompt, ids):
    """The prompt with a text that is tokenised already."""
    if prompt.count("{text}") != 1:
        raise ValueError(f"prompt={prompt!r}: must hold {{text}} once, where the text goes")
    before, after = (plain_ids(tokenizer, words) if words else [] for words in prompt.split("{text}"))
    return [*token(tokenizer.bos_token_id), *before, *ids, *after]


def summarization_rows(pairs, tokenizer, prompt=DEFAULT_PROMPT, max_text_tokens=None, max_summary_tokens=1024):
    """Rows that teach a model to write a summary: the prompt of [`summarization_prompt`], the summary, EOS.

    Args:
        pairs (`datasets.Dataset` or `datasets.IterableDataset`): what [`load_booksum`] returns.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        prompt (`str`, *optional*): words around the text, with `{text}` in its place.
        max_text_tokens (`int`, *optional*): keep this many tokens of a text, the first ones.
        max_summary_tokens (`int`, *optional*, defaults to `1024`): the most tokens of a summary, its EOS included, as
            in `max_new_tokens` of generation; a longer one is cut, and then has no EOS, for it does not end there.

    Returns:
        a dataset of the kind that was given, with the columns `id`, `input_ids`, `labels` (-100 before the summary),
        `document` (the number of the pair) and `part` (0). What was cut is counted in one warning (of a stream, which
        has no end to count at, the first cut is told).

    Raises:
        TypeError: when `tokenizer` is of another kind.
        ValueError: when the prompt has no place for the text, a number is out of range, the tokenizer has no EOS, or
            a text or summary is empty (of a stream, when it is reached).
    """
    from datasets import Dataset, Features, Value

    require_tokenizer(tokenizer)
    for name, value in (("max_text_tokens", max_text_tokens), ("max_summary_tokens", max_summary_tokens)):
        if value is not None:
            check_count(name, value)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS to end a summary with: set tokenizer.eos_token")
    prompt_around(tokenizer, prompt, [])
    eager = isinstance(pairs, Dataset)
    rows = pairs.select_columns(PAIR_COLUMNS).map(
        SummaryRows(tokenizer, prompt, max_text_tokens, max_summary_tokens, tell_cut=not eager),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=PAIR_COLUMNS,
        features=Features(
            {"id": Value("string"), **row_features(join=False), **dict.fromkeys(CUT_COLUMNS, Value("bool"))}
        ),
    )
    if eager:
        warn_of_cuts(rows, max_text_tokens, max_summary_tokens)
    return rows.remove_columns(CUT_COLUMNS)


@dataclass
class SummaryRows:
    """The rows of a batch of pairs."""

    tokenizer: Any
    prompt: str
    max_text_tokens: int | None
    max_summary_tokens: int | None
    tell_cut: bool
    source: str = field(default_factory=source_digest)

    def __call__(self, batch, indices):
        rows = [
            self.row(dict(zip(PAIR_COLUMNS, values, strict=True)), index)
            for index, *values in zip(indices, *(batch[name] for name in PAIR_COLUMNS), strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def row(self, pair, index):
        for name in ("text", "summary"):
            if not pair[name] or pair[name].isspace():
                raise ValueError(
                    f"pair {pair['id']!r}: its {name} is empty; load_booksum(..., drop_empty=True) leaves it out"
                )
        text = plain_ids(self.tokenizer, pair["text"])
        summary = [*plain_ids(self.tokenizer, pair["summary"].strip()), self.tokenizer.eos_token_id]
        prompt = prompt_around(self.tokenizer, self.prompt, text[: self.max_text_tokens])
        kept = summary[: self.max_summary_tokens]
        cut = {
            "text_cut": self.max_text_tokens is not None and len(text) > self.max_text_tokens,
            "summary_cut": len(kept) < len(summary),
        }
        if self.tell_cut and any(cut.values()):
            limits = f"max_text_tokens={self.max_text_tokens}, max_summary_tokens={self.max_summary_tokens}"
            logger.warning("pair %r is cut (%s); others may be, and are not told", pair["id"], limits)
            self.tell_cut = False
        return {
            "id": pair["id"],
            "input_ids": prompt + kept,
            "labels": [IGNORED] * len(prompt) + kept,
            "document": document_number(index),
            "part": 0,
            **cut,
        }


def warn_of_cuts(rows, max_text_tokens, max_summary_tokens):
    texts, summaries = (sum(rows[name]) for name in CUT_COLUMNS)
    if texts or summaries:
        logger.warning(
            "of %d pairs, %d texts are cut to max_text_tokens=%s and %d summaries to max_summary_tokens=%s",
            len(rows),
            texts,
            max_text_tokens,
            summaries,
            max_summary_tokens,
        )


def pair_features():
    from datasets import Features, Value

    return Features(dict.fromkeys(PAIR_COLUMNS, Value("string")))
