"""Recall supervision: in training, the memory is told to return what comes next, wherever it came before.

In ordinary text no token has one source, and many have several: the places, segments before, that hold the token that
comes next. With `y_t` the token after t, and i over what the memory holds of the row,

    p_t = mean over the heads of  Σ_{i: x_i = y_t} σ(q_t) σ(k_i) / (σ(q_t) z)

is what a cache of the text would give `y_t` (Grave et al., arXiv 1612.04426; Khandelwal et al., arXiv 1911.00172),
with the weights that the compressive memory has for it (Eq. 3). The loss is -log(p + 1e-4) for the tokens that the
language-model loss learns and that the memory holds.

That loss reaches the memory through the gate, and finds that most of what it could return helps little yet. This one
reaches keys and queries directly, and needs nothing but the text.
"""

from contextlib import contextmanager

import torch

from . import memory as memory_math
from .cache import infini_config_of
from .projections import watched
from .retrieval_supervision import map_told_keys, segments_closed
from .segment_step import IGNORED
from .told_layers import ToldLayers, ToldReading

# About as frequent as a rare word: below it, a share is worth as little as what a model knows without a memory.
SMALLEST_SHARE = 1e-4


class RecallSupervision(ToldLayers):
    """What each token that comes again counts, and in which layers; arguments as [`ToldLayers`]."""

    NAME = "recall"
    REMEDY = "came in a segment before: give longer rows, of which not all have sources or scaled writes"

    @classmethod
    def from_args(cls, args):
        """As [`InfiniTrainingArguments`] say."""
        return cls(args.recall_weight, args.recall_layers, args.retrieval_reach)

    @contextmanager
    def reading(self, model, ids, labels, attention_mask, seen, left_out=None, watch=None):
        """Watch a micro-batch being read, segment after segment.

        Args:
            model (`PreTrainedModel`): the patched model.
            ids (`torch.Tensor`): `(batch, seq_len)` int64: what is read.
            labels (`torch.Tensor`): `(batch, seq_len)` int64, -100 at tokens that are told nothing of.
            attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding.
            seen (`tuple[int, ...]`): tokens that each row's memory had read before; empty for none. Which they were
                is not known: they count for the denominator alone.
            left_out (`torch.Tensor`, *optional*): `(batch,)` bool: rows that are told nothing.
            watch (`Callable`, *optional*): told of each segment as well.

        Yields:
            [`Recurrences`]: its `begin` is to be told of each segment; its `loss` is the sum over the told tokens.
        """
        if not self.weight:
            yield Recurrences(watch=watch)
            return
        layers, config = self.layers_of(model), infini_config_of(model.config)
        segment, valid = segments_closed(ids, attention_mask, seen, config.segment_length)
        if left_out is not None:
            valid = valid & ~left_out[:, None]
        reading = Recurrences(config, len(layers), self.reach, watch)
        reading.tell(ids, valid & (labels != IGNORED), segment, valid)
        with watched(layers, reading.note):
            yield reading
        self.shares += reading.shares.cpu()


