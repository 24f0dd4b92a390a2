"""Streams of exact length with needles in them; those of one haystack, length and number share their filler."""

import hashlib
import zlib
from dataclasses import dataclass

import numpy as np

from ...data.needle_tasks import Trial
from ...data.needles import GRASS
from ...data.ruler_tasks import RulerTask

DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# A needle that begins before the last segment boundary of the first half, or the first of all, and ends after it.
STRADDLING = "straddling"
# Every needle of the stream at a random place.
SPREAD = "spread"
HAYSTACKS = ("grass", "novel", "needles")
# Sentences drawn at a time for a haystack of needles.
SENTENCES = 256


def start_of(tokenizer):
    """The ids that a tokenizer puts before every text, `(n,)` int32: a beginning-of-text token, or none.

    Heads rest their attention on it (arXiv 2309.17453): without it a model that was trained with one reads worse.
    """
    marked, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    count = next((n for n in range(len(marked)) if marked[n : n + len(plain)] == plain), 0)
    return np.asarray(marked[:count], dtype=np.int32)


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a haystack, a length in tokens, and a depth.

    Attributes:
        haystack (`str`): `"grass"`, `"novel"`, or `"needles"`, which are like those hidden and never asked for.
        tokens (`int`): tokens of a stream, without its question.
        depth (`float` or `str`): from 0 at the start to 1, or `"straddling"`, or `"spread"`.
    """

    haystack: str
    tokens: int
    depth: float | str


@dataclass(frozen=True)
class Layout:
    """How a stream is put together: its header, its needles and where they are cut into the filler.

    Attributes:
        header (`numpy.ndarray`): `(header,)` ids, int32, with the beginning of a text where the tokenizer has one.
        needles (`list[numpy.ndarray]`): the ids of each needle.
        cuts (`list[int]`): tokens of filler before each needle.
        room (`int`): tokens of filler.
        trial ([`Trial`]): what is hidden and asked.
    """

    header: np.ndarray
    needles: list[np.ndarray]
    cuts: list[int]
    room: int
    trial: Trial

    @property
    def tokens(self):
        """`int`: tokens of the stream, without its questions."""
        return len(self.header) + sum(map(len, self.needles)) + self.room

    @property
    def shared(self):
        """`int`: tokens before the first needle: the same in every stream of this haystack, length and number."""
        return len(self.header) + min(self.cuts)

    def place(self, needle):
        """Where a needle lies, as a fraction of the filler."""
        return round(self.cuts[needle] / max(1, self.room), 4)

    def fill(self, trunk):
        """The ids `(tokens,)` of the stream, for the header and filler of its haystack, length and number."""
        filler, pieces, last = trunk[len(self.header) :], [self.header], 0
        for index in np.argsort(self.cuts, kind="stable"):
            pieces += [filler[last : self.cuts[index]], self.needles[index]]
            last = self.cuts[index]
        return np.concatenate([*pieces, filler[last : self.room]])


class Haystacks:
    """Streams of exact length; the same for the same task, seed, cell and number.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        segment_length (`int`): tokens in a segment, for needles that straddle a boundary.
        task: what is hidden, as [`infini_hf.data.needle_tasks.PasskeyTask`].
        texts (`list[str]`, *optional*): novels; a stream longer than all of them begins again with the first.
        seed (`int`, *optional*, defaults to `0`): of every draw.
    """

    def __init__(self, tokenizer, segment_length, task, texts=(), seed=0):
        self.tokenizer, self.segment_length, self.task, self.seed = tokenizer, segment_length, task, seed
        self.start = start_of(tokenizer)
        self.header = np.concatenate([self.start, self.encode(task.header + "\n")])
        self.grass = self.encode((GRASS + " ") * 16)
        self.novels = np.concatenate([self.encode(text + "\n\n") for text in texts]) if texts else None
        self.texts_digest = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16] if texts else None

    def encode(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def generator(self, number, *parts):
        """The random numbers of one part of one stream."""
        return np.random.default_rng([self.seed, zlib.crc32("/".join(map(str, parts)).encode()), number])

    def trunk(self, haystack, tokens, number):
        """The header and the filler, `(tokens,)` ids: what the streams of all depths have in common.

        Raises:
            ValueError: when there is no text for the haystack, or the task has no needles to make one of.
        """
        filler = self.filler(haystack, tokens, self.generator(number, "filler", haystack, tokens))
        return np.concatenate([self.header, filler])[:tokens]

    def filler(self, haystack, length, rng):
        if haystack == "needles":
            return self.distractors(length, rng)
        source = self.grass if haystack == "grass" else self.novels
        if source is None:
            raise ValueError(f"haystack={haystack!r}: name a folder of texts (--haystack)")
        start = int(rng.integers(0, len(source)))
        return np.resize(np.roll(source, -start), length) if length > len(source) - start else source[start:][:length]

    def distractors(self, length, rng):
        """`length` tokens of sentences like the needles."""
        if not isinstance(self.task, RulerTask):
            raise ValueError(f"haystack='needles': the task {self.task.name!r} has none; take one of RULER's")
        pieces, count = [], 0
        while count < length:
            pieces.append(self.encode("\n".join(self.task.distractor(rng) for _ in range(SENTENCES)) + "\n"))
            count += len(pieces[-1])
        return np.concatenate(pieces)[:length] if pieces else np.zeros(0, np.int32)

    def layout(self, cell, number):
        """How the stream of a cell is put together.

        Returns:
            [`Layout`]

        Raises:
            ValueError: when the stream is too short for its needles, or several are to lie at one depth.
        """
        rng = self.generator(number, self.task.name, cell.haystack, cell.tokens, cell.depth)
        trial = self.task.draw(rng)
        needles = [self.encode(f"\n{statement}\n") for statement in trial.needles]
        fixed = len(self.header) + sum(map(len, needles))
        room = cell.tokens - fixed
        if room < 0:
            raise ValueError(f"a stream of {cell.tokens} tokens has no room for the {fixed} of its needles")
        return Layout(self.header, needles, self.place(cell, needles, room, rng), room, trial)

    def stream(self, cell, number):
        """The ids `(tokens,)` of a stream without its questions, and what it hides and is asked, a [`Trial`]."""
        layout = self.layout(cell, number)
        return layout.fill(self.trunk(cell.haystack, cell.tokens, number)), layout.trial

    def place(self, cell, needles, room, rng):
        """Tokens of filler before each needle.

        Raises:
            ValueError: when several needles are to lie at one depth, or one is to straddle where no boundary is.
        """
        if cell.depth == SPREAD:
            return rng.integers(0, room + 1, len(needles)).tolist()
        if len(needles) > 1:
            raise ValueError(
                f"depth={cell.depth!r}: {len(needles)} needles in a stream lie at random (depth 'spread')"
            )
        if cell.depth != STRADDLING:
            return [round(cell.depth * room)]
        header = len(self.header)
        boundary = max(1, (header + room // 2) // self.segment_length) * self.segment_length
        before = int(rng.integers(1, len(needles[0])))
        # Drawn among all cuts at which it straddles, and moved into those that there are.
        least, most = max(0, boundary - header - len(needles[0]) + 1), min(room, boundary - header - 1)
        if least > most:
            raise ValueError(
                f"depth={cell.depth!r}: in a stream of {cell.tokens:,} tokens the needle cannot straddle a boundary "
                f"of segments of {self.segment_length:,}; leave the depth out, or take longer streams"
            )
        return [min(max(boundary - before - header, least), most)]
