"""Retrieval supervision: in training, the memory is told which token each token of an answer should be read from.

What a query weighs token t of the memory with is its share of the denominator of Eq. 3, and the shares sum to one:

    share_t = σ(q) σ(k_t) / (σ(q) z)

The language-model loss has to find out by itself which heads are to tell facts apart, and is content with a few.
This loss reaches the keys and queries of every head of the layers that it is asked for: each by itself, or as they
vote together ([`infini_hf.retrieval_losses`]). It needs the source of each answer, which rows that were made for it
know; reading needs nothing. Its idea is that of the supporting facts of memory networks (Weston et al., arXiv
1410.3916). Of a fact that says its answer twice, the first mention is the source.
"""

from contextlib import contextmanager

import torch

from . import memory as memory_math
from . import retrieval_losses as losses
from .cache import infini_config_of
from .projections import watched
from .told_layers import ToldLayers, ToldReading


class RetrievalSupervision(ToldLayers):
    """What each told token counts, in which layers, and against what else.

    Args:
        weight (`float`): what it counts for each told token, beside the loss of one token.
        layers (`list[int]`, *optional*): indices of the patched layers that are told; all of them by default.
        negatives (`float`, *optional*, defaults to `0.0`): how much of the other rows' memories a share has to stand
            up to beside its own row's, as if these had been read too. Rows whose writes are scaled are left out.
        loss (`str`, *optional*, defaults to `"share"`): `"share"`, -log share in every head by itself, or `"votes"`,
            the cross-entropy of the heads' shares taken together, or `"tokens"`, the same with the places of each
            token taken together, against the source alone; both with a little of the former. Candidates are the
            places that some token of the row is told of.
        contrast (`float`, *optional*, defaults to `0.0`): what it counts beside that, that softmax attention with the
            memory's queries and keys would find the source.
        reach (`str`, *optional*, defaults to `"model"`): how far the gradient goes: `"model"`, to every weight below,
            or `"projections"`, to the memory's own projections of the layers that are told, and no further.
    """

    NAME = "retrieval"
    REMEDY = (
        "has its source in the memory: give the rows a column `sources`, and put the sources segments before the "
        "answers"
    )

    def __init__(self, weight, layers=None, negatives=0.0, loss="share", contrast=0.0, reach="model"):
        super().__init__(weight, layers, reach)
        self.negatives, self.loss, self.contrast = negatives, loss, contrast

    @classmethod
    def from_args(cls, args):
        """As [`InfiniTrainingArguments`] say."""
        names = "weight", "layers", "negatives", "loss", "contrast", "reach"
        return cls(*(getattr(args, f"retrieval_{name}") for name in names))

    @contextmanager
    def reading(self, model, ids, sources, attention_mask, seen, write_scale=None, watch=None):
        """Watch a micro-batch being read, segment after segment.

        Args:
            model (`PreTrainedModel`): the patched model.
            ids (`torch.Tensor`): `(batch, seq_len)` int64: what is read.
            sources (`torch.Tensor`, *optional*): `(batch, seq_len)` int64, for each token the column of the token that
                it repeats, or -1; without it, or at weight 0, nothing is watched.
            attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding.
            seen (`tuple[int, ...]`): tokens that each row's memory had read before; empty for none.
            write_scale (`torch.Tensor`, *optional*): as in [`infini_hf.segment_step.StepOptions`].
            watch (`Callable`, *optional*): told of each segment as well.

        Yields:
            [`Reading`]: its `begin` is to be told of each segment; its `loss` is the sum over the told tokens.
        """
        config = infini_config_of(model.config)
        if sources is None or not self.weight:
            yield Reading(watch=watch)
            return
        layers = self.layers_of(model)
        told = told_tokens(sources, attention_mask, seen, config.segment_length)
        reading = Reading(config, len(layers), self.reach, watch)
        reading.tell(ids, *told, write_scale, self)
        with watched(layers, reading.note):
            yield reading
        self.shares += reading.shares.cpu()


class BoundedKeys(torch.autograd.Function):
    """`map_keys(keys, "exp")` whose gradient may lead back from the bound, though not further up.

    Two names whose keys both stand at exp(8) in the same channel are told apart by nothing, and the exact gradient of
    the bound, zero, would leave them there.
    """

    @staticmethod
    def forward(ctx, keys):
        mapped = memory_math.map_keys(keys, "exp")
        ctx.save_for_backward(keys, mapped)
        return mapped

    @staticmethod
    def backward(ctx, gradient):
        keys, mapped = ctx.saved_tensors
        passes = (keys < memory_math.LARGEST_EXPONENT) | (gradient > 0)
        return torch.where(passes, gradient * mapped, 0.0).to(keys.dtype)


def map_told_keys(keys, feature_map):
    """`map_keys`, with a gradient for keys at the bound of `"exp"`."""
    return BoundedKeys.apply(keys) if feature_map == "exp" else memory_math.map_keys(keys, feature_map)


def segments_closed(ids, attention_mask, seen, length):
    """How many segments each row has closed before each column, and which columns are no padding, `(batch, seq_len)`.

    Returns:
        `tuple`: int64, counted from where the row began, and bool.
    """
    valid = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    began = torch.tensor(seen or (0,) * len(ids), device=ids.device)[:, None]
    return (began + valid.cumsum(1) - valid) // length - began // length, valid.bool()


