"""Rows that teach a memory: facts hidden segments before they are asked for, in novels and in grass filler."""

import numpy as np
import torch

from .memory_row_style import MemoryRowStyle
from .needles import GRASS, JOINERS, PASSKEY_HEADER, brief_fact, draw_numbers, facts_of_kind, passkey_fact
from .needles import draw_key as draw_passkey
from .ruler_tasks import ruler_facts

# Tokens that a named fact with its question and some filler take, a brief one, and one in the sentence of RULER.
FACT_ROOM, BRIEF_ROOM, RULER_ROOM = 72, 26, 90


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

    Each item is `{"input_ids", "labels", "loss_weights", "sources"}`, tensors `(seq_len,)`, the weights float32, the
    others int64: the labels are the ids, the weight of an answer's tokens is above 1, and their sources are columns
    where they were stated first, -1 for all other tokens. With `novel_lanes` it has `document` and `part` (what
    reads on where); with these, or without `dilute_named`, also `dilute`: whether its writes may be scaled, which
    those of a novel never are, since its memory is carried on.

    Raises:
        ValueError: when there is too little text, or, of a row, when it is too short for its questions.
    """

    def __init__(self, texts, tokenizer, rows, segment_length, style=MemoryRowStyle(), seed=0):  # noqa: B008 (frozen)
        self.tokenizer, self.rows, self.segment_length = tokenizer, rows, segment_length
        self.style, self.seed = style, seed
        self.novels = np.concatenate([self._encode(text) for text in texts])
        self.grass = self._encode((GRASS + " ") * 8)
        self.space = self._encode(" ")[0]
        longest = style.most_segments * segment_length
        if len(self.novels) <= longest:
            raise ValueError(f"the texts hold {len(self.novels)} tokens, rows up to {longest}: give more text")
        # So that a haystack of grass can begin anywhere.
        self.grass = np.tile(self.grass, 2 + longest // len(self.grass))
        batches = -(-rows // style.rows_alike)
        self.lengths = [self._draw_length(batch) for batch in range(batches)]
        self.lanes = [
            readings(np.random.default_rng([seed, 2, lane]), self.lengths, len(self.novels), longest, style)
            for lane in range(style.novel_lanes)
        ]

    def _draw_length(self, batch):
        rng = np.random.default_rng([self.seed, 1, batch])
        return int(rng.integers(self.style.least_segments, self.style.most_segments + 1)) * self.segment_length

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if not 0 <= index < self.rows:
            raise IndexError(f"index={index}: there are {self.rows} rows")
        batch, lane = divmod(index, self.style.rows_alike)
        length = self.lengths[batch]
        if lane < self.style.novel_lanes:
            return self._novel_row(*self.lanes[lane][batch], lane, length)
        rng = np.random.default_rng([self.seed, index])
        style = self.style
        joiner = str(rng.choice(JOINERS))
        facts = self._draw_facts(rng, length)
        order = rng.permutation(len(facts))
        questions = [self._question(facts[i], joiner) for i in order]
        needles = [self._encode(f"{joiner}{fact.statement}{joiner}") for fact in facts]
        if lengths_of(questions) >= length:
            raise ValueError(
                f"least_segments={style.least_segments}, segment_length={self.segment_length}: a row of {length} "
                f"tokens has no room for a question of {lengths_of(questions)}; give more segments, or longer ones"
            )
        if style.most_gap:
            gaps = [self._gap(rng) for _ in questions[1:]]
            over = sum(map(len, needles)) + lengths_of(questions) + sum(map(len, gaps)) - length
            questions[1:] = apart(questions[1:], gaps, max(0, over))
        body, places = self._haystack(rng, needles, joiner, length - lengths_of(questions))
        end = len(self._encode(".")) * style.mark_ends
        ids = np.concatenate([body, *(ids for ids, _ in questions)])
        answers = np.concatenate([np.zeros(len(body)), *(answer for _, answer in questions)])
        weights = 1.0 + answers * style.answer_weight * len(ids) / answers.sum()
        sources = np.concatenate(
            [np.full(len(body), -1)]
            + [sources_of(*question, body, *places[i], end) for i, question in zip(order, questions, strict=True)]
        )
        row = {**as_row(ids, weights), "sources": torch.from_numpy(sources)}
        if style.novel_lanes or not style.dilute_named:
            row["dilute"] = style.dilute_named or not facts[0].name
        return {**row, "document": -1 - index, "part": 0} if style.novel_lanes else row

    def _novel_row(self, reading, part, start, lane, length):
        # Readings of all lanes have numbers of their own.
        document = reading * self.style.novel_lanes + lane
        ids = self.novels[start : start + length]
        row = {**as_row(ids, np.ones(length)), "sources": torch.full((length,), -1)}
        return {**row, "document": document, "part": part, "dilute": False}

    def _draw_facts(self, rng, length):
        style = self.style
        # Without the option nothing is drawn for it: rows of older recipes stay what they were.
        if style.ruler_fraction and rng.random() < style.ruler_fraction:
            count = 1 if rng.random() < 0.25 else self._fact_count(rng, length, RULER_ROOM)
            values = "words" if rng.random() < style.ruler_word_fraction else "numbers"
            return ruler_facts(rng, count, values, style.most_digits)
        if rng.random() < style.passkey_fraction:
            # Mostly the five digits of the benchmark.
            digits = 5 if rng.random() < 0.7 else int(rng.integers(5, style.most_digits + 1))
            return [passkey_fact(draw_passkey(rng, digits))]
        brief = rng.random() < style.brief_fraction
        count = self._fact_count(rng, length, BRIEF_ROOM if brief else FACT_ROOM)
        kind = "word" if rng.random() < style.word_fraction else "key"
        # Nor is anything drawn for this one.
        alike = style.alike_fraction and kind == "key" and rng.random() < style.alike_fraction
        kinds = rng.choice(10, 2, replace=False) if alike else None
        facts = facts_of_kind(rng, kind, count, "train", style.most_digits, kinds, style.distinct_keys)
        return [brief_fact(fact) for fact in facts] if brief else facts

    def _fact_count(self, rng, length, room):
        """How many facts a row of `length` tokens holds, of which each takes `room`."""
        most = max(1, min(self.style.most_facts, length // (room + self.style.most_gap // 2)))
        return most if self.style.dense else int(rng.integers(1, most + 1))

    def _encode(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _question(self, fact, joiner):
        """Ids of a question with its answer, and what each of them counts as a part of the answer."""
        asked, answer, end = (self._encode(text) for text in (joiner + fact.prompt, " " + fact.answer, "."))
        # The space before digits is a token of its own, and nothing that was remembered.
        space = int(len(answer) > 1 and answer[0] == self.space)
        marks = np.zeros(len(asked) + len(answer) + len(end))
        marks[len(asked) + space : len(asked) + len(answer) + len(end) * self.style.mark_ends] = 1.0
        # An only token has no others to count beside, and must count.
        marks[len(asked) + space] = self.style.first_token_weight or float(len(answer) - space == 1)
        return np.concatenate([asked, answer, end]), marks

    def _gap(self, rng):
        """Filler to stand before a question."""
        gap, source = int(rng.integers(0, self.style.most_gap + 1)), self._source(rng)
        start = int(rng.integers(0, len(source) - gap))
        return source[start : start + gap]

    def _source(self, rng):
        return self.grass if rng.random() < self.style.grass_fraction else self.novels

    def _with_numbers(self, rng, filler):
        """Filler in which a few places have given way to numbers."""
        filler = filler.copy()
        for phrase in draw_numbers(rng):
            ids = self._encode(phrase)
            if len(ids) < len(filler):
                start = int(rng.integers(0, len(filler) - len(ids)))
                filler[start : start + len(ids)] = ids
        return filler

    def _haystack(self, rng, needles, joiner, room):
        """`room` tokens of filler, cut where the facts fall, which is anywhere; and where each of them stands."""
        header = [self._encode(PASSKEY_HEADER + joiner)] if rng.random() < 0.5 else []
        filler_length = room - sum(map(len, needles)) - sum(map(len, header))
        if filler_length < 0:
            header, filler_length = [], max(0, room - sum(map(len, needles)))
        source = self._source(rng)
        start = int(rng.integers(0, len(source) - filler_length))
        filler = source[start : start + filler_length]
        # Without the option nothing is drawn for it: rows of older recipes stay what they were.
        if self.style.number_fraction and rng.random() < self.style.number_fraction:
            filler = self._with_numbers(rng, filler)
        cuts = np.sort(rng.integers(0, filler_length + 1, len(needles)))
        pieces, last, places = list(header), 0, []
        for cut, needle in zip(cuts, needles, strict=True):
            begins = sum(map(len, pieces)) + cut - last
            pieces += [filler[last:cut], needle]
            places.append((begins, begins + len(needle)))
            last = cut
        body = np.concatenate([*pieces, filler[last:]])
        # Facts that are too long for the shortest row push its beginning out.
        lost = max(0, len(body) - room)
        return body[lost:], [(max(0, begins - lost), max(0, ends - lost)) for begins, ends in places]


def lengths_of(questions):
    """The tokens of all questions."""
    return sum(len(ids) for ids, _ in questions)


def apart(questions, gaps, over):
    """Questions with filler of their own before them, which is `over` tokens less where the facts need the room."""
    found = []
    for (ids, marks), gap in zip(questions, gaps, strict=True):
        cut = min(over, len(gap))
        over -= cut
        found.append((np.concatenate([gap[cut:], ids]), np.concatenate([np.zeros(len(gap) - cut), marks])))
    return found


def as_row(ids, weights):
    """The columns of a row of which every token is learned."""
    ids = torch.from_numpy(ids.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone(), "loss_weights": torch.from_numpy(weights.astype(np.float32))}


def sources_of(question, marks, body, begins, ends, end=0):
    """Where each token of an answer first stands in `body[begins:ends]`, as columns of the body; -1 for all others.

    Args:
        question (`numpy.ndarray`): ids of the question and its answer.
        marks (`numpy.ndarray`): above 0 at the answer.
        body (`numpy.ndarray`): ids of the haystack.
        begins, ends (`int`): where its fact is stated.
        end (`int`, *optional*, defaults to `0`): so many marked tokens come after the answer. They have a source only
            where it goes on with the same: a tokenizer may join a full stop to what follows it.
    """
    sources, columns = np.full(len(question), -1, dtype=np.int64), np.flatnonzero(marks > 0)
    size = len(columns) - end
    if size <= ends - begins:
        windows = np.lib.stride_tricks.sliding_window_view(body[begins:ends], size)
        found = np.flatnonzero((windows == question[columns[:size]]).all(1))
        if len(found):
            place = begins + found[0]
            goes_on = np.array_equal(body[place + size : place + size + end], question[columns[size:]])
            known = size + end * goes_on
            sources[columns[:known]] = place + np.arange(known)
    return sources


def readings(rng, lengths, tokens, longest, style):
    """Where a lane reads: for each row its reading, its part of it, and its first token among `tokens`."""
    places, reading, part, start, end = [], -1, 0, 0, 0
    for length in lengths:
        if start + length > end:
            size = int(longest * (max(longest, style.longest_reading) / longest) ** rng.random())
            size = min(size, tokens - 1)
            reading, part, start = reading + 1, 0, int(rng.integers(0, tokens - size))
            end = start + size
        places.append((reading, part, start))
        part, start = part + 1, start + length
    return places
