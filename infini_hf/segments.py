"""The plan of a call: where its tokens fall into segments, for every row, whatever was read before.

A call brings `columns` columns of tokens, some of them padding. Each row counts its own valid tokens, so rows of one
batch may stand at different places of their segments. The plan cuts the call into rounds in which no row crosses a
segment boundary. In a round everything is right-aligned: the last `window + count` columns of the keys are a row's
local window and its new tokens, in order, at positions 0, 1, 2 … of the window.

Counts are Python numbers: after one look at the padding mask nothing here waits for the device.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Layout:
    """How a round's keys lie: what rows hold and get, and everything that follows from it. Equal rounds share one."""

    windows: tuple[int, ...]
    counts: tuple[int, ...]
    device: torch.device

    @cached_property
    def window(self):
        return max(self.windows)

    @cached_property
    def count(self):
        return max(self.counts)

    @cached_property
    def lengths(self):
        return [window + count for window, count in zip(self.windows, self.counts, strict=True)]

    @cached_property
    def length(self):
        return max(self.lengths)

    @cached_property
    def is_uniform(self):
        return len(set(self.windows)) == len(set(self.counts)) == 1

    @cached_property
    def join_index(self):
        """`(batch, length)` columns of (window, new tokens) that make each row right-aligned; `None` if they are."""
        if len(set(self.counts)) == 1:
            return None
        column = torch.arange(self.length)[None] - torch.tensor([self.length - n for n in self.lengths])[:, None]
        windows, counts = torch.tensor(self.windows)[:, None], torch.tensor(self.counts)[:, None]
        in_window = self.window - windows + column
        in_new = self.window + self.count - counts + column - windows
        return torch.where(column < windows, in_window, in_new).clamp_min(0).to(self.device)

    @cached_property
    def padding(self):
        """`(batch, length)` bool, true where a key is a real one; `None` if all are."""
        if len(set(self.lengths)) == 1:
            return None
        starts = torch.tensor([self.length - n for n in self.lengths])
        return (torch.arange(self.length)[None] >= starts[:, None]).to(self.device)

    @cached_property
    def positions(self):
        """`(1 or batch, length)` int64 window positions of the keys, 0 where there is none."""
        lengths = self.lengths[:1] if self.padding is None else self.lengths
        shifts = torch.tensor([self.length - n for n in lengths])
        return (torch.arange(self.length)[None] - shifts[:, None]).clamp_min(0).to(self.device)

    def carry_index(self, kept, first):
        """`(batch, max kept)` columns of the keys to carry on: of each row's `kept`, `first` from the start."""
        width = max(kept)
        lengths, kept = torch.tensor(self.lengths)[:, None], torch.tensor(kept)[:, None]
        column = torch.arange(width)[None] - (width - kept)
        from_start = column < torch.tensor(first)[:, None]
        index = torch.where(from_start, column, lengths - kept + column) + self.length - lengths
        return index.clamp(0, self.length - 1).to(self.device)


@dataclass(frozen=True)
class Round:
    """One stretch of the call.

    Attributes:
        layout (`Layout`): how the keys lie.
        columns (`slice` or `torch.Tensor`): which columns of the call, or `(batch, count)` int64, right-aligned.
        reads (`tuple[bool, ...]`): the rows whose memory holds something.
        closes (`tuple[bool, ...]`): the rows that reach the end of their segment here.
        closed (`tuple[int, ...]`): segments that each row has closed in the call before.
    """

    layout: Layout
    columns: slice | torch.Tensor
    reads: tuple[bool, ...]
    closes: tuple[bool, ...]
    closed: tuple[int, ...]

    @property
    def is_uniform(self):
        """Whether the round is one stretch of columns, the same for all rows, whose windows are alike too."""
        return isinstance(self.columns, slice) and self.layout.is_uniform

    def flags(self, values):
        """A row flag of this round as a `(batch,)` float32 tensor on the device."""
        return torch.tensor(values, dtype=torch.float32, device=self.layout.device)


