"""What a memory of a fixed size could hold of a text, were nothing to be learned: the errors of the model, in cells.

Of place i the model's last state `h_i` predicts `P_i`, and what comes is `x_{i+1}`. With E the output embeddings, the
error is what a step of gradient descent would add to that state, of the size of a state whatever the vocabulary is:

    e_i = E[x_{i+1}] - Σ_w P_i(w) E[w]

A memory of errors adds what it retrieves to the state before the head, once with every place behind a window kept and
weighed as a cache weighs it (Grave et al., arXiv 1612.04426), and once as the compressive memory holds it (Eq. 3 to 5
of arXiv 2404.07143): keys are the shares that a state has in `n` cells, so that M is `(n, hidden_size)` and z `(n,)`,

    h_t + γ σ(h_t) M / (σ(h_t) z),    σ(h) = softmax(θ cos(h / |h| - mean, cells))
"""

import torch
from torch.nn import functional as F

from .. import memory as memory_math
from .text_cache import BLOCK

ROUNDS = 12
MOST_STATES = 40_000
# In nats; half precision differs by less.
HEAD_TOLERANCE = 0.1


class States:
    """What was read of a text: all that a memory of errors needs.

    Args:
        states (`torch.Tensor`): `(seq_len, hidden_size)` float32, before the output head.
        ids (`torch.Tensor`): `(seq_len,)` int64.
        embeddings (`torch.Tensor`): `(vocab_size, hidden_size)`, of the output head.
    """

    def __init__(self, states, ids, embeddings):
        self.states, self.ids, self.embeddings = states, ids, embeddings.float()
        parts = zip(states[:-1].split(BLOCK), ids[1:].split(BLOCK), strict=True)
        # (seq_len - 1, hidden_size): of every place that something comes after.
        self.errors = torch.cat([self.embeddings[after] - self.predicted(part) for part, after in parts])

    def predicted(self, states):
        """The embedding that is expected next, `(n, hidden_size)`."""
        return (states @ self.embeddings.T).softmax(-1) @ self.embeddings

    def check(self, losses):
        """Hold what the states give to the losses `(seq_len - 1,)` that the model gave.

        Raises:
            ValueError: when its logits are not the product of its last states and these embeddings.
        """
        nothing = enumerate(torch.zeros_like(self.errors).split(BLOCK))
        found = torch.cat([self.losses(part, index * BLOCK) for index, part in nothing])
        if (difference := (found - losses).abs().max()) > HEAD_TOLERANCE:
            raise ValueError(
                f"losses differ by {difference:.2g} nats from those of states and embeddings alone: the output head "
                "does more than their product, and errors in the states are not what this model's losses say"
            )

    def losses(self, added, start):
        """Nats of the tokens after `start`, with `added` `(n, hidden_size)` on the states from there on, `(n,)`."""
        logits = (self.states[start : start + len(added)] + added) @ self.embeddings.T
        return F.cross_entropy(logits, self.ids[start + 1 : start + 1 + len(added)], reduction="none")


def find_cells(states, count, seed=0):
    """Cells by k-means on the sphere.

    Args:
        states (`torch.Tensor`): `(n, hidden_size)`, of other texts than the one that is read.
        count (`int`): how many cells.
        seed (`int`, *optional*, defaults to `0`): of the states that are looked at and of where cells begin.

    Returns:
        `tuple`: `(hidden_size,)`, the mean direction, and `(count, hidden_size)`, the cells, of norm 1.

    Raises:
        ValueError: for fewer states than cells.
    """
    if len(states) < count:
        raise ValueError(f"cells={count}: {len(states)} states to find them in; give fewer cells or longer texts")
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
    directions = F.normalize(states[order[:MOST_STATES]].float(), dim=-1)
    mean = directions.mean(0)
    directions = F.normalize(directions - mean, dim=-1)
    cells = directions[:count].clone()
    for _ in range(ROUNDS):
        nearest = (directions @ cells.T).argmax(1)
        sums = torch.zeros_like(cells).index_add_(0, nearest, directions)
        # A cell that nothing is next to stays where it was.
        cells = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), cells)
    return mean, cells


def with_cells(read, held, mean, cells, length, sharpness, gain):
    """The losses with the errors of all closed segments in cells.

    Args:
        read ([`States`]): the text that is read.
        held ([`States`]): the text whose errors are written; its own, or another, as long at least, as a control.
        mean (`torch.Tensor`), cells (`torch.Tensor`): from [`find_cells`].
        length (`int`): tokens of a segment. An error is written with the segment that holds the token it is about.
        sharpness (`float`): θ.
        gain (`float`): γ.

    Returns:
        `torch.Tensor`: `(seq_len - 1,)` float32 in nats.
    """

    def shares(states):
        directions = F.normalize(F.normalize(states, dim=-1) - mean, dim=-1)
        return (sharpness * directions @ cells.T).softmax(-1)

    queries, keys = shares(read.states), shares(held.states)
    memory, norm, losses = torch.zeros_like(cells), cells.new_zeros(len(cells)), []
    for start in range(0, len(read.errors), length):
        stop = min(start + length, len(read.errors))
        losses.append(read.losses(gain * memory_math.look_up(queries[start:stop], memory, norm), start))
        # The error about the first token of a segment is of the place before it.
        written = slice(max(0, start - 1), stop - 1)
        memory = memory + keys[written].T @ held.errors[written]
        norm = norm + keys[written].sum(0)
    return torch.cat(losses)


def with_places(read, held, window, sharpness, gain):
    """The losses with the errors of all places behind a window, the nearest states' the most; arguments as before.

    Args:
        window (`int`): how far a place has to lie behind, in tokens.

    Returns:
        `torch.Tensor`: `(seq_len - 1,)` float32 in nats.
    """
    queries, keys, losses = F.normalize(read.states, dim=-1), F.normalize(held.states, dim=-1), []
    for start in range(0, len(read.errors), BLOCK):
        stop = min(start + BLOCK, len(read.errors))
        behind = torch.arange(start, stop)[:, None] - torch.arange(max(0, stop - window))
        scores = sharpness * (queries[start:stop] @ keys[: behind.shape[1]].T)
        # A row without a place yet retrieves nothing.
        weights = scores.masked_fill(behind < window, -torch.inf).softmax(-1).nan_to_num(0.0)
        losses.append(read.losses(gain * weights @ held.errors[: behind.shape[1]], start))
    return torch.cat(losses)
