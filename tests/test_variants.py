"""Variants of rule and map: those that the memory has agree with it, the others with their definition."""

import importlib.util
from pathlib import Path

import pytest
import torch

from infini_hf import memory as memory_math
from infini_hf.evaluation.capacity import random_facts, write_facts
from infini_hf.evaluation.variants import MAPS, RULES, recall_variant, write

DIM = 16


@pytest.fixture
def facts():
    return random_facts(3, 6, DIM, 3 * DIM**0.5, codebook=32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("feature_map", ["elu", "exp"])
def test_what_the_memory_has_agrees_with_it(facts, rule, feature_map):
    others = random_facts(3, 8, DIM, 2.0, codebook=32, generator=torch.Generator().manual_seed(1))
    state = write_facts(facts.keys, facts.values, rule, feature_map)
    state = write_facts(others.keys, others.values, rule, feature_map, 4, state)
    expected = memory_math.retrieve(facts.keys, *state, feature_map)
    found = recall_variant(facts, rule, feature_map, (others.keys, others.values), per_write=4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature_map", sorted(MAPS))
@pytest.mark.parametrize("rule", RULES)
def test_a_single_fact_comes_back(rule, feature_map):
    fact = random_facts(4, 1, DIM, 4.0, codebook=32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recall_variant(fact, rule, feature_map), fact.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", sorted(MAPS))
def test_the_correction_counts_a_key_once(facts, feature_map):
    """A key that is written again changes neither M nor z; without the correction z holds it twice."""
    first, values = facts.keys[:, :, :1], facts.values[:, :, :1]
    features = MAPS[feature_map][2] * DIM
    empty = torch.zeros(3, 1, features, DIM), torch.zeros(3, 1, features)
    once = write(first, values, *empty, "corrected", feature_map)
    torch.testing.assert_close(write(first, values, *once, "corrected", feature_map), once, rtol=1e-4, atol=1e-4)
    twice = write(first, values, *write(first, values, *empty, "delta", feature_map), "delta", feature_map)
    torch.testing.assert_close(twice[0], once[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twice[1], 2 * once[1], rtol=1e-4, atol=1e-4)


def test_the_script_writes_a_line_for_every_variant(tmp_path):
    path = Path(__file__).parent.parent / "scripts" / "capacity_variants.py"
    spec = importlib.util.spec_from_file_location("capacity_variants", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--dim", "8", "--seeds", "2", "--codebook", "8", "--output", str(tmp_path / "table.md")])
    lines = [line for line in (tmp_path / "table.md").read_text(encoding="utf-8").splitlines() if "√d" in line]
    assert len(lines) == len(script.NORMS) * len(MAPS) * len(RULES)
    shares = [float(cell) for line in lines for cell in line.split("|")[5:-1]]
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) > 5
