"""What it costs, in one layer, that the memory returns told tokens from elsewhere than their sources.

Every loss is a sum over the told tokens. Queries are `(n, num_heads, head_dim)`, one for each of them, and keys
`(m, num_kv_heads, head_dim)`, one for each of the candidates: in training the places that sources are told of, in the
fit all of the row. `held` `(n, m)` says from which of them a told token could be read (those that its row's memory
holds), `target` `(n,)` from which it should be.
"""

import torch
from torch.nn import functional as F

LOSSES = ("share", "votes", "tokens")
REACHES = ("model", "projections")
# -log of a share that has vanished stays finite.
SMALLEST_SHARE = 1e-12
# By which the votes of a layer's heads, of which each has one to give, are scaled before they are compared.
VOTE_SCALE = 3.0
# What -log share counts beside the vote: the vote alone says nothing of the filler, which is no candidate.
SHARE_PART = 0.3


def share_loss(shares):
    """-log of the share of the source, `(n, num_heads)`, the mean over the heads."""
    return -shares.clamp_min(SMALLEST_SHARE).log().mean(-1).sum()


def votes_of(mapped_queries, mapped_keys, total, held):
    """What the heads together return of each place, `(n, m)` float32: the sum of its shares, -inf where not held.

    Args:
        mapped_queries, mapped_keys (`torch.Tensor`): after the feature map.
        total (`torch.Tensor`): `(n, num_heads)` float32, the denominators of the shares.
        held (`torch.Tensor`): `(n, m)` bool.
    """
    weights = pair_up(mapped_queries / total.unsqueeze(-1), mapped_keys)
    return weights.sum(1).masked_fill(~held, float("-inf"))


def vote_loss(votes, target):
    """The cross-entropy of the votes: a head may err where the others do not."""
    return F.cross_entropy(VOTE_SCALE * votes, target, reduction="sum")


def token_loss(votes, tokens, target):
    """The cross-entropy of the source's votes against those of each token, all candidates that hold it together.

    What reads the memory gets no places: it is not enough that the source has the most votes where three places that
    hold one other token have more. Candidates that hold the source's own token without being it are no help: together
    they are a rival too, for a name is to be found by itself.

    Args:
        votes (`torch.Tensor`): `(n, m)` float32, -inf where not held.
        tokens (`torch.Tensor`): `(m,)` int64: what each candidate holds.
        target (`torch.Tensor`): `(n,)` int64: which place is the source.
    """
    kinds, kind_of = tokens.unique(return_inverse=True)
    kind_of, own, held = kind_of.expand_as(votes), target[:, None], votes != -torch.inf
    source = votes.gather(1, own)
    rest, there = votes.masked_fill(~held, 0.0).scatter(1, own, 0.0), held.float().scatter(1, own, 0.0)
    rest, there = (part.new_zeros(len(part), len(kinds)).scatter_add(1, kind_of, part) for part in (rest, there))
    return vote_loss(torch.cat([source, rest.masked_fill(there == 0, -torch.inf)], dim=1), torch.zeros_like(target))


def found_loss(name, votes, tokens, target):
    """`token_loss` by the name of `"tokens"`, `vote_loss` by that of `"votes"`."""
    return token_loss(votes, tokens, target) if name == "tokens" else vote_loss(votes, target)


def contrast_loss(queries, keys, held, target):
    """The cross-entropy of `q k / sqrt(head_dim)`, as softmax attention would weigh the places; the mean over heads.

    The shares of "exp" reach a query and a key in the few channels in which both are large, and those of keys at its
    bound in none; this reaches all of them, and the layers below.
    """
    scores = pair_up(queries, keys) / queries.shape[-1] ** 0.5
    scores = scores.masked_fill(~held[:, None], float("-inf")).transpose(1, 2)
    return F.cross_entropy(scores, target[:, None].expand(-1, scores.shape[-1]), reduction="sum") / scores.shape[-1]


def pair_up(queries, keys):
    """The products of all queries with the keys that their heads share, `(n, num_heads, m)`."""
    groups = queries.shape[1] // keys.shape[1]
    queries = queries.unflatten(1, (-1, groups))
    return torch.einsum("nkgd,mkd->nkgm", queries, keys).flatten(1, 2)
