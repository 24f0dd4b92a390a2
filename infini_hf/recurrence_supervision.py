"""Recurrence supervision: in training, the memory is told to return what comes next, wherever it came before.

In ordinary text no token has one source, and many have several: the places, segments before, that hold the token that
comes next. With `y_t` the token after t, and i over what the memory holds of the row,

    p_t = mean over the heads of  Σ_{i: x_i = y_t} σ(q_t) σ(k_i) / (σ(q_t) z)

is what a cache of the text would give `y_t` (Grave et al., arXiv 1612.04426; Khandelwal et al., arXiv 1911.00172),
with the weights that the compressive memory has for it (Eq. 3). The loss is -log(p + 1e-4), where p is not 0.

The language-model loss reaches the memory through the gate, and finds that most of what it could return helps little
yet. This loss reaches keys and queries directly, and needs nothing but the text.
"""

from contextlib import contextmanager

import torch

from . import memory as memory_math
from .cache import infini_config_of
from .projections import watched
from .retrieval_supervision import map_told_keys, segments_closed
from .told_layers import ToldLayers

# About as frequent as a rare word: below it, a share is worth as little as what a model knows without a memory.
SMALLEST_SHARE = 1e-4


class RecurrenceSupervision(ToldLayers):
    """What each token that comes again counts, and in which layers; arguments as [`ToldLayers`]."""

    NAME = "recurrence"

    @classmethod
    def from_args(cls, args):
        """As [`InfiniTrainingArguments`] say."""
        return cls(args.recurrence_weight, args.recurrence_layers, args.retrieval_reach)

    @contextmanager
    def reading(self, model, ids, attention_mask, seen, left_out=None, watch=None):
        """Watch a micro-batch being read, segment after segment.

        Args:
            model (`PreTrainedModel`): the patched model.
            ids (`torch.Tensor`): `(batch, seq_len)` int64: what is read.
            attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding.
            seen (`tuple[int, ...]`): tokens that each row's memory had read before; empty for none. Of those it is
                not known which they were: they count for the denominator alone.
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
            valid = valid & ~left_out.to(valid.device)[:, None]
        reading = Recurrences((ids, segment, valid), config, len(layers), self.reach, watch)
        with watched(layers, reading.note):
            yield reading
        self.shares += reading.shares.cpu()


class Recurrences:
    """One micro-batch: of each layer, the sums of the mapped keys of each row by token, over closed segments.

    Attributes:
        loss (`torch.Tensor` or `float`): the sum of what the told tokens cost, the mean over the layers.
        shares (`torch.Tensor`): `(2,)`, the sum of p and the number of the told tokens.
    """

    def __init__(self, told=None, config=None, layers=0, reach="model", watch=None):
        self.config, self.layers, self.reach, self.watch = config, layers, reach, watch
        # No segment has begun: ranks may read filling first.
        self.index, self.loss, self.shares = None, 0.0, torch.zeros(2)
        self.told, self.norms, self.keys, self.sums = told is not None, {}, {}, {}
        if not self.told:
            return
        ids, self.segment, self.valid = told
        kinds, kind = ids.unique(return_inverse=True)
        # The rows of a table: one for each row of the batch and each token that occurs in it, then one for each row.
        self.place = kind + torch.arange(len(ids), device=ids.device)[:, None] * len(kinds)
        self.size, self.shares = len(ids) * len(kinds), self.shares.to(ids.device)
        self.closed = torch.zeros_like(self.valid)

    def begin(self, index, cache):
        """Called before segment `index` with the cache that enters it."""
        if self.watch is not None:
            self.watch(index, cache)
        if not self.told:
            return
        self.index, start = index, index * self.config.segment_length
        closed = (self.segment < self.segment[:, start, None]) & self.valid
        self.fresh, self.closed = closed & ~self.closed, closed
        for layer_index, layer in cache.infini_layers.items():
            self.norms[layer_index] = layer.memory_norm
            if index and not layer.memory_norm.requires_grad and layer_index in self.sums:
                # Where the state is cut, the gradient does not go around it.
                self.sums[layer_index] = self.sums[layer_index].detach()
                self.keys[layer_index] = [keys.detach() for keys in self.keys[layer_index]]

    def note(self, layer, queries, keys):
        """Called by each layer with what it has projected of the segment."""
        if self.index is not None:
            if self.reach == "projections":
                queries, keys = queries.detach(), keys.detach()
            with memory_math.no_autocast(queries):
                self.note_segment(layer, queries, keys)

    def note_segment(self, layer, queries, keys):
        """Keep the keys, and add what the told tokens of this segment cost."""
        gate, kind = layer.memory_gate, self.config.feature_map
        mapped = map_told_keys(gate.center_keys(keys).float(), kind)
        sums = self.close(layer.layer_idx, mapped)
        norms, (rows, asked) = self.norms[layer.layer_idx], self.asked(queries.shape[2], queries.device)
        # An empty memory has none yet.
        if norms is None or not len(rows):
            return
        start = self.index * self.config.segment_length
        # (n, num_heads, head_dim): queries as rows of one token, and the sums of what comes next.
        raw = gate.center_queries(queries[rows, :, asked].unsqueeze(2)).float()
        query = memory_math.map_queries(raw, kind).squeeze(2)
        own, written = sums[self.place.to(sums.device)[rows, start + asked + 1]], sums[self.size :]
        # The number is that of the memory, the gradient that of the keys just mapped.
        norms = norms.detach() + written - written.detach()
        groups = query.shape[1] // own.shape[1]
        own, total = (part.repeat_interleave(groups, dim=1) for part in (own, norms[rows]))
        own, total = (query * own).sum(-1), (query * total).sum(-1)
        share = (own / total.clamp_min(memory_math.SMALLEST_NORM)).mean(1)
        share = share[share > 0]
        loss = -(share + SMALLEST_SHARE).log().sum()
        self.loss = self.loss + loss.to(self.shares.device) / self.layers
        found = torch.stack([share.detach().sum(), share.new_tensor(len(share))])
        self.shares += found.to(self.shares.device) / self.layers

    def close(self, index, mapped):
        """The sums of what the rows' memories hold now, `(rows of the table, num_kv_heads, head_dim)`."""
        held = self.keys.setdefault(index, [])
        if index not in self.sums:
            self.sums[index] = mapped.new_zeros(self.size + len(mapped), *mapped.shape[1:4:2])
        if held:
            rows, columns = self.fresh.nonzero(as_tuple=True)
            keys = torch.cat(held, dim=2)
            first = self.index * self.config.segment_length - keys.shape[2]
            place, rows, columns = (
                part.to(mapped.device) for part in (self.place[rows, columns], rows, columns - first)
            )
            # In place: a gather keeps none of what it gathers from.
            for where in (place, self.size + rows):
                self.sums[index].index_add_(0, where, keys[rows, :, columns])
            # What is still open, with padding, may be older than one segment.
            still = (self.valid & ~self.closed)[:, first : first + keys.shape[2]].any(0).nonzero()
            held[:] = [keys[:, :, int(still[0]) :]] if len(still) else []
        held.append(mapped)
        return self.sums[index]

    def asked(self, columns, device):
        """Rows and columns, in the segment of `columns` at hand, of the tokens that ask for the next."""
        start = self.index * self.config.segment_length
        stop = min(start + columns, self.valid.shape[1] - 1)
        # A query that a boundary parts from the first column of its call reads another memory.
        same = self.segment[:, start:stop] == self.segment[:, start, None]
        asks = same & self.valid[:, start:stop] & self.valid[:, start + 1 : stop + 1]
        return asks.to(device).nonzero(as_tuple=True)
