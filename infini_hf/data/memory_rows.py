"""Rows that teach a memory: facts hidden segments before they are asked for, in novels and in grass filler."""

from dataclasses import dataclass

import numpy as np
import torch

from .needles import GRASS, JOINERS, PASSKEY_HEADER, draw_facts, passkey_fact
from .needles import draw_key as draw_passkey


@dataclass(frozen=True)
class MemoryRowStyle:
    """What the rows are made of.

    Args:
        least_segments (`int`, *optional*, defaults to `2`): segments of the shortest row.
        most_segments (`int`, *optional*, defaults to `8`): segments of the longest row.
        grass_fraction (`float`, *optional*, defaults to `0.3`): share of rows in the benchmark's filler.
        passkey_fraction (`float`, *optional*, defaults to `0.7`): share of rows with one passkey; the others have
            named facts, all of them asked for.
        most_facts (`int`, *optional*, defaults to `4`): the most named facts in a row.
        most_digits (`int`, *optional*, defaults to `7`): digits of the longest key; the shortest has five.
        rows_alike (`int`, *optional*, defaults to `16`): so many rows in turn are equally long: a batch of them
            holds no padding.
        answer_weight (`float`, *optional*, defaults to `2.0`): how often the mean loss of the answers counts beside
            the mean loss of all tokens.
    """

    least_segments: int = 2
    most_segments: int = 8
    grass_fraction: float = 0.3
    passkey_fraction: float = 0.7
    most_facts: int = 4
    most_digits: int = 7
    rows_alike: int = 16
    answer_weight: float = 2.0


class MemoryRows(torch.utils.data.Dataset):
    """Rows of whole segments, each a haystack with facts, ending with the questions and their answers.

    Row `i` depends on `(seed, i)` alone, so a resumed run sees the rows it would have seen.

    Args:
        texts (`list[str]`): the novels that haystacks are cut from.
        tokenizer: the tokenizer of the model.
        rows (`int`): the length of the dataset.
        segment_length (`int`): tokens in a segment.
        style ([`MemoryRowStyle`], *optional*): what the rows are made of.
        seed (`int`, *optional*, defaults to `0`): the seed of every draw.

    Each item is `{"input_ids", "labels", "loss_weights"}`, tensors `(seq_len,)` of int64, int64, float32: the labels
    are the ids, the weight of an answer's tokens is above 1.
    """

    def __init__(self, texts, tokenizer, rows, segment_length, style=MemoryRowStyle(), seed=0):
        self.tokenizer, self.rows, self.segment_length = tokenizer, rows, segment_length
        self.style, self.seed = style, seed
        self.novels = np.concatenate([self._encode(text) for text in texts])
        self.grass = self._encode((GRASS + " ") * 8)
        longest = style.most_segments * segment_length
        if len(self.novels) <= longest:
            raise ValueError(f"the texts hold {len(self.novels)} tokens, rows up to {longest}: give more text")
        # So that a haystack of grass can begin anywhere.
        self.grass = np.tile(self.grass, 2 + longest // len(self.grass))

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        style = self.style
        alike = np.random.default_rng([self.seed, 1, index // style.rows_alike])
        length = int(alike.integers(style.least_segments, style.most_segments + 1)) * self.segment_length
        joiner = str(rng.choice(JOINERS))
        facts = self._draw_facts(rng)
        questions = [self._question(facts[i], joiner) for i in rng.permutation(len(facts))]
        room = length - sum(len(ids) for ids, _ in questions)
        body = self._haystack(rng, facts, joiner, room)
        ids = np.concatenate([body, *(ids for ids, _ in questions)])
        answers = np.concatenate([np.zeros(len(body), bool), *(answer for _, answer in questions)])
        weights = 1.0 + answers * style.answer_weight * len(ids) / answers.sum()
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone(), "loss_weights": torch.from_numpy(weights.astype(np.float32))}

    def _draw_facts(self, rng):
        style = self.style
        if rng.random() < style.passkey_fraction:
            # Mostly the five digits of the benchmark.
            digits = 5 if rng.random() < 0.7 else int(rng.integers(5, style.most_digits + 1))
            return [passkey_fact(draw_passkey(rng, digits))]
        count = int(rng.integers(1, style.most_facts + 1))
        return draw_facts(rng, count, most_digits=style.most_digits)

    def _encode(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _question(self, fact, joiner):
        """Ids of a question with its answer, and which of them are the answer."""
        asked, answer, end = (self._encode(text) for text in (joiner + fact.prompt, " " + fact.answer, "."))
        marks = np.zeros(len(asked) + len(answer) + len(end), bool)
        marks[len(asked) : len(asked) + len(answer)] = True
        return np.concatenate([asked, answer, end]), marks

    def _haystack(self, rng, facts, joiner, room):
        """`room` tokens of filler with the facts at random places, cut where those fall."""
        header = [self._encode(PASSKEY_HEADER + joiner)] if rng.random() < 0.5 else []
        needles = [self._encode(f"{joiner}{fact.statement}{joiner}") for fact in facts]
        filler_length = room - sum(map(len, needles)) - sum(map(len, header))
        if filler_length < 0:
            header, filler_length = [], max(0, room - sum(map(len, needles)))
        source = self.grass if rng.random() < self.style.grass_fraction else self.novels
        start = int(rng.integers(0, len(source) - filler_length))
        filler = source[start : start + filler_length]
        cuts = np.sort(rng.integers(0, filler_length + 1, len(facts)))
        pieces, last = list(header), 0
        for cut, needle in zip(cuts, needles, strict=True):
            pieces += [filler[last:cut], needle]
            last = cut
        # Facts that are too long for the shortest row push its beginning out.
        return np.concatenate([*pieces, filler[last:]])[-room:]
