"""The fit of the memory's projections: its numbers are those of the model, and it learns what it is asked for."""

import pytest
import torch
from models import add_moved_projections, build_patched, random_ids
from test_retrieval_supervision import supervised

from infini_hf import unpatch_model
from infini_hf.attention import InfiniAttention
from infini_hf.gate import affine
from infini_hf.layer_fit import LayerFit
from infini_hf.projection_fit import FitSettings, fit_memory_projections, measure, weighted
from infini_hf.told_rows import compact, read_told_rows

SEGMENT = 8
SHORT = FitSettings(steps=40, start_steps=20, batch_size=2)


def model_with_projections(seed=0, mix_heads=False, **options):
    """Projections away from where they begin."""
    model = build_patched("llama", **{"segment_length": SEGMENT, "feature_map": "exp", "overlap": 2, **options})
    return add_moved_projections(model, 0.2, seed, mix_heads)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, InfiniAttention)]


def weights_of(model):
    return {
        (layer.layer_idx, name): getattr(layer.memory_gate, f"{name}_projection").weight.detach().clone()
        for layer in layers_of(model)
        for name in ("query", "key")
    }


def pairs(count, seed=0, length=4 * SEGMENT + 3):
    """Rows of random tokens in which three pairs stand, and stand again, in another order, segments later.

    Of a pair the second token follows from the first: a random model knows nothing but the token that it reads.
    """
    rows = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        ids = torch.randint(40, 97, (length,), generator=generator)
        sources = torch.full((length,), -1)
        names = 5 + torch.randperm(10, generator=generator)[:3]
        values = names + 15
        for place, pair in zip((1, 4, 9), range(3), strict=True):
            ids[place : place + 2] = torch.stack([names[pair], values[pair]])
        for turn, pair in enumerate(torch.randperm(3, generator=generator).tolist()):
            place = 3 * SEGMENT + 2 + 3 * turn
            ids[place : place + 2] = torch.stack([names[pair], values[pair]])
            sources[place + 1] = (2, 5, 10)[pair]
        rows.append({"input_ids": ids, "sources": sources})
    return rows


@pytest.mark.parametrize("mix_heads", [False, True])
@pytest.mark.parametrize("kind", ["exp", "softmax"])
def test_shares_of_gathered_states_are_those_of_the_memory_as_it_reads(kind, mix_heads):
    """Also of told tokens in the piece of a segment at the end, and of several lengths."""
    model = model_with_projections(mix_heads=mix_heads, feature_map=kind)
    rows = pairs(3) + pairs(2, seed=1, length=3 * SEGMENT + 11)
    gathered = read_told_rows(model, layers_of(model), rows)
    fits = [LayerFit(layer, gathered) for layer in layers_of(model)]
    for row, told in zip(rows, gathered, strict=True):
        expected = supervised(model, row["input_ids"][None], row["sources"][None]).shares
        found = [fit.shares(told).mean(1)[torch.arange(len(told.target)), told.target].sum() for fit in fits]
        assert len(told.target) == expected[1] == 3
        # States are kept in half precision.
        torch.testing.assert_close(torch.stack(found).mean(), expected[0], rtol=2e-2, atol=1e-5)


def test_filler_counts_as_often_as_it_is_said_to():
    model = model_with_projections()
    (row,) = read_told_rows(model, layers_of(model), pairs(1))
    fit = LayerFit(layers_of(model)[1], [row])
    times = torch.ones(len(row.ids))
    times[3] = 7.0
    once, often = fit.shares(row), fit.shares(row, times)
    more = once[..., 3:4] * 6.0
    expected = once / (1.0 + more)
    expected[..., 3] *= 7.0
    torch.testing.assert_close(often, expected)
    torch.testing.assert_close(often.sum(-1), torch.ones(often.shape[:-1]))