@dataclass
class SegmentPlan:
    """All rounds of one call, made once and used by every patched layer.

    Args:
        config ([`InfiniConfig`]): the geometry of segments.
        seen (`tuple[int, ...]`): valid tokens each row had read before the call.
        columns (`int`): columns of the call.
        valid (`torch.Tensor`, *optional*): `(batch, columns)` bool, false at padding; all valid by default.
        device (`torch.device`): where index tensors go.
        rope (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines `(1, window, head_dim)` of the window positions.
        write_scale (`torch.Tensor`, *optional*): `(batch, n)` float32, how many times the segments that a row closes
            in the call are written, in their order; the last for all that follow.
    """

    config: object
    seen: tuple[int, ...]
    columns: int
    valid: torch.Tensor | None
    device: torch.device
    rope: tuple[torch.Tensor, torch.Tensor]
    write_scale: torch.Tensor | None = None
    rounds: list[Round] = field(init=False)
    seen_after: tuple[int, ...] = field(init=False)
    scatter_index: torch.Tensor | None = field(init=False, default=None)
    shared: dict = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.valid is not None and bool(self.valid.all()):
            self.valid = None
        if self.valid is None:
            fresh, order = [self.columns] * len(self.seen), None
        else:
            fresh = self.valid.sum(1).tolist()
            # Valid columns first, each row in its order.
            order = torch.argsort((~self.valid).to(torch.int8), dim=1, stable=True)
        self.seen_after = tuple(seen + new for seen, new in zip(self.seen, fresh, strict=True))
        self.rounds = self._cut(fresh, order)
        if any(isinstance(round.columns, torch.Tensor) for round in self.rounds) or (
            self.rounds == [] and self.columns
        ):
            self.scatter_index = self._scatter_index()

    def _cut(self, fresh, order):
        length, rounds, layouts = self.config.segment_length, [], {}
        done = [0] * len(self.seen)
        while any(d < f for d, f in zip(done, fresh, strict=True)):
            seen = [s + d for s, d in zip(self.seen, done, strict=True)]
            counts = tuple(min(f - d, length - s % length) for s, d, f in zip(seen, done, fresh, strict=True))
            windows = tuple(self.config.window_length(s) for s in seen)
            layout = layouts.setdefault((windows, counts), Layout(windows, counts, self.device))
            rounds.append(
                Round(
                    layout,
                    self._columns(order, done, counts),
                    reads=tuple(s >= length for s in seen),
                    closes=tuple(c > 0 and (s + c) % length == 0 for s, c in zip(seen, counts, strict=True)),
                    closed=tuple(s // length - first // length for s, first in zip(seen, self.seen, strict=True)),
                )
            )
            done = [d + c for d, c in zip(done, counts, strict=True)]
        return rounds

    def _columns(self, order, done, counts):
        if order is None and len(set(counts)) == len(set(done)) == 1:
            return slice(done[0], done[0] + counts[0])
        ends = torch.tensor([d + c for d, c in zip(done, counts, strict=True)])
        index = (ends[:, None] - max(counts) + torch.arange(max(counts))).clamp_min(0).to(self.device)
        return index if order is None else order.gather(1, index)

    def _scatter_index(self):
        """`(batch, columns)`: where a column's output stands in those of all rounds; past the end if nowhere."""
        total = sum(round.layout.count for round in self.rounds)
        index = torch.full((len(self.seen), self.columns + 1), total, device=self.device)
        offset = 0
        for round in self.rounds:
            count = round.layout.count
            columns = round.columns
            if isinstance(columns, slice):
                columns = torch.arange(columns.start, columns.stop, device=self.device).expand(len(self.seen), -1)
            starts = torch.tensor([count - c for c in round.layout.counts], device=self.device)
            real = torch.arange(count, device=self.device)[None] >= starts[:, None]
            # What stands left of a row's real tokens goes to a spare column.
            target = torch.where(real, columns, self.columns)
            index.scatter_(1, target, (offset + torch.arange(count, device=self.device)).expand_as(target))
            offset += count
        return index[:, : self.columns]

    def scale_of(self, round):
        """How many times each row writes at the end of a round, `(batch,)` float32; `None` for once in every row."""
        return self.share(("scale", id(round)), lambda: self._scale_of(round))

    def _scale_of(self, round):
        closes = None if all(round.closes) else round.flags(round.closes)
        if self.write_scale is None:
            return closes
        last = self.write_scale.shape[1] - 1
        index = torch.tensor([min(closed, last) for closed in round.closed], device=self.write_scale.device)
        scale = self.write_scale.gather(1, index[:, None]).squeeze(1)
        return scale if closes is None else scale * closes.to(scale.device)

    def is_whole(self, round):
        """Whether a round is one whole segment in every row."""
        return round.is_uniform and round.layout.count == self.config.segment_length

    def runs(self, most):
        """The rounds in their order, in lists: whole segments of one layout that follow one another stand together.

        Args:
            most (`int`): rounds in a list.
        """
        runs = []
        for round in self.rounds:
            last = runs[-1] if runs else ()
            # Layouts are shared, so that a round like a whole segment is one.
            if self.is_whole(round) and 0 < len(last) < most and last[0].layout is round.layout:
                last.append(round)
            else:
                runs.append([round])
        return runs

    def reads_of(self, run):
        """`(batch * len(run),)` float32, 0 for each row and segment whose memory is empty; `None` if none is."""
        if all(all(round.reads) for round in run):
            return None

        def build():
            flags = torch.tensor([round.reads for round in run], dtype=torch.float32)
            return flags.T.flatten().to(self.device)

        return self.share(("reads", *map(id, run)), build)

    def scales_of(self, run):
        """How many times whole segments are written, `(batch, len(run))` float32; `None` for once."""
        if self.write_scale is None:
            return None
        return torch.stack([self.scale_of(round) for round in run], dim=1)

    def share(self, key, build):
        """`build()`, kept under `key` for the other layers and rounds of the call."""
        if key not in self.shared:
            self.shared[key] = build()
        return self.shared[key]