class Recurrences(ToldReading):
    """One micro-batch: of each layer, the sums of the mapped keys over closed segments, by row and token."""

    def tell(self, ids, learned, segment, valid):
        """Say what is read and told of; all `(batch, seq_len)`.

        Args:
            ids (`torch.Tensor`): int64.
            learned (`torch.Tensor`): bool: the tokens that are told of.
            segment (`torch.Tensor`): int64, segments that the row has closed before each column.
            valid (`torch.Tensor`): bool: the columns that are written.
        """
        self.segment, self.valid, self.learned = segment, valid, learned
        row = torch.arange(len(ids), device=ids.device)[:, None]
        # The rows of a table: one for each row of the batch and token in it, one for what is not written, and then
        # one for each row of the batch.
        pairs = torch.where(valid, ids + row * (ids.max() + 1), -1)
        found, self.place = pairs.unique(return_inverse=True)
        self.counts = torch.zeros_like(found)
        self.shares, self.closed = self.shares.to(ids.device), torch.zeros_like(valid)
        self.keys, self.sums = {}, {}

    def begin(self, index, cache):
        """Called before segment `index` with the cache that enters it: finds out what is closed now, and who asks."""
        super().begin(index, cache)
        if not self.layers:
            return
        start = index * self.config.segment_length
        stop = min(start + self.config.segment_length, self.valid.shape[1] - 1)
        now = self.segment[:, start, None]
        closed = (self.segment < now) & self.valid
        self.fresh, self.closed = closed & ~self.closed, closed
        self.counts += self.place[self.fresh].bincount(minlength=len(self.counts))
        # A query that a boundary parts from the first column of its call reads another memory.
        asks = (self.segment[:, start:stop] == now) & self.valid[:, start:stop]
        comes = self.place[:, start + 1 : stop + 1]
        asks &= self.learned[:, start + 1 : stop + 1] & (self.counts[comes] > 0)
        self.asked, self.comes = asks.nonzero(as_tuple=True), comes[asks]

    def cut(self):
        """Keep the sums as they are, cut from the graph that computed them."""
        self.sums = {index: sums.detach() for index, sums in self.sums.items()}
        self.keys = {index: [keys.detach() for keys in held] for index, held in self.keys.items()}

    def note_segment(self, layer, queries, keys):
        """Keep the keys, and add what the told tokens of this segment cost."""
        gate, feature_map = layer.memory_gate, self.config.feature_map
        sums = self.close(layer.layer_idx, map_told_keys(gate.center_keys(keys).float(), feature_map))
        if not len(self.comes):
            return
        rows, asked, comes = (part.to(queries.device) for part in (*self.asked, self.comes))
        # (n, num_heads, head_dim): queries as rows of one token, and the sums of what comes next.
        raw = gate.center_queries(queries[rows, :, asked].unsqueeze(2)).float()
        query = memory_math.map_queries(raw, feature_map).squeeze(2)
        own, written = sums[comes], sums[len(self.counts) :]
        # The number is that of the memory, the gradient that of the keys just mapped.
        norms = self.norms[layer.layer_idx].detach() + written - written.detach()
        groups = query.shape[1] // own.shape[1]
        parts = (part.repeat_interleave(groups, dim=1) for part in (own, norms[rows]))
        own, total = ((query * part).sum(-1) for part in parts)
        share = (own / total.clamp_min(memory_math.SMALLEST_NORM)).mean(1)
        self.add(-(share + SMALLEST_SHARE).log().sum(), share.sum(), len(rows))

    def close(self, index, mapped):
        """The sums of what the rows' memories hold now.

        Args:
            index (`int`): the layer.
            mapped (`torch.Tensor`): `(batch, num_kv_heads, columns, head_dim)` float32, the keys of the segment at
                hand, which is not closed yet.

        Returns:
            `torch.Tensor`: `(rows of the table, num_kv_heads, head_dim)` float32.
        """
        batch, kv_heads, _, head_dim = mapped.shape
        held = self.keys.setdefault(index, [])
        if index not in self.sums:
            self.sums[index] = mapped.new_zeros(len(self.counts) + batch, kv_heads, head_dim)
        if held:
            keys = torch.cat(held, dim=2)
            first = self.index * self.config.segment_length - keys.shape[2]
            rows, columns = self.fresh.nonzero(as_tuple=True)
            place = self.place[rows, columns].to(mapped.device)
            rows, columns = rows.to(mapped.device), columns.to(mapped.device) - first
            # In place: a gather keeps none of what it gathers from.
            for where in (place, len(self.counts) + rows):
                self.sums[index].index_add_(0, where, keys[rows, :, columns])
            # What is still open, with padding, may be older than one segment.
            still = (self.valid & ~self.closed)[:, first : first + keys.shape[2]].any(0).nonzero()
            held[:] = [keys[:, :, int(still[0]) :]] if len(still) else []
        held.append(mapped)
        return self.sums[index]
