"""Passkeys in streams of any length: hidden at a depth, read once, asked for with the memory and with its controls."""

import copy
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.needles import GRASS, PASSKEY_HEADER, draw_key, passkey_fact
from ..streaming import generate, prefill, require_patched
from .controls import closed_memory
from .recall import first_answer, wilson_interval

DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# A needle that begins before a segment boundary near the middle and ends after it.
STRADDLING = "straddling"
CONTROLS = ("memory", "closed", "other")
HAYSTACKS = ("grass", "novel")
# Tokens of an answer: the digits, and what may stand before them.
ANSWER_TOKENS = 10


@dataclass(frozen=True)
class PasskeyCell:
    """One cell of the table: a haystack, a length in tokens, and a depth, 0 at the start or `"straddling"`."""

    haystack: str
    tokens: int
    depth: float | str


@dataclass(frozen=True)
class PasskeySample:
    """One question: its cell, its number, how the memory was treated, and what was expected and answered."""

    haystack: str
    tokens: int
    depth: float | str
    number: int
    control: str
    expected: str
    answered: str

    @property
    def correct(self):
        return self.expected == self.answered


class Haystacks:
    """Streams of exact length with a passkey in them; the same for the same seed, cell and number.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        segment_length (`int`): tokens in a segment, for needles that straddle a boundary.
        texts (`list[str]`, *optional*): novels; a stream longer than one goes on with the next.
        digits (`int`, *optional*, defaults to `5`): digits of a key.
        seed (`int`, *optional*, defaults to `0`): of every draw; keys are of the test part.
    """

    def __init__(self, tokenizer, segment_length, texts=(), digits=5, seed=0):
        self.tokenizer, self.segment_length, self.digits, self.seed = tokenizer, segment_length, digits, seed
        self.grass = self.encode((GRASS + " ") * 16)
        self.novels = np.concatenate([self.encode(text + "\n\n") for text in texts]) if texts else None

    def encode(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def stream(self, cell, number):
        """The ids `(tokens,)` of a stream without its question, and the key hidden in it.

        Raises:
            ValueError: when there is no text for the haystack, or the stream is too short for its needle.
        """
        name = f"{cell.haystack}/{cell.tokens}/{cell.depth}".encode()
        rng = np.random.default_rng([self.seed, zlib.crc32(name), number])
        key = draw_key(rng, self.digits, "test")
        header = self.encode(PASSKEY_HEADER + "\n")
        needle = self.encode(f"\n{passkey_fact(key).statement}\n")
        room = cell.tokens - len(header) - len(needle)
        if room < 0:
            raise ValueError(f"a stream of {cell.tokens} tokens has no room for the {cell.tokens - room} of a passkey")
        filler = self.filler(cell.haystack, room, rng)
        cut = self.place(cell, len(header), len(needle), room, rng)
        return np.concatenate([header, filler[:cut], needle, filler[cut:]]), key

    def place(self, cell, header, needle, room, rng):
        """Tokens of filler before the needle."""
        if cell.depth != STRADDLING:
            return round(cell.depth * room)
        boundary = max(1, (header + room // 2) // self.segment_length) * self.segment_length
        before = int(rng.integers(1, needle))
        return min(room, max(0, boundary - before - header))

    def filler(self, haystack, length, rng):
        source = self.grass if haystack == "grass" else self.novels
        if source is None:
            raise ValueError(f"haystack={haystack!r}: name a folder of texts (--texts)")
        start = int(rng.integers(0, len(source)))
        return np.resize(np.roll(source, -start), length) if length > len(source) - start else source[start:][:length]


def ask(model, tokenizer, cache, question):
    """The first run of digits that the model writes after `question`, from a copy of a cache of one row."""
    ids = torch.tensor(question, device=cache.infini_layers[min(cache.infini_layers)].memory.device)[None]
    options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    out = generate(model, ids, cache=copy.copy(cache), **options)
    return first_answer(tokenizer.decode(out[0, ids.shape[1] :]), "passkey")


def swapped(cache, other):
    """A copy of a cache with the memory of another: its own window, another document's past."""
    twin = copy.copy(cache)
    for index, layer in twin.infini_layers.items():
        theirs = other.infini_layers[index]
        layer.memory, layer.memory_norm = theirs.memory, theirs.memory_norm
    return twin


def ask_batch(model, tokenizer, cell, numbers, haystacks, controls, progress=True):
    """Read a batch of streams at once and ask each for its key under every control.

    Returns:
        `list[PasskeySample]`
    """
    streams, keys = zip(*(haystacks.stream(cell, number) for number in numbers), strict=True)
    cache = prefill(model, torch.from_numpy(np.stack(streams)), progress=progress)
    question = haystacks.encode("\n" + passkey_fact("0").prompt)
    rows = []
    for row in range(len(numbers)):
        rows.append(copy.copy(cache))
        rows[-1].batch_select_indices(torch.tensor([row]))
    samples = []
    for row, (number, key) in enumerate(zip(numbers, keys, strict=True)):
        for control in controls:
            if control == "closed":
                with closed_memory(model):
                    answered = ask(model, tokenizer, rows[row], question)
            elif control == "other":
                # Of a batch of one there is no other stream, nor a claim to make.
                if len(rows) == 1:
                    continue
                answered = ask(model, tokenizer, swapped(rows[row], rows[row - 1]), question)
            else:
                answered = ask(model, tokenizer, rows[row], question)
            samples.append(
                PasskeySample(**asdict(cell), number=number, control=control, expected=key, answered=answered)
            )
    return samples


def run_passkeys(model, tokenizer, cells, samples, haystacks, path, controls=CONTROLS, batch_size=8, progress=True):
    """Ask for passkeys in every cell; what the file at `path` already holds is not read again.

    Args:
        model (`PreTrainedModel`): a patched model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        cells (`list[PasskeyCell]`): the cells of the table.
        samples (`int`): streams a cell.
        haystacks ([`Haystacks`]): where streams come from.
        path (`str` or `Path`): a JSONL file of all samples, appended to.
        controls (`tuple[str]`, *optional*): of `"memory"`, `"closed"` (gates shut while asking), `"other"` (the memory
            of another stream while asking).
        batch_size (`int`, *optional*, defaults to `8`): streams read at once.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `list[PasskeySample]`: all samples of the file.
    """
    require_patched(model)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = read_samples(path)
    done = {(sample.haystack, sample.tokens, sample.depth, sample.number) for sample in found}
    total = sum(cell.tokens for cell in cells) * samples
    with tqdm(total=total, unit="tok", unit_scale=True, desc="passkeys", disable=not progress) as bar:
        for cell in cells:
            missing = [n for n in range(samples) if (cell.haystack, cell.tokens, cell.depth, n) not in done]
            bar.update((samples - len(missing)) * cell.tokens)
            for start in range(0, len(missing), batch_size):
                numbers = missing[start : start + batch_size]
                new = ask_batch(model, tokenizer, cell, numbers, haystacks, controls, progress=False)
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**asdict(s), "correct": s.correct}) + "\n" for s in new)
                found += new
                bar.update(len(numbers) * cell.tokens)
    return found


def read_samples(path):
    """The samples of a JSONL file, none where there is no file; a line that a kill cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        row.pop("correct")
        found.append(PasskeySample(**row))
    return found


def passkey_table(samples):
    """Exact matches as lines of a markdown table with Wilson intervals, pooled over the depths."""
    lines = ["| haystack | tokens | read with | exact | share | 95 % interval |", "|---|---|---|---|---|---|"]
    groups = sorted({(s.haystack, s.tokens, CONTROLS.index(s.control)) for s in samples})
    for haystack, tokens, control in groups:
        rows = [s for s in samples if (s.haystack, s.tokens, s.control) == (haystack, tokens, CONTROLS[control])]
        right = sum(s.correct for s in rows)
        low, high = wilson_interval(right, len(rows))
        share = f"{right / len(rows):.2f}"
        lines.append(
            f"| {haystack} | {tokens:,} | {CONTROLS[control]} | {right} of {len(rows)} | **{share}** "
            f"| {low:.2f}–{high:.2f} |"
        )
    return lines
