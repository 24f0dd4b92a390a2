"""Fitting the memory's own projections to a model as it is, by which of the tokens it has read its heads vote for.

Training changes projections and weights together, and can leave a layer's projections where they tell tokens apart by
their place and by nothing else: no small step leads away from there. With the weights at rest, what a layer asks and
writes of a few hundred rows is known once and for all, and its projections alone are fitted in minutes. What then
reads the memory has still to learn what it holds: train on.
"""

from dataclasses import dataclass

import torch

from . import retrieval_losses as losses
from .attention import InfiniAttention
from .cache import infini_config_of
from .layer_fit import LayerFit, drawn
from .streaming import require_patched
from .told_rows import read_told_rows, thinned, tracked

# Of so many rows one is kept out, to see what the fit is worth.
KEPT_OUT = 16


@dataclass(frozen=True)
class FitSettings:
    """How projections are fitted.

    Args:
        steps (`int`, *optional*, defaults to `1000`): steps of Adam, at least 4, each on `batch_size` rows.
        learning_rate (`float`, *optional*, defaults to `1e-2`): the largest of them.
        batch_size (`int`, *optional*, defaults to `8`): rows in a step.
        filler (`float`, *optional*, defaults to `10.0`): as how many tokens each token counts that no row is asked
            for: what is fitted on short rows is to be used on long ones.
        filler_kept (`float`, *optional*, defaults to `1.0`): share of these tokens that is drawn to stand for all,
            each for so many more: a step takes less time, and what a share is divided by is the same on average.
        start_steps (`int`, *optional*, defaults to `200`): steps that a fresh start takes.
        spread (`float`, *optional*, defaults to `2.0`): how far apart the channels of a fresh start are: the larger,
            the fewer of them a token reaches, and the fewer tokens share one.
        loss (`str`, *optional*, defaults to `"votes"`): `"votes"`, each place of the row against the source, or
            `"tokens"`, the places of each token together against the source.
        share_weight (`float`, *optional*, defaults to `0.0`): what -log of the source's share, the mean over heads and
            layers, counts beside the votes: these only compare, and may be won by a small share of what is returned.
        seed (`int`, *optional*, defaults to `0`): the seed of every draw.
    """

    steps: int = 1000
    learning_rate: float = 1e-2
    batch_size: int = 8
    filler: float = 10.0
    filler_kept: float = 1.0
    start_steps: int = 200
    spread: float = 2.0
    loss: str = "votes"
    share_weight: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 4), ("batch_size", 1), ("start_steps", 0), ("share_weight", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.loss not in losses.LOSSES[1:]:
            raise ValueError(f"loss={self.loss!r}: must be one of {', '.join(map(repr, losses.LOSSES[1:]))}")
        if not 0 < self.filler_kept <= 1:
            raise ValueError(f"filler_kept={self.filler_kept}: must be above 0, and at most 1, which is all of it")
        for name in ("learning_rate", "filler", "spread"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


def fit_memory_projections(model, rows, layers=None, anew=(), settings=FitSettings(), progress=True):
    """Fit the memory's projections of some layers to where the answers of rows were stated, in place; weights rest.

    Every head of a layer has one vote, which its share σ(q) σ(k_t) / (σ(q) z) divides among the tokens that the memory
    holds; the loss is the cross-entropy of their sum, by places or by tokens. Not for `feature_map="elu"`, and for the
    linear rule only.

    Args:
        model (`PreTrainedModel`): a patched model with projections.
        rows (iterable of `dict`): `input_ids` and `sources`, `(seq_len,)` int64 without padding, as
            [`infini_hf.data.memory_rows.MemoryRows`] has them; a few hundred.
        layers (`list[int]`, *optional*): indices of the layers to fit; by default all that are patched.
        anew (`list[int]`, *optional*): those of them whose projections begin anew, as maps with which softmax
            attention would find the sources, turned at random.
        settings ([`FitSettings`], *optional*): how.
        progress (`bool`, *optional*, defaults to `True`): show progress bars over what takes more than two seconds.

    Returns:
        `dict`: of the rows kept out, `told` (how many tokens they ask for), and of `before` and `after` each a dict of
        `votes` (share of the tokens whose source has the most of the layers' summed votes), `tokens` (of those where
        all places of the token together have the most: what reads the memory gets no places) and by layer `votes`,
        `tokens` and `share`.

    Raises:
        ValueError: when the model is not patched, has no projections or another feature map or rule, `layers` or
            `anew` name none of its layers, or too few rows hold answers whose source is in the memory.
    """
    inner = require_patched(model)
    chosen = layers_to_fit(inner, layers, anew)
    told = read_told_rows(inner, chosen, rows, progress)
    kept, fitted = told[::KEPT_OUT], [row for index, row in enumerate(told) if index % KEPT_OUT]
    if not fitted:
        raise ValueError(
            f"{len(told)} of the rows hold an answer whose source lies segments before it: give some hundreds of them"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    fits = [LayerFit(layer, fitted) for layer in chosen]
    thin, weights = weighted(fitted, settings, generator)
    before = measure(fits, kept)
    with torch.enable_grad():
        for fit in fits:
            if fit.index in anew:
                fit.start_anew(fitted, settings.start_steps, generator, settings.spread)
        optimize(fits, thin, weights, settings, generator, progress)
    after = measure(fits, kept)
    for fit in fits:
        fit.store()
    return {"told": sum(len(row.target) for row in kept), "before": before, "after": after}


def layers_to_fit(inner, layers, anew):
    """The patched layers that are asked for, each with projections."""
    config = infini_config_of(inner.config)
    if config.feature_map == "elu" or config.memory_update != "linear":
        raise ValueError(
            f"feature_map={config.feature_map!r} with memory_update={config.memory_update!r}: projections are fitted "
            "for 'exp' or 'softmax' with 'linear' alone"
        )
    patched = {module.layer_idx: module for module in inner.modules() if isinstance(module, InfiniAttention)}
    wanted = sorted(patched) if layers is None else sorted(set(layers))
    absent = sorted(set(wanted) - set(patched)) or sorted(set(anew) - set(wanted))
    if absent or not wanted:
        raise ValueError(
            f"layers={layers}, anew={list(anew)}: {absent or 'none'} cannot be fitted; patched are {sorted(patched)}, "
            "and what begins anew has to be among the layers"
        )
    having = [index for index, layer in sorted(patched.items()) if layer.memory_gate.query_projection is not None]
    bare = [index for index in wanted if index not in having]
    if bare:
        other = f"fit those that have, layers={having}, or " if having else ""
        raise ValueError(
            f"the memory has no projections of its own in layers {bare}: {other}call "
            "infini_hf.calibration.add_memory_projections first"
        )
    return [patched[index] for index in wanted]


def weighted(rows, settings, generator):
    """The rows, thinned as the settings say, and by the `id` of each how often its tokens count, `(seq_len,)`."""
    asked = torch.cat([row.ids[row.target] for row in rows]).unique()
    known = [torch.isin(row.ids, asked) for row in rows]
    if settings.filler_kept < 1:
        pairs = [thinned(row, part, settings.filler_kept, generator) for row, part in zip(rows, known, strict=True)]
        rows, known = zip(*pairs, strict=True)
    times = settings.filler / settings.filler_kept
    return rows, {id(row): torch.where(part, 1.0, times) for row, part in zip(rows, known, strict=True)}


def optimize(fits, rows, weights, settings, generator, progress):
    """Adam on the votes of each layer and of all together, and on the shares of the sources."""
    parameters = [part for fit in fits for part in (fit.query, fit.key)]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=max(0.05, 2 / settings.steps)
    )

    def loss_of(votes, row):
        return losses.found_loss(settings.loss, votes, row.ids, row.target)

    for _ in tracked(range(settings.steps), progress, "fitting projections"):
        loss = 0.0
        for row in drawn(rows, settings.batch_size, generator):
            shares = [fit.shares(row, weights[id(row)]) for fit in fits]
            votes = [part.sum(1).masked_fill(~row.held, -torch.inf) for part in shares]
            # A layer alone is to have the margin that all have together.
            parts = [loss_of(len(fits) * part, row) for part in votes]
            loss = loss + loss_of(sum(votes), row) + sum(parts) / len(parts)
            if settings.share_weight:
                own = [part[torch.arange(len(row.target)), :, row.target] for part in shares]
                loss = loss + settings.share_weight * sum(map(losses.share_loss, own)) / len(own)
        optimizer.zero_grad()
        (loss / settings.batch_size).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(fits, rows):
    """How often the source, and its token, have the most votes, in each layer and in all together, and its share."""
    right, known, shares, count = torch.zeros(len(fits) + 1), torch.zeros(len(fits) + 1), torch.zeros(len(fits)), 0
    for row in rows:
        parts, own = [fit.shares(row) for fit in fits], torch.arange(len(row.target))
        votes = [part.sum(1) for part in parts]
        kinds, kind_of = row.ids.unique(return_inverse=True)
        for index, part in enumerate((*votes, sum(votes))):
            by_kind = part.new_zeros(len(part), len(kinds)).index_add_(1, kind_of, part)
            right[index] += (part.argmax(1) == row.target).sum()
            known[index] += (by_kind.argmax(1) == kind_of[row.target]).sum()
        shares += torch.stack([part.mean(1)[own, row.target].sum() for part in parts])
        count += len(own)
    found, known, shares = ((part / max(1, count)).tolist() for part in (right, known, shares))
    by_layer = {fit.index: {"votes": found[i], "tokens": known[i], "share": shares[i]} for i, fit in enumerate(fits)}
    return {"votes": found[-1], "tokens": known[-1], "layers": by_layer}
