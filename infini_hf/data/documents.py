"""Whole documents from local files and from the hub: one a row, in order."""

import glob
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .local_parts import read_utf8, text_files
from .source_digest import source_digest

# Names people use for what the hub keeps under another one.
SHORT_NAMES = {"pg19": "emozilla/pg19"}
READERS = {".jsonl": "json", ".parquet": "parquet"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CONDITION = re.compile(r"([^=~]+)([=~])(.*)", re.DOTALL)
# Books are long: a writer that buffers its usual thousand rows would hold gigabytes.
ROWS_PER_WRITE = 16


def load_documents(
    source,
    split="train",
    text_column="text",
    name=None,
    streaming=True,
    where=None,
    limit=None,
    drop_empty=False,
):
    """Documents as a dataset with the single column `"text"`, one document a row, in the order of the source.

    Args:
        source (`str` or `Path`): a folder of `.txt` files (read in name order, one document a file), one `.txt`,
            `.jsonl` or `.parquet` file, any folder that `datasets` can load, or the name of a dataset of the hub,
            `"owner/name"`; `"pg19"` is short for `"emozilla/pg19"`. A path that exists is never looked up on the hub.
        split (`str`, *optional*, defaults to `"train"`): the split. Of a local folder, the files or folders that
            `datasets` knows for that part by their names; a file, or a folder that holds `.txt` files itself, is all
            `"train"` (unless some of them are named `train.txt` and `validation.txt`, or the like).
        text_column (`str`, *optional*, defaults to `"text"`): the column that holds the documents.
        name (`str`, *optional*): the configuration of a hub dataset that has several.
        streaming (`bool`, *optional*, defaults to `True`): read while training instead of before it.
        where (`callable` or `str`, *optional*): which rows to keep: `f(row) -> bool`, `"column=value"`, or
            `"column~substring"`. Files of text have the columns `text` and `file` (the path).
        limit (`int`, *optional*): documents to keep, the first ones.
        drop_empty (`bool`, *optional*, defaults to `False`): leave out documents without text.

    Returns:
        `datasets.IterableDataset`, or `datasets.Dataset` with `streaming=False`.

    Raises:
        TypeError: when `source` is not a path or a name, or a document is not text.
        ValueError: when the source, split or column does not exist, nothing is kept, or a document is empty (of a
            stream, when it is reached).
        ConnectionError: when the source is not here and the hub cannot be asked.
    """
    if limit is not None:
        check_count("limit", limit)
    rows = open_rows(source, split, name, streaming)
    columns = columns_of(rows, source)
    require_column("text_column", text_column, columns)
    keep = Keep(condition(where, columns), text_column, drop_empty)
    # With nothing to drop the limit comes first: what lies behind it is neither read nor judged.
    drops = where is not None or drop_empty
    rows = rows if limit is None or drops else take(rows, limit)
    rows = rows.filter(keep, with_indices=True)
    rows = rows if limit is None or not drops else take(rows, limit)
    if not streaming and not len(rows):
        raise ValueError(f"source={str(source)!r}: where={where!r}, drop_empty={drop_empty} keep none of its rows")
    rows = rows.select_columns([text_column])
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def open_rows(source, split="train", name=None, streaming=True):
    """The rows of a local source or of a hub dataset as they are stored, as a dataset of the kind asked for.

    Raises:
        TypeError: when `source` is neither `str` nor `Path`.
        ValueError: when there is no such source, split, or data in it.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source is a {type(source).__name__}: pass a path, or the name of a dataset of the hub")
    path = Path(source).expanduser()
    if not path.exists():
        return open_splits(source, hub_name(source), split, streaming, name=name)
    files = text_files(path, split, name)
    if not files and path.is_dir():
        return open_splits(source, str(path.resolve()), split, streaming, name=name)
    if name is not None:
        raise ValueError(f"configuration {name!r}: {str(source)!r} is read from plain files, which have none")
    if files:
        return open_texts(files, streaming)
    if path.suffix not in READERS:
        raise ValueError(f"source={str(source)!r}: a file must be .txt, {' or '.join(READERS)}")
    if not path.stat().st_size:
        raise ValueError(f"source={str(source)!r}: holds no row")
    files = {"train": glob.escape(str(path.resolve()))}
    return open_splits(source, READERS[path.suffix], split, streaming, data_files=files)


def hub_name(source):
    """The full name of a dataset of the hub, if that is what `source` can be."""
    name = SHORT_NAMES.get(str(source), str(source))
    if not HUB_NAME.fullmatch(name) or Path(name).suffix in (".txt", *READERS):
        raise ValueError(
            f"source={str(source)!r}: there is no such file or folder, and a dataset of the hub is named 'owner/name' "
            f"or, in short, {', '.join(map(repr, SHORT_NAMES))}"
        )
    return name


def open_splits(source, target, split, streaming, **options):
    """One split of what `datasets.load_dataset` finds."""
    from datasets import load_dataset

    try:
        splits = load_dataset(target, streaming=streaming, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"source={str(source)!r}: no such file or folder, and no hub to ask ({error})"
        ) from error
    except FileNotFoundError as error:
        found = "holds nothing to read" if Path(source).expanduser().exists() else "is neither here nor on the hub"
        raise ValueError(
            f"source={str(source)!r}: {found}; name a folder of .txt files, a .txt, {' or '.join(READERS)} file, or a "
            f"dataset of the hub ({error})"
        ) from error
    if split not in splits:
        raise ValueError(
            f"split={split!r}: {str(source)!r} has {', '.join(map(repr, splits))}; name one of them (for a part of "
            f"one use limit), or the file or folder that holds the other texts"
        )
    return splits[split]


def open_texts(files, streaming):
    from datasets import Dataset, Features, IterableDataset, Value

    # Time and size make an edited file a new one to the cache of `datasets`.
    stamped = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    features = Features({"text": Value("string"), "file": Value("string")})
    return generated(IterableDataset if streaming else Dataset, read_stamped, features, files=stamped)


def read_stamped(files, source=None):
    for file, _, _ in files:
        yield {"text": read_utf8(file), "file": file}


def generated(kind, generator, features, **arguments):
    """What a generator yields, as a dataset of one of the two kinds; its errors come out as it raised them.

    It gets `source` besides, by which `datasets` tells the rows of another version of this code apart.
    """
    from datasets import IterableDataset
    from datasets.exceptions import DatasetGenerationError

    arguments["source"] = source_digest()
    if issubclass(kind, IterableDataset):
        return kind.from_generator(generator, features=features, gen_kwargs=arguments)
    try:
        return kind.from_generator(
            generator, features=features, gen_kwargs=arguments, writer_batch_size=ROWS_PER_WRITE
        )
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def written(stream):
    """What a stream of documents yields, as a dataset with a length on the disk."""
    from datasets import Dataset, Features, Value

    return generated(Dataset, read_through, Features({"text": Value("string")}), stream=stream)


def read_through(stream, source=None):
    yield from stream


def columns_of(rows, source):
    """Column names; of a stream that does not know them yet, those of its first row."""
    first = rows.column_names or next(iter(rows), None)
    if first is None:
        raise ValueError(f"source={str(source)!r}: holds no row")
    return list(first)


def take(rows, count):
    """The first rows of a dataset of either kind, or all when there are fewer."""
    from datasets import Dataset

    return rows.select(range(min(count, len(rows)))) if isinstance(rows, Dataset) else rows.take(count)


def condition(where, columns):
    """`where` as a function of one row, or `None`."""
    if where is None or callable(where):
        return where
    match = CONDITION.fullmatch(where) if isinstance(where, str) else None
    if match is None:
        raise ValueError(f"where={where!r}: must be a function of a row, 'column=value', or 'column~substring'")
    column, sign, value = (part.strip() for part in match.groups())
    require_column("where", column, columns)
    return partial(equals if sign == "=" else contains, column, value)


def equals(column, value, row):
    return str(row[column]) == value


def contains(column, value, row):
    return value in str(row[column])


@dataclass(frozen=True)
class Keep:
    """Whether a row is a document to keep; a document without text is refused unless it may be dropped."""

    where: Any
    text_column: str
    drop_empty: bool
    source: str = field(default_factory=source_digest)

    def __call__(self, row, index):
        if self.where is not None and not self.where(row):
            return False
        text = row[self.text_column]
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"row {index}: column {self.text_column!r} holds {type(text).__name__}, not text; name another "
                f"text_column of {sorted(row)}"
            )
        if text is not None and not text.isspace() and text:
            return True
        if not self.drop_empty:
            which = row.get("file", f"row {index}")
            raise ValueError(f"{which}: an empty document; pass drop_empty=True, or a where that leaves it out")
        return False


def require_column(option, column, columns):
    if column not in columns:
        raise ValueError(f"{option}: there is no column {column!r}; the source has {', '.join(map(repr, columns))}")


def check_count(name, value, lowest=1):
    """Refuse what is not a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: must be a whole number, not a {type(value).__name__}")
    if value < lowest:
        raise ValueError(f"{name}={value}: must be at least {lowest}")