def told_tokens(sources, attention_mask, seen, length):
    """The tokens whose source lies in the memory, and where every column stands.

    A query that the boundary of a segment parts from the first column of its call reads another memory than the one
    the call began with, and is left out.

    Returns:
        `tuple`: `rows`, `asked`, `stated`, each `(n,)` int64: the row, the column that predicts the token, and that of
        its source; `segment`, `(batch, seq_len)` int64: how many segments the row has closed before each column;
        `valid`, `(batch, seq_len)` bool: which columns are no padding.
    """
    segment, valid = segments_closed(sources, attention_mask, seen, length)
    rows, token = (sources >= 0).nonzero(as_tuple=True)
    stated, asked = sources[rows, token], token - 1
    now = segment[rows, asked]
    # The first token of a row is predicted by none.
    kept = (token > 0) & (segment[rows, stated] < now)
    kept &= segment[rows, asked.clamp_min(0) // length * length] == now
    return rows[kept], asked[kept], stated[kept], segment, valid


class Reading(ToldReading):
    """One micro-batch: keeps the keys of its segments, and adds up the loss as the queries come."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.keys, self.times = {}, None

    def tell(self, ids, rows, asked, stated, segment, valid, write_scale, settings):
        """Say which tokens are told of, as from [`told_tokens`], of the ids `(batch, seq_len)` that are read."""
        self.rows, self.asked, self.stated, self.segment, self.valid = rows, asked, stated, segment, valid
        self.settings, self.shares = settings, self.shares.to(rows.device)
        # Every place once, however many tokens repeat it.
        self.places, self.target = torch.stack([rows, stated]).unique(dim=1, return_inverse=True)
        self.tokens = ids[tuple(self.places)]
        if write_scale is not None:
            write_scale = write_scale.to(rows.device)
            self.times = write_scale.gather(1, segment.clamp_max(write_scale.shape[1] - 1))
            self.unscaled = (write_scale == 1).all(1)

    def cut(self):
        """Keep the keys as they are, cut from the graph that computed them."""
        self.keys = {index: [keys.detach() for keys in held] for index, held in self.keys.items()}

    def note_segment(self, layer, queries, keys):
        """Keep the keys, and add what the told tokens of this segment cost."""
        held = self.keys.setdefault(layer.layer_idx, [])
        held.append(keys)
        length = self.config.segment_length
        here = (self.asked // length == self.index).nonzero().flatten()
        if not len(here):
            return
        # Layers may live on devices of their own.
        device = queries.device
        rows, asked, stated = (part[here].to(device) for part in (self.rows, self.asked, self.stated))
        gate, kind, norms = layer.memory_gate, self.config.feature_map, self.norms[layer.layer_idx]
        # (n, num_heads, head_dim) and (n, num_kv_heads, head_dim), the queries as rows of one token.
        raw = gate.center_queries(queries[rows, :, asked - self.index * length].unsqueeze(2)).float()
        query = memory_math.map_queries(raw, kind).squeeze(2)
        raw_keys = gate.center_keys(torch.cat(held, dim=2)).float()
        mapped = map_told_keys(raw_keys, kind)
        if self.times is not None:
            mapped = mapped * self.times[:, None, : mapped.shape[2], None].to(device)
        source, written = mapped[rows, :, stated], self.written(mapped)
        # The number is that of the memory, the gradient that of the keys just mapped.
        norms = norms.detach() + written - written.detach()
        groups = query.shape[1] // source.shape[1]
        parts = (part.repeat_interleave(groups, dim=1) for part in (source, norms[rows], self.others(norms)[rows]))
        own, total, others = ((query * part).sum(-1) for part in parts)
        whole = (total + others).clamp_min(memory_math.SMALLEST_NORM)
        # What the row's own memory returns, whatever the sources had to stand up to.
        told = (own / total.clamp_min(memory_math.SMALLEST_NORM)).detach().mean(-1).sum()
        loss = losses.share_loss(own / whole)
        if self.settings.loss != "share" or self.settings.contrast:
            place_rows, columns, within, target = self.candidates(here, mapped.shape[2], device)
            keys = mapped[place_rows, :, columns]
            if self.settings.loss != "share":
                votes = losses.votes_of(query, keys, whole, within)
                found = losses.found_loss(self.settings.loss, votes, self.tokens.to(device), target)
                loss = found + losses.SHARE_PART * loss
            if self.settings.contrast:
                contrast = losses.contrast_loss(raw.squeeze(2), raw_keys[place_rows, :, columns], within, target)
                loss = loss + self.settings.contrast * contrast
        self.add(loss, told, len(here))

    def candidates(self, here, read, device):
        """The places that the told tokens `here` could be read from.

        Returns:
            `tuple`: rows and columns of the places, `(m,)`; which of them the memory of each told token's row holds,
            `(n, m)` bool; and the one that is its source, `(n,)`.
        """
        rows, columns = self.places
        now, then = self.segment[self.rows[here], self.asked[here]], self.segment[rows, columns]
        within = (self.rows[here, None] == rows) & (then < now[:, None])
        # What has not been read yet is held by none; some other column stands for it.
        parts = rows, columns.clamp_max(read - 1), within, self.target[here]
        return tuple(part.to(device) for part in parts)

    def written(self, mapped):
        """The part of z that the rows have written themselves, from mapped keys `(batch, heads, read, head_dim)`."""
        closed = self.segment < self.segment[:, self.index * self.config.segment_length, None]
        wrote = (closed & self.valid)[:, : mapped.shape[2]].to(mapped)
        return torch.einsum("bt,bhtd->bhd", wrote, mapped)

    def others(self, norms):
        """What z of the other rows is taken to add to that of each row, `(batch, num_kv_heads, head_dim)`."""
        if not self.settings.negatives:
            return torch.zeros_like(norms)
        norms = norms if self.times is None else norms * self.unscaled[:, None, None].to(norms.device)
        return self.settings.negatives * (norms.sum(0) - norms)
