"""The projections of one layer of the memory, apart from the model, and how a fit of them begins."""

import torch
from torch.nn import functional as F

from . import memory as memory_math
from .cache import infini_config_of
from .gate import affine
from .retrieval_losses import pair_up
from .retrieval_supervision import map_told_keys

ROWS_TO_SCALE_BY = 64


class LayerFit:
    """The projections of one layer, as maps of states that have been given mean 0 and one scale in each head.

    Args:
        layer ([`InfiniAttention`]): its projections are where the fit begins.
        rows (`list[ToldRow]`): what the mean and the scale are taken from.
    """

    def __init__(self, layer, rows):
        self.index, self.gate = layer.layer_idx, layer.memory_gate
        self.feature_map = infini_config_of(layer.config).feature_map
        # One of a few rows is enough to know them by.
        some = rows[:: max(1, len(rows) // ROWS_TO_SCALE_BY)]
        self.scaling = {
            "query": scaling_of(torch.cat([row.queries[self.index] for row in some], dim=1)),
            "key": scaling_of(torch.cat([row.keys[self.index] for row in some], dim=1)),
        }
        self.query = self.inside("query", self.gate.query_projection.weight)
        self.key = self.inside("key", self.gate.key_projection.weight)

    def inside(self, name, weight):
        """A map of states, the weight of a [`HeadProjection`], as one of scaled states."""
        # In float64: means may be large, and products of float32 rounded to bfloat16.
        weight = weight.detach().cpu().double()
        mean, scale = self.scaling_of_inputs(name, weight)
        bias = weight[:, -1] + torch.einsum("hd,hdc->hc", mean, weight[:, :-1])
        return torch.cat([weight[:, :-1] * scale[..., None], bias[:, None]], dim=1).float().requires_grad_()

    def outside(self, name, weight):
        """The inverse of `inside`."""
        weight = weight.detach().double()
        mean, scale = self.scaling_of_inputs(name, weight)
        linear = weight[:, :-1] / scale[..., None]
        bias = weight[:, -1] - torch.einsum("hd,hdc->hc", mean, linear)
        return torch.cat([linear, bias[:, None]], dim=1).float()

    def scaling_of_inputs(self, name, weight):
        """Mean and scale of what each head's map is of, `(heads, inputs)` both."""
        (mean, scale), (heads, inputs, _) = self.scaling[name], weight.shape
        mean, scale = mean.to(weight), scale.to(weight)[:, None].expand_as(mean)
        if inputs - 1 == mean.shape[1]:
            return mean, scale
        return mean.reshape(1, -1).expand(heads, -1), scale.reshape(1, -1).expand(heads, -1)

    def states(self, row, name):
        """Scaled queries `(num_heads, n, head_dim)` or keys `(num_kv_heads, seq_len, head_dim)` of a row, float32."""
        mean, scale = self.scaling[name]
        states = (row.queries if name == "query" else row.keys)[self.index].float()
        return (states - mean[:, None]) / scale[:, None, None]

    def shares(self, row, times=None):
        """What each head returns of each token that the memory holds, `(n, num_heads, seq_len)` float32.

        `times` `(seq_len,)` is how often each token counts.
        """
        queries, keys = affine(self.states(row, "query"), self.query), affine(self.states(row, "key"), self.key)
        queries, keys = memory_math.map_queries(queries, self.feature_map), map_told_keys(keys, self.feature_map)
        if times is not None:
            keys = keys * times[:, None]
        weights = pair_up(queries.transpose(0, 1), keys.transpose(0, 1)) * row.held[:, None]
        return weights / weights.sum(-1, keepdim=True).clamp_min(memory_math.SMALLEST_NORM)

    def start_anew(self, rows, steps, generator, spread=2.0, rows_in_step=6, loudness=3.0):
        """Begin anew: a match by inner products, turned at random, and louder keys for what is asked for later.

        exp(Rq) exp(Rk) summed over the channels estimates the softmax kernel of q and k up to their norms, for a
        random rotation R (Choromanski et al., arXiv 2009.14794): a beginning from which every channel can learn.
        Of "softmax", a large `spread` leaves each token the one channel that it is nearest to, as cross-polytope
        hashing does (Andoni et al., arXiv 1509.02897).
        """
        heads, kv_heads, dim = self.query.shape[0], self.key.shape[0], self.query.shape[-1]
        query, key = (linear_map(part.shape, generator) for part in (self.query, self.key))

        def match(row):
            queries, keys = affine(self.states(row, "query"), query), affine(self.states(row, "key"), key)
            scores = pair_up(queries.transpose(0, 1), keys.transpose(0, 1)) / dim**0.5
            scores = scores.masked_fill(~row.held[:, None], -torch.inf)
            return F.cross_entropy(scores.flatten(0, 1), row.target.repeat_interleave(heads))

        descend(match, rows, [query, key], steps, rows_in_step, generator, 5e-3)
        # One direction of each head, and all channels of a key go with it.
        loud = torch.zeros(kv_heads, self.key.shape[1], 1, requires_grad=True)

        def heard(row):
            stated = torch.zeros(len(row.ids)).index_fill(0, row.target, 1.0).expand(kv_heads, -1)
            scores = affine(self.states(row, "key"), loud).squeeze(-1)
            return F.binary_cross_entropy_with_logits(scores, stated, pos_weight=torch.tensor(10.0))

        descend(heard, rows, [loud], steps, rows_in_step, generator, 2e-2)
        turned = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=generator))[0] * spread
        groups = heads // kv_heads
        with torch.no_grad():
            self.query.copy_(query @ turned.repeat_interleave(groups, dim=0))
            self.key.copy_(key @ turned + loud)
            self.key[:, -1] += loudness

    def store(self):
        """Give the layer what was fitted."""
        with torch.no_grad():
            for name, projection in (("query", self.gate.query_projection), ("key", self.gate.key_projection)):
                projection.weight.copy_(self.outside(name, getattr(self, name)))


def linear_map(shape, generator):
    """A random weight of a [`HeadProjection`], without a bias at first."""
    weight = torch.randn(shape, generator=generator) / (shape[1] - 1) ** 0.5
    weight[:, -1] = 0.0
    return weight.requires_grad_()


def drawn(rows, count, generator):
    """So many rows at random; one may come twice."""
    return [rows[index] for index in torch.randint(len(rows), (count,), generator=generator).tolist()]


def descend(loss_of, rows, parameters, steps, count, generator, learning_rate):
    """Adam on the mean loss of a few rows a step."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        loss = sum(loss_of(row) for row in drawn(rows, count, generator)) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def scaling_of(states):
    """Mean `(heads, head_dim)` and one standard deviation for each head, of `(heads, n, head_dim)`; float32."""
    states = states.float()
    mean = states.mean(1)
    return mean, (states - mean[:, None]).square().mean((1, 2)).sqrt().clamp_min(1e-6)
