"""What a run of segments does to the memory is what its segments do one after another."""

import pytest
import torch
from models import relative_error

from infini_hf import memory, memory_maps

LENGTH = 6
FEATURES = ("elu", "exp", "softmax")


def states(segments, batch=2, heads=3, dim=8, seed=0):
    """Keys and values of whole segments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, segments * LENGTH, dim, generator=generator)


def write(keys, values, state, rule, features, scale=None):
    """The segments one after another, as a scan writes them."""
    for index, parts in enumerate(zip(keys.split(LENGTH, 2), values.split(LENGTH, 2), strict=True)):
        times = None if scale is None else scale[:, min(index, scale.shape[1] - 1)]
        state = memory.update(*parts, *state, rule, features, times)
    return state


@pytest.fixture
def written():
    """A memory that holds something."""
    keys, values = states(2, seed=9)
    return write(keys, values, memory.empty(keys), "linear", "elu")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_sum_of_a_run_is_what_its_segments_add(written, features, scaled):
    keys, values = states(4)
    scale = torch.tensor([[1.0, 3.0, 0.5], [2.0, 0.25, 7.0]]) if scaled else None
    added = memory_maps.sum_of_run(keys, values, LENGTH, features, scale)
    after = write(keys, values, written, "linear", features, scale)
    for before, part, expected in zip(written, added, after, strict=True):
        assert relative_error(before + part, expected) < 1e-6


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("segments", [1, 4])
def test_the_map_of_a_run_is_what_its_segments_write(written, features, segments):
    keys, values = states(segments)
    run = memory_maps.map_of_run(keys, values, written[1], LENGTH, features)
    expected, norm = write(keys, values, written, "delta", features)
    assert relative_error(memory_maps.apply(run, written[0]), expected) < 5e-6
    assert relative_error(written[1] + memory_maps.norm_of_run(keys, features), norm) < 1e-6
    # It does not only add.
    assert relative_error(written[0] + run[..., 8:], expected) > 0.01


def test_maps_are_joined_in_their_order(written):
    keys, values = states(5)
    whole = memory_maps.map_of_run(keys, values, written[1], LENGTH)
    cut = 2 * LENGTH
    first = memory_maps.map_of_run(keys[:, :, :cut], values[:, :, :cut], written[1], LENGTH)
    norm = written[1] + memory_maps.norm_of_run(keys[:, :, :cut])
    second = memory_maps.map_of_run(keys[:, :, cut:], values[:, :, cut:], norm, LENGTH)
    assert relative_error(memory_maps.compose(first, second), whole) < 1e-6
    assert relative_error(memory_maps.compose(second, first), whole) > 0.01


def test_zeros_change_nothing(written):
    keys, values = states(2)
    some = memory_maps.map_of_run(keys, values, written[1], LENGTH)
    nothing = torch.zeros_like(some)
    assert torch.equal(memory_maps.compose(nothing, some), some)
    assert torch.equal(memory_maps.compose(some, nothing), some)
    assert torch.equal(memory_maps.apply(nothing, written[0]), written[0])
    of_no_segment = memory_maps.map_of_run(keys[:, :, :0], values[:, :, :0], written[1], LENGTH)
    assert torch.equal(of_no_segment, nothing)


@pytest.mark.parametrize("features", FEATURES)
def test_a_run_that_begins_with_an_empty_memory(features):
    """Its first segment has nothing to divide by; long runs of its maps stay finite."""
    keys, values = states(40)
    keys.requires_grad_()
    empty = memory.empty(keys)
    run = memory_maps.map_of_run(keys, values, empty[1], LENGTH, features)
    expected, _ = write(keys, values, empty, "delta", features)
    assert relative_error(memory_maps.apply(run, empty[0]), expected) < 1e-5
    (gradient,) = torch.autograd.grad(run.square().sum(), keys)
    assert run.isfinite().all()
    assert gradient.isfinite().all()


def test_gradients_are_those_of_the_segments_one_after_another(written):
    keys, values = states(3).requires_grad_()
    norm = written[1].clone().requires_grad_()
    memory_before = written[0].clone().requires_grad_()
    weights = torch.randn(written[0].shape, generator=torch.Generator().manual_seed(1))

    def gradients(after):
        return torch.autograd.grad((after * weights).sum(), (keys, values, norm, memory_before))

    mapped = memory_maps.apply(memory_maps.map_of_run(keys, values, norm, LENGTH), memory_before)
    expected, _ = write(keys, values, (memory_before, norm), "delta", "elu")
    for actual, right in zip(gradients(mapped), gradients(expected), strict=True):
        assert right.abs().max() > 1e-3
        assert relative_error(actual, right) < 1e-5


def test_half_precision_and_autocast_leave_maps_in_float32(written):
    keys, values = states(2).bfloat16()
    plain = memory_maps.map_of_run(keys, values, written[1], LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = memory_maps.map_of_run(keys, values, written[1], LENGTH)
        assert torch.equal(memory_maps.apply(cast, written[0]), memory_maps.apply(plain, written[0]))
        assert torch.equal(memory_maps.compose(cast, cast), memory_maps.compose(plain, plain))
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
