"""How many independent facts one head's memory holds: random keys and values, written and asked for again.

A fact is a key and a value of `head_dim` numbers; the value is one of a codebook of random unit vectors. It counts as
recalled when, of the whole codebook, its value is nearest to what the memory returns for its key. The memory is that
of [`infini_hf.memory`], one head of it.
"""

from dataclasses import dataclass

import torch

from .. import memory as memory_math


@dataclass(frozen=True)
class Facts:
    """Facts for several memories at once, one for each seed.

    Attributes:
        keys (`torch.Tensor`): `(seeds, 1, facts, head_dim)` float32.
        values (`torch.Tensor`): the same shape: entries of the codebook.
        entries (`torch.Tensor`): `(seeds, facts)` int64, which entries.
        codebook (`torch.Tensor`): `(seeds, entries, head_dim)` float32, unit vectors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    entries: torch.Tensor
    codebook: torch.Tensor


def unit_vectors(*shape, generator):
    """Random directions, `(*shape)` float32 of norm 1 along the last dimension."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_keys(seeds, count, dim, norm, correlation=0.0, generator=None):
    """Keys `(seeds, 1, count, dim)` of one norm.

    Args:
        seeds (`int`): memories.
        count (`int`): keys of each.
        dim (`int`): head dimension.
        norm (`float`): the norm of every key.
        correlation (`float`, *optional*, defaults to `0.0`): about the cosine of any two keys, from a direction that
            they share.
        generator (`torch.Generator`, *optional*): the source of randomness.
    """
    own, shared = (unit_vectors(seeds, 1, size, dim, generator=generator) for size in (count, 1))
    mixed = (1 - correlation) ** 0.5 * own + correlation**0.5 * shared
    return norm * torch.nn.functional.normalize(mixed, dim=-1)


def random_facts(seeds, count, dim, norm, correlation=0.0, codebook=1024, generator=None):
    """[`Facts`] whose values are drawn from a codebook, each independently; keys as in [`random_keys`]."""
    keys = random_keys(seeds, count, dim, norm, correlation, generator)
    book = unit_vectors(seeds, codebook, dim, generator=generator)
    entries = torch.randint(codebook, (seeds, count), generator=generator)
    values = book.gather(1, entries.unsqueeze(-1).expand(-1, -1, dim)).unsqueeze(1)
    return Facts(keys, values, entries, book)


def write_facts(keys, values, rule, feature_map, per_write=1, state=None):
    """Write facts in order, so many at a time, as a segment of so many tokens would.

    Args:
        keys (`torch.Tensor`): `(seeds, 1, facts, head_dim)`.
        values (`torch.Tensor`): the same shape.
        rule (`str`): `"linear"` or `"delta"`.
        feature_map (`str`): `"elu"`, `"exp"` or `"softmax"`.
        per_write (`int`, *optional*, defaults to `1`): facts in one update.
        state (`tuple`, *optional*): M and z to go on from; empty by default.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: M and z, float32.

    Raises:
        ValueError: when `per_write` is less than 1.
    """
    if per_write < 1:
        raise ValueError(f"per_write={per_write}: must be at least 1")
    state = memory_math.empty(keys) if state is None else state
    for part in zip(keys.split(per_write, dim=2), values.split(per_write, dim=2), strict=True):
        state = memory_math.update(*part, *state, rule=rule, feature_map=feature_map)
    return state


def best_retrieval(keys, values, feature_map):
    """What the best matrix of the size of M returns for every key: least squares over all facts at once, in float64.

    No rule that writes into M can return values with a smaller squared error. It is exact for as many facts as the
    features have dimensions, when their features are linearly independent, and for no more in general.
    """
    features = memory_math.map_keys(keys, feature_map).double()
    # The scale of a feature vector cancels in the ratio of retrieval; without it the solution is better conditioned.
    features = features / features.norm(dim=-1, keepdim=True)
    return (features @ torch.linalg.pinv(features, rtol=1e-9) @ values.double()).float()


def nearest_entries(retrieved, codebook):
    """The entries whose unit vectors are nearest to what was retrieved.

    Args:
        retrieved (`torch.Tensor`): `(seeds, 1, facts, head_dim)`.
        codebook (`torch.Tensor`): `(seeds, entries, head_dim)`, unit vectors.

    Returns:
        `torch.Tensor`: `(seeds, facts)` int64.
    """
    # Of vectors of one length, the nearest is the one with the largest inner product.
    return (retrieved.squeeze(1) @ codebook.transpose(1, 2)).argmax(-1)


@dataclass(frozen=True)
class Recall:
    """What came back.

    Attributes:
        correct (`torch.Tensor`): `(seeds,)` facts recalled of each memory.
        facts (`int`): facts that were asked for, of each memory.
        error (`float`): the mean distance of what was retrieved from the value, which has norm 1.
    """

    correct: torch.Tensor
    facts: int
    error: float


def recall_of(retrieved, facts):
    """Compare what was retrieved, `(seeds, 1, facts, head_dim)`, with [`Facts`]."""
    correct = (nearest_entries(retrieved, facts.codebook) == facts.entries).sum(1)
    return Recall(correct, facts.entries.shape[1], (retrieved - facts.values).norm(dim=-1).mean().item())


def measure(facts, rule, feature_map, per_write=1, filler=None):
    """Write facts into an empty memory, then fillers, and ask for every fact with its own key.

    Args:
        facts ([`Facts`]): the facts.
        rule (`str`): `"linear"`, `"delta"`, or `"best"`: the best matrix for the facts, whatever wrote it.
        feature_map (`str`): `"elu"`, `"exp"` or `"softmax"`.
        per_write (`int`, *optional*, defaults to `1`): facts, and fillers, in one update.
        filler (`tuple`, *optional*): keys and values `(seeds, 1, tokens, head_dim)` that are written afterwards.

    Returns:
        [`Recall`]

    Raises:
        ValueError: for `"best"` with fillers, which it would not have to hold.
    """
    if rule == "best":
        if filler is not None:
            raise ValueError("rule='best': solves for the facts alone, and has no fillers")
        return recall_of(best_retrieval(facts.keys, facts.values, feature_map), facts)
    state = write_facts(facts.keys, facts.values, rule, feature_map, per_write)
    if filler is not None:
        state = write_facts(*filler, rule, feature_map, per_write, state)
    return recall_of(memory_math.retrieve(facts.keys, *state, feature_map), facts)


def feature_cosine(keys, feature_map):
    """The mean cosine of the features of two different keys of one memory: what stands in the way of telling apart."""
    features = torch.nn.functional.normalize(memory_math.map_keys(keys, feature_map), dim=-1)
    count = features.shape[2]
    total = features.sum(2).square().sum(-1) - count
    return (total / (count * (count - 1))).mean().item()
