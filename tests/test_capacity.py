"""Capacity of a memory: where it is exact, where it is not, and the measurement against loops and closed forms."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from infini_hf import memory as memory_math
from infini_hf.evaluation.capacity import (
    Facts,
    best_retrieval,
    feature_cosine,
    measure,
    nearest_entries,
    random_facts,
    random_keys,
    recall_of,
    write_facts,
)
from infini_hf.evaluation.intervals import jackknife_interval, student_quantile

ROOT = Path(__file__).parent.parent
DIM = 16
RULES = pytest.mark.parametrize("rule", ["linear", "delta"])
MAPS = pytest.mark.parametrize("feature_map", ["elu", "exp"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_keys(keys, seed=0):
    """Facts of random values under given keys `(seeds, 1, facts, dim)`."""
    facts = random_facts(keys.shape[0], keys.shape[2], keys.shape[-1], 1.0, codebook=64, generator=generator(seed))
    return Facts(keys, facts.values, facts.entries, facts.codebook)


def one_hot_keys(count):
    """Keys whose features are orthogonal: 0 in one channel, so far below in the others that both maps give zero."""
    return (torch.eye(DIM)[:count] - 1)[None, None] * 200


@RULES
@MAPS
@pytest.mark.parametrize("per_write", [1, 3, DIM])
@pytest.mark.parametrize("count", [1, 5, DIM])
def test_facts_with_orthogonal_features_come_back_exactly(rule, feature_map, per_write, count):
    found = measure(with_keys(one_hot_keys(count)), rule, feature_map, per_write)
    assert found.correct.tolist() == [count]
    assert found.error <= 1e-6


@RULES
@MAPS
def test_orthogonal_keys_are_not_orthogonal_features(rule, feature_map):
    """Features are positive, so that keys at right angles still share most of what the map makes of them."""
    keys = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator()))[0][None, None] * DIM**0.5
    assert feature_cosine(keys, feature_map) > 0.2
    assert measure(with_keys(keys), rule, feature_map).error > 0.5


@RULES
@MAPS
def test_a_single_fact_comes_back_exactly(rule, feature_map):
    facts = random_facts(4, 1, DIM, 4.0, codebook=64, generator=generator())
    found = measure(facts, rule, feature_map)
    assert found.correct.tolist() == [1] * 4
    assert found.error <= 1e-6


@MAPS
def test_the_best_matrix_is_exact_up_to_the_dimension_and_not_beyond(feature_map):
    """Beyond it the error is that of a random projection to d of N dimensions, √(1 − d/N) of the norm."""
    for count, expected in ((DIM // 2, 0.0), (DIM, 0.0), (2 * DIM, 0.5**0.5), (4 * DIM, 0.75**0.5)):
        facts = random_facts(40, count, DIM, DIM**0.5, generator=generator())
        assert measure(facts, "best", feature_map).error == pytest.approx(expected, abs=0.02 if expected else 1e-4)


@RULES
@MAPS
def test_no_rule_has_a_smaller_squared_error_than_the_best_matrix(rule, feature_map):
    facts = random_facts(8, 3 * DIM, DIM, DIM**0.5, generator=generator())
    state = write_facts(facts.keys, facts.values, rule, feature_map)
    returned = memory_math.retrieve(facts.keys, *state, feature_map)
    best = best_retrieval(facts.keys, facts.values, feature_map)
    # The best matrix fits unit features; a scale for each fact is what the denominator of a rule may add.
    scale = (returned * facts.values).sum(-1, keepdim=True) / returned.square().sum(-1, keepdim=True)
    for said in (returned, scale.clamp(max=1.0) * returned):
        assert ((best - facts.values) ** 2).sum() < ((said - facts.values) ** 2).sum()


@RULES
@MAPS
def test_more_facts_are_recalled_less(rule, feature_map):
    shares = []
    for count in (1, DIM // 4, DIM, 4 * DIM, 16 * DIM):
        facts = random_facts(40, count, DIM, DIM**0.5, generator=generator())
        shares.append(measure(facts, rule, feature_map).correct.double().mean().item() / count)
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1


@RULES
@MAPS
def test_fillers_drown_facts(rule, feature_map):
    facts = random_facts(40, 3, DIM, 3 * DIM**0.5, generator=generator())
    others = random_facts(40, 512, DIM, 3 * DIM**0.5, generator=generator(1))
    alone, few, many = (
        measure(facts, rule, feature_map, 4, filler).correct.sum().item()
        for filler in (None, (others.keys[:, :, :8], others.values[:, :, :8]), (others.keys, others.values))
    )
    assert alone > few > many
    nothing = (others.keys[:, :, :0], others.values[:, :, :0])
    assert measure(facts, rule, feature_map, 4, nothing).correct.sum().item() == alone


def loop(facts, rule, feature_map, per_write):
    """What the memory returns, by equations 3 to 5 of the paper on single vectors in float64."""
    returned = torch.zeros_like(facts.values, dtype=torch.float64)
    for seed, (keys, values) in enumerate(zip(facts.keys[:, 0].double(), facts.values[:, 0].double(), strict=True)):
        features = torch.where(keys > 0, keys + 1, keys.exp()) if feature_map == "elu" else keys.exp()
        matrix, norm = torch.zeros(DIM, DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
        for start in range(0, len(keys), per_write):
            before, norm_before = matrix.clone(), norm.clone()
            for feature, value in zip(
                features[start : start + per_write], values[start : start + per_write], strict=True
            ):
                if rule == "delta" and start:
                    value = value - feature @ before / (feature @ norm_before)
                matrix, norm = matrix + torch.outer(feature, value), norm + feature
        for index, feature in enumerate(features):
            returned[seed, 0, index] = feature @ matrix / (feature @ norm)
    return returned


@RULES
@MAPS
@pytest.mark.parametrize("per_write", [1, 4])
def test_recall_is_that_of_a_loop_over_single_facts(rule, feature_map, per_write):
    facts = random_facts(3, 10, DIM, 4.0, 0.3, codebook=64, generator=generator())
    returned = loop(facts, rule, feature_map, per_write)
    correct = [
        sum(
            min(range(64), key=lambda entry: (facts.codebook[seed, entry].double() - vector).norm().item()) == wanted
            for vector, wanted in zip(returned[seed, 0], facts.entries[seed].tolist(), strict=True)
        )
        for seed in range(3)
    ]
    found = measure(facts, rule, feature_map, per_write)
    assert found.correct.tolist() == correct
    # Neither all nor nothing, or the equality would say little.
    assert 0 < sum(correct) < 30
    assert found.error == pytest.approx((returned - facts.values).norm(dim=-1).mean().item(), rel=1e-4)


def test_the_nearest_entry_is_found_whatever_the_length_of_what_was_returned():
    facts = random_facts(2, 5, DIM, 1.0, codebook=64, generator=generator())
    assert torch.equal(nearest_entries(0.01 * facts.values, facts.codebook), facts.entries)
    assert recall_of(facts.values, facts).correct.tolist() == [5, 5]
    assert recall_of(-facts.values, facts).correct.tolist() == [0, 0]


def test_keys_have_the_norm_and_the_cosine_asked_for():
    keys = random_keys(4, 200, 64, 3.0, 0.5, generator())
    torch.testing.assert_close(keys.norm(dim=-1), torch.full((4, 1, 200), 3.0))
    cosines = keys @ keys.transpose(-1, -2) / 9
    pairs = cosines[:, 0][:, ~torch.eye(200, dtype=torch.bool)]
    assert pairs.mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_feature_cosine_is_the_mean_over_pairs():
    keys = random_keys(2, 5, DIM, 4.0, generator=generator())
    features = torch.nn.functional.normalize(memory_math.map_keys(keys, "elu")[:, 0], dim=-1)
    pairs = [features[seed, i] @ features[seed, j] for seed in range(2) for i in range(5) for j in range(5) if i != j]
    assert feature_cosine(keys, "elu") == pytest.approx(sum(pairs).item() / len(pairs), rel=1e-5)


def test_what_cannot_be_measured_is_refused():
    facts = random_facts(1, 2, DIM, 1.0, codebook=8, generator=generator())
    with pytest.raises(ValueError, match="per_write=0: must be at least 1"):
        measure(facts, "linear", "elu", 0)
    with pytest.raises(ValueError, match="has no fillers"):
        measure(facts, "best", "elu", filler=(facts.keys, facts.values))


# Intervals.


def test_quantiles_of_student_as_in_the_tables():
    for freedom, expected in ((1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (10, 2.228), (100, 1.984)):
        assert student_quantile(freedom) == pytest.approx(expected, abs=6e-4)
    assert student_quantile(7, 0.99) == pytest.approx(3.499, abs=6e-4)
    with pytest.raises(ValueError, match="freedom=0"):
        student_quantile(0)


def test_the_interval_of_a_mean_is_the_usual_one():
    values = [0.3, -0.1, 0.4, 0.2, 0.6]
    mean = sum(values) / 5
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 4 / 5)
    low, high = jackknife_interval(lambda part: sum(part) / len(part), values)
    assert (low, high) == pytest.approx((mean - 2.7764 * error, mean + 2.7764 * error), abs=1e-4)
    assert jackknife_interval(lambda part: sum(part), [1.0]) is None


# The script.


def test_the_script_writes_tables_measurements_and_figure(tmp_path):
    spec = importlib.util.spec_from_file_location("script_capacity", ROOT / "scripts" / "capacity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FILLERS = (0, 64)
    output = tmp_path / "tables" / "capacity.md"
    rows = module.main(["--dims", "16", "--dim", "16", "--seeds", "2", "--codebook", "32", "--output", str(output)])
    written = [json.loads(line) for line in output.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == sum(map(len, rows.values()))
    row = next(row for row in rows["sizes"] if (row["rule"], row["map"], row["facts"]) == ("linear", "exp", 4))
    facts = random_facts(2, 4, 16, 4.0, codebook=32, generator=generator())
    assert row["recall"] == measure(facts, "linear", "exp").correct.sum().item() / 8
    table = output.read_text(encoding="utf-8")
    assert "| best | elu | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in table
    if importlib.util.find_spec("matplotlib"):
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
