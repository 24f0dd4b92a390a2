"""What a text would be worth to a model that forgot nothing of it: a cache of all its hidden states.

Beside the model's own probability P of the next token stands what came after the places of the text whose states were
like the present one (Grave et al., arXiv 1612.04426; Khandelwal et al., arXiv 1911.00172):

    (1 - λ) P_t + λ Σ_i softmax_i(θ cos(h_t, h_i)) [x_{i+1} = x_{t+1}]

Of the text's own places those count that lie beyond the local window of the model, so that a compressive memory could
have held them. The cache grows with the text; it is a measure of what there is to remember, not a way to read.
"""

import torch
from torch.nn import functional as F

from ..cache import InfiniCache, infini_config_of

BLOCK = 512


@torch.no_grad()
def read_states(model, ids):
    """Read a text segment after segment.

    Args:
        model (`PreTrainedModel`): a patched causal model.
        ids (`torch.Tensor`): `(1, seq_len)` int64.

    Returns:
        `tuple`: the hidden states before the output head, `(seq_len, hidden_size)` float32, and the losses of the
        tokens after the first, `(seq_len - 1,)` float32 in nats.
    """
    cache, length = InfiniCache(model.config), infini_config_of(model.config).segment_length
    states, losses = [], []
    for start in range(0, ids.shape[1], length):
        part = ids[:, start : start + length]
        output = model(part, past_key_values=cache, use_cache=True, output_hidden_states=True)
        targets = ids[0, start + 1 : start + 1 + length]
        states.append(output.hidden_states[-1][0].float())
        losses.append(F.cross_entropy(output.logits[0, : len(targets)].float(), targets, reduction="none"))
    return torch.cat(states), torch.cat(losses)


def cache_shares(states, ids, held_states, held_ids, window, sharpness):
    """What the places of a text give to the token that comes next.

    Args:
        states (`torch.Tensor`): `(seq_len, hidden_size)`, of the text that is read.
        ids (`torch.Tensor`): `(seq_len,)` int64, its tokens.
        held_states (`torch.Tensor`), held_ids (`torch.Tensor`): of the text whose places are looked up, as long at
            least; its own, or another as a control.
        window (`int`): how far a place has to lie behind, in tokens.
        sharpness (`float`): θ.

    Returns:
        `torch.Tensor`: `(seq_len - 1,)` float32; NaN where there is no place yet.
    """
    states, held_states = F.normalize(states, dim=-1), F.normalize(held_states, dim=-1)
    shares = states.new_zeros(len(ids) - 1)
    for start in range(0, len(shares), BLOCK):
        stop = min(start + BLOCK, len(shares))
        behind = torch.arange(start, stop)[:, None] - torch.arange(max(0, stop - window))
        scores = sharpness * (states[start:stop] @ held_states[: behind.shape[1]].T)
        weights = scores.masked_fill(behind < window, -torch.inf).softmax(-1)
        same = held_ids[1 : behind.shape[1] + 1] == ids[start + 1 : stop + 1, None]
        shares[start:stop] = (weights * same).sum(-1)
    return shares


def with_cache(losses, shares, part):
    """The losses of a mixture with a cache.

    Args:
        losses (`torch.Tensor`): `(n,)` in nats, of the model.
        shares (`torch.Tensor`): `(n,)`, as from [`cache_shares`].
        part (`float`): λ, what the cache counts where it has any place.

    Returns:
        `torch.Tensor`: `(n,)` in nats.
    """
    mixed = -torch.log((1 - part) * torch.exp(-losses) + part * shares)
    return torch.where(shares.isnan(), losses, mixed)