def test_a_share_of_the_filler_stands_for_all_of_it():
    """What is asked for stays, and of many draws 1 / share, which is linear in the filler, is that of the whole."""
    model = model_with_projections()
    rows = read_told_rows(model, layers_of(model), pairs(1))
    fit, generator = LayerFit(layers_of(model)[1], rows), torch.Generator().manual_seed(0)
    whole, weights = weighted(rows, FitSettings(filler=3.0), generator)
    assert whole is rows

    def inverse(row, weights):
        shares = fit.shares(row, weights[id(row)])
        return 1 / torch.stack([share[:, place] for share, place in zip(shares, row.target, strict=True)])

    drawn = [weighted(rows, FitSettings(filler=3.0, filler_kept=0.5), generator) for _ in range(400)]
    for (row,), times in drawn:
        assert torch.equal(row.ids[row.target], rows[0].ids[rows[0].target])
        assert len(row.ids) < len(rows[0].ids)
        assert times[id(row)].unique().tolist() == [1.0, 6.0]
    found = torch.stack([inverse(*parts, times) for parts, times in drawn])
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - inverse(rows[0], weights)).abs() < 4 * error).all()


def test_nothing_but_the_projections_of_the_layers_is_changed():
    model = model_with_projections()
    before, plain = weights_of(model), {name: part.clone() for name, part in model.state_dict().items()}
    report = fit_memory_projections(model, pairs(20), layers=[1], settings=SHORT, progress=False)
    after = weights_of(model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [(1, "query"), (1, "key")]
    fitted = [name for name, part in model.state_dict().items() if not torch.equal(part, plain[name])]
    assert all("layers.1.self_attn.memory_gate" in name and "projection" in name for name in fitted)
    assert list(report["before"]["layers"]) == [1]
    assert all(part.grad is None for part in model.parameters())


@pytest.mark.parametrize("mix_heads", [False, True])
def test_no_step_leaves_the_projections_where_they_were(mix_heads):
    model = model_with_projections(mix_heads=mix_heads)
    gathered = read_told_rows(model, layers_of(model), pairs(4))
    before = weights_of(model)
    for layer in layers_of(model):
        LayerFit(layer, gathered).store()
    for key, weight in weights_of(model).items():
        torch.testing.assert_close(weight, before[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix_heads", [False, True])
@pytest.mark.parametrize("kind", ["exp", "softmax"])
@pytest.mark.parametrize("anew", [(), (0, 1)], ids=["on", "anew"])
def test_votes_learn_to_find_what_is_asked_for(anew, kind, mix_heads):
    """In rows that were kept out, and the report is what the model that comes out shows."""
    model = model_with_projections(mix_heads=mix_heads, feature_map=kind)
    rows, settings = pairs(320), FitSettings(steps=600 if kind == "softmax" else 300, batch_size=8)
    report = fit_memory_projections(model, rows, anew=anew, settings=settings, progress=False)
    assert report["told"] == 60
    assert report["before"]["votes"] < 0.4
    assert report["after"]["votes"] > 0.8
    gathered = read_told_rows(model, layers_of(model), rows[::16])
    fits = [LayerFit(layer, gathered) for layer in layers_of(model)]
    votes = [(sum(fit.shares(row).sum(1) for fit in fits).argmax(1) == row.target).float() for row in gathered]
    assert torch.cat(votes).mean().item() == pytest.approx(report["after"]["votes"], abs=0.02)


def test_a_fit_by_tokens_finds_them_and_is_another_than_by_votes():
    settings = FitSettings(steps=300, batch_size=8, loss="tokens")
    report = fit_memory_projections(model_with_projections(), pairs(320), settings=settings, progress=False)
    assert report["before"]["tokens"] < 0.4
    assert report["after"]["tokens"] > 0.5
    shares = []
    for loss in ("votes", "tokens"):
        rows = pairs(20)
        for row in rows:
            row["input_ids"][12] = row["input_ids"][5].item()
        settings = FitSettings(steps=4, batch_size=2, loss=loss)
        report = fit_memory_projections(model_with_projections(), rows, settings=settings, progress=False)
        shares.append(report["after"]["layers"][1]["share"])
    assert abs(shares[0] - shares[1]) > 1e-4


def test_shares_that_count_are_larger():
    """In the first layer; what the second of this random model asks with tells little apart."""

    def share(weight):
        settings = FitSettings(steps=200, batch_size=4, share_weight=weight)
        model = model_with_projections(feature_map="softmax")
        layers = fit_memory_projections(model, pairs(80), settings=settings, progress=False)["after"]["layers"]
        return layers[0]["share"]

    assert share(1.0) > 1.5 * share(0.0)


def test_places_of_one_token_are_counted_together():
    """Counted one by one, in rows where a value stands at another place too."""
    model, rows = model_with_projections(), pairs(6)
    for row in rows:
        row["input_ids"][[12, 15, 18]] = row["input_ids"][[5, 2, 10]]
    gathered = read_told_rows(model, layers_of(model), rows)
    fits = [LayerFit(layer, gathered) for layer in layers_of(model)]
    right = total = 0
    for row in gathered:
        votes = sum(fit.shares(row).sum(1) for fit in fits)
        for asked, target in enumerate(row.target.tolist()):
            counted = {}
            for place, token in enumerate(row.ids.tolist()):
                counted[token] = counted.get(token, 0.0) + votes[asked, place].item()
            right += max(counted, key=counted.get) == row.ids[target].item()
            total += 1
    found = measure(fits, gathered)
    assert found["tokens"] == pytest.approx(right / total)
    assert found["tokens"] != found["votes"]
    assert found["layers"][1]["tokens"] == measure(fits[1:], gathered)["tokens"]


def test_the_larger_the_spread_the_fewer_channels_a_fresh_start_reaches():
    """By the channels that a query is asked with as if they were alike, 1 / Σ σ(q)²."""
    model, reached = model_with_projections(feature_map="softmax"), []
    gathered = read_told_rows(model, layers_of(model), pairs(20))
    for spread in (1.0, 4.0, 16.0):
        fit = LayerFit(layers_of(model)[1], gathered)
        fit.start_anew(gathered, 20, torch.Generator().manual_seed(0), spread)
        queries = torch.cat([affine(fit.states(row, "query"), fit.query).softmax(-1) for row in gathered], dim=1)
        reached.append((1 / queries.square().sum(-1)).mean().item())
    assert reached[0] > 1.5 * reached[1] > 1.5 * 1.5 * reached[2]


def test_a_fit_is_the_same_for_the_same_seed():
    reports = [
        fit_memory_projections(model_with_projections(), pairs(20), anew=[1], settings=SHORT, progress=False)
        for _ in range(2)
    ]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"feature_map": "elu"}, {}, "feature_map='elu' with memory_update='linear'"),
        ({"memory_update": "delta"}, {}, "feature_map='exp' with memory_update='delta'"),
        ({}, {"layers": [1, 7]}, r"\[7\] cannot be fitted; patched are \[0, 1\]"),
        ({}, {"layers": [1], "anew": [0]}, r"\[0\] cannot be fitted.*has to be among the layers"),
        ({}, {"layers": []}, "none cannot be fitted"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_read(options, call, message):
    with pytest.raises(ValueError, match=message):
        fit_memory_projections(model_with_projections(**options), iter([None]), **call)


def test_a_model_without_projections_or_patch_and_rows_without_sources_are_refused():
    bare = build_patched("llama", segment_length=SEGMENT, feature_map="exp")
    with pytest.raises(ValueError, match=r"call infini_hf\.calibration"):
        fit_memory_projections(bare, pairs(4))
    some = model_with_projections()
    gate = layers_of(some)[0].memory_gate
    gate.query_projection = gate.key_projection = None
    with pytest.raises(ValueError, match=r"own in layers \[0\]: fit those that have, layers=\[1\], or call infini_hf"):
        fit_memory_projections(some, pairs(4))
    with pytest.raises(ValueError, match="is not patched"):
        fit_memory_projections(unpatch_model(bare), pairs(4))
    rows = [{"input_ids": random_ids(1, 30)[0], "sources": torch.full((30,), -1)}]
    with pytest.raises(ValueError, match=r"^0 of the rows hold an answer"):
        fit_memory_projections(model_with_projections(), rows, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"batch_size": 0},
        {"start_steps": -1},
        {"learning_rate": 0.0},
        {"filler": float("nan")},
        {"spread": 0.0},
        {"share_weight": -0.1},
        {"filler_kept": 0.0},
        {"filler_kept": 1.5},
        {"loss": "share"},
    ],
)
def test_settings_that_fit_nothing_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r}: must be"):
        FitSettings(**options)


def test_the_fewest_steps_are_steps():
    model = model_with_projections()
    before = weights_of(model)
    fit_memory_projections(model, pairs(4), settings=FitSettings(steps=4, batch_size=1), progress=False)
    assert not any(torch.equal(weight, before[key]) for key, weight in weights_of(model).items())


def test_states_too_large_for_half_precision_are_kept_whole():
    states = torch.tensor([1.5, 7e4])
    assert torch.equal(compact(states), states)
    assert compact(states[:1]).dtype == torch.float16
