"""The pure memory functions against float64 loops over tokens and heads, and against their own limits."""

import itertools
import math

import pytest
import torch
from oracle import map_key, map_query, read, write

from infini_hf import memory as memory_math
from infini_hf.config import FEATURE_MAPS, MEMORY_UPDATES
from infini_hf.memory_read import Retrieval

# 1 < kv heads < heads, and no two of these sizes are equal.
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 6, 3, 7, 5
TOLERANCE = 1e-5
RULES_AND_MAPS = list(itertools.product(MEMORY_UPDATES, FEATURE_MAPS))
HALF = [torch.bfloat16, torch.float16]


def retrieve_as_the_gate_does(queries, memory, memory_norm, feature_map="elu"):
    """What a gate that is wide open makes of local attention to nothing."""
    retrieval = Retrieval(queries, memory, memory_norm, feature_map)
    return retrieval.mixed_into(torch.zeros_like(queries), torch.ones(1, queries.shape[1], 1, 1))


READS = [memory_math.retrieve, retrieve_as_the_gate_does]


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def draw_segment(dtype=torch.float32, length=LENGTH):
    """Queries, keys and values of one segment."""
    return (
        draw(BATCH, HEADS, length, DIM, dtype=dtype),
        draw(BATCH, KV_HEADS, length, DIM, dtype=dtype),
        draw(BATCH, KV_HEADS, length, DIM, dtype=dtype),
    )


def draw_state():
    """A memory with something in it; norms are positive, as sums of a feature map are."""
    return draw(BATCH, KV_HEADS, DIM, DIM), draw(BATCH, KV_HEADS, DIM).abs() + 0.5


def naive_retrieve(queries, memory, norm, feature_map):
    """Head 0 and 1 read KV head 0, head 2 and 3 KV head 1, and so on."""
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for row, head, token in itertools.product(*map(range, queries.shape[:3])):
        kv_head = head // (HEADS // KV_HEADS)
        mapped = map_query(queries[row, head, token].double(), feature_map)
        out[row, head, token] = read(mapped, memory[row, kv_head].double(), norm[row, kv_head].double())
    return out


def naive_update(keys, values, memory, norm, rule, feature_map):
    memory, norm = memory.double(), norm.double()
    new_memory, new_norm = memory.clone(), norm.clone()
    for row, head in itertools.product(range(BATCH), range(KV_HEADS)):
        new_memory[row, head], new_norm[row, head] = write(
            keys[row, head].double(), values[row, head].double(), memory[row, head], norm[row, head], rule, feature_map
        )
    return new_memory, new_norm


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("retrieve", READS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_retrieve_equals_the_loop(retrieve, feature_map, dtype):
    queries, _, _ = draw_segment(dtype)
    state = draw_state()
    retrieved = retrieve(queries, *state, feature_map)
    assert retrieved.dtype == torch.float32
    assert_close(retrieved, naive_retrieve(queries, *state, feature_map))


def test_query_heads_of_a_group_lie_side_by_side():
    """Each KV head returns its own number; a tiled repeat would give 0, 1, 2, 0, 1, 2."""
    memory = torch.arange(KV_HEADS).view(1, -1, 1, 1).expand(1, -1, DIM, DIM).float()
    retrieved = memory_math.retrieve(draw(1, HEADS, 1, DIM), memory, torch.ones(1, KV_HEADS, DIM))
    assert retrieved[0, :, 0, 0].round().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_update_equals_the_loop(rule, feature_map, dtype):
    _, keys, values = draw_segment(dtype)
    state = draw_state()
    expected = naive_update(keys, values, *state, rule, feature_map)
    for actual, wanted in zip(memory_math.update(keys, values, *state, rule, feature_map), expected, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, wanted)


@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_first_write_into_an_empty_memory_equals_the_loop(rule, feature_map):
    _, keys, values = draw_segment()
    state = memory_math.empty(keys)
    expected = naive_update(keys, values, *state, rule, feature_map)
    for actual, wanted in zip(memory_math.update(keys, values, *state, rule, feature_map), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_contribution_is_what_update_adds(rule, feature_map):
    _, keys, values = draw_segment()
    state = draw_state()
    added = memory_math.contribution(keys, values, *state, rule, feature_map)
    for before, part, after in zip(state, added, naive_update(keys, values, *state, rule, feature_map), strict=True):
        assert_close(part, after - before.double())


def draw_segments(count=4):
    """Keys and values of several segments, those of a row side by side."""
    return draw(BATCH, count, KV_HEADS, LENGTH, DIM), draw(BATCH, count, KV_HEADS, LENGTH, DIM)


@pytest.mark.parametrize("begin", ["empty", "filled"])
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_scan_equals_the_looped_update(rule, feature_map, begin):
    """Entry s of the scan is what segment s reads: the state before it, the given one for the first."""
    segments = 4
    keys, values = draw_segments(segments)
    state = draw_state() if begin == "filled" else memory_math.empty(keys[:, 0])
    memories, norms = memory_math.scan(keys, values, *state, rule, feature_map)
    assert memories.shape == (BATCH, segments + 1, KV_HEADS, DIM, DIM)
    assert norms.shape == (BATCH, segments + 1, KV_HEADS, DIM)
    assert memories.dtype == norms.dtype == torch.float32
    expected = tuple(part.double() for part in state)
    for segment in range(segments + 1):
        assert_close(memories[:, segment], expected[0])
        assert_close(norms[:, segment], expected[1])
        if segment < segments:
            expected = naive_update(keys[:, segment], values[:, segment], *expected, rule, feature_map)


@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_gradients_of_the_scan_are_those_of_the_loop(rule, feature_map):
    """Of the keys, the values and the state, where the loss weighs what every segment reads."""
    segments, scale = 4, torch.tensor([[1.0, 3.0, 0.5, 2.0], [2.0, 1.0, 1.0, 4.0]])
    tensors = [tensor.requires_grad_() for tensor in (*draw_segments(segments), *draw_state())]
    weights = draw(BATCH, segments + 1, KV_HEADS, DIM, DIM), draw(BATCH, segments + 1, KV_HEADS, DIM)

    def gradients(states):
        loss = sum((part * weight).sum() for part, weight in zip(states, weights, strict=True))
        return torch.autograd.grad(loss, tensors)

    def looped(keys, values, *state):
        states = [state]
        for segment in range(segments):
            parts = keys[:, segment], values[:, segment]
            states.append(memory_math.update(*parts, *states[-1], rule, feature_map, scale[:, segment]))
        return (torch.stack(parts, dim=1) for parts in zip(*states, strict=True))

    actual = gradients(memory_math.scan(*tensors, rule, feature_map, scale))
    for ours, expected in zip(actual, gradients(looped(*tensors)), strict=True):
        assert_close(ours, expected.double(), 1e-4)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("size", [-200.0, -40.0, -20.0, 200.0, 1e4])
def test_a_scan_of_extreme_keys_is_finite(size, feature_map):
    """The delta rule divides by what was written, which may be nothing, or next to nothing."""
    keys = torch.full((1, 3, KV_HEADS, LENGTH, DIM), size).requires_grad_()
    values = draw(1, 3, KV_HEADS, LENGTH, DIM).requires_grad_()
    states = memory_math.scan(keys, values, *memory_math.empty(keys[:, 0]), "delta", feature_map)
    sum(part.sum() for part in states).backward()
    for tensor in (*states, keys.grad, values.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_feature_map_has_one_slope_at_zero(feature_map):
    """It is put together from two halves that meet there."""
    keys = torch.zeros(3, requires_grad=True)
    memory_math.map_keys(keys, feature_map).sum().backward()
    assert keys.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_whole_scale_is_that_many_writes(feature_map):
    """For the linear rule, and for each row its own number."""
    _, keys, values = draw_segment()
    state = draw_state()
    scaled = memory_math.update(keys, values, *state, "linear", feature_map, torch.tensor([3, 1]))
    repeated = [tuple(part.double() for part in state)]
    for _ in range(3):
        repeated.append(naive_update(keys, values, *repeated[-1], "linear", feature_map))
    for actual, once, thrice in zip(scaled, repeated[1], repeated[3], strict=True):
        assert_close(actual[0], thrice[0])
        assert_close(actual[1], once[1])


def test_a_fractional_scale_is_that_part_of_what_the_delta_rule_adds():
    _, keys, values = draw_segment()
    state = draw_state()
    scaled = memory_math.update(keys, values, *state, "delta", "elu", torch.tensor([0.5, 1.0]))
    for before, actual, after in zip(state, scaled, naive_update(keys, values, *state, "delta", "elu"), strict=True):
        assert_close(actual[0], (before[0] + after[0]) / 2)
        assert_close(actual[1], after[1])


@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_scale_zero_leaves_a_row_to_the_bit(rule, feature_map):
    _, keys, values = draw_segment()
    state = draw_state()
    updated = memory_math.update(keys, values, *state, rule, feature_map, torch.tensor([0, 1]))
    for before, after in zip(state, updated, strict=True):
        assert torch.equal(after[0], before[0])
        assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_autocast_changes_nothing(rule, feature_map, dtype):
    queries, keys, values = draw_segment()
    state = draw_state()
    segments = keys.unsqueeze(1), values.unsqueeze(1)

    def run():
        updated = memory_math.update(keys, values, *state, rule, feature_map)
        scanned = memory_math.scan(*segments, *state, rule, feature_map)
        return memory_math.retrieve(queries, *updated, feature_map), *updated, *scanned

    plain = run()
    with torch.autocast("cpu", dtype=dtype):
        cast = run()
    for expected, actual in zip(plain, cast, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", ["update", "scan"])
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_inputs_are_not_changed(rule, feature_map, function):
    queries, keys, values = draw_segment()
    if function == "scan":
        keys, values = keys.unsqueeze(1), values.unsqueeze(1)
    inputs = [queries, keys, values, *draw_state()]
    copies = [tensor.clone() for tensor in inputs]
    updated = getattr(memory_math, function)(*inputs[1:], rule, feature_map)
    memory_math.retrieve(queries, *inputs[3:], feature_map)
    for tensor in updated:
        # Nor may the result be a view, through which a later change would reach the input.
        assert all(tensor.data_ptr() != given.data_ptr() for given in inputs)
    for tensor, before in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("retrieve", READS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("norm", [0.0, 1e-45, 1e-38, 1e-30, 2e-20, 1e-15])
def test_empty_and_tiny_denominators_give_finite_values_and_gradients(retrieve, norm, feature_map, dtype):
    """An empty memory returns exact zeros; whatever was written with tiny weights never blows up."""
    queries, keys, values = (tensor.requires_grad_() for tensor in draw_segment(dtype))
    memory = (norm * draw_state()[0]).requires_grad_()
    memory_norm = torch.full((BATCH, KV_HEADS, DIM), norm).requires_grad_()
    retrieved = retrieve(queries, memory, memory_norm, feature_map)
    updated = memory_math.update(keys, values, memory, memory_norm, "delta", feature_map)
    assert retrieved.isfinite().all()
    assert all(part.isfinite().all() for part in updated)
    if norm == 0:
        assert not retrieved.any()
    (retrieved.sum() + sum(part.sum() for part in updated)).backward()
    for tensor in (queries, keys, values, memory, memory_norm):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("retrieve", READS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", [-1e4, -200.0, -40.0, -20.0, 200.0, 1e4])
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_extreme_keys_and_queries_give_finite_values_and_gradients(retrieve, rule, feature_map, size, dtype):
    """ELU + 1 vanishes far below zero and exp overflows far above it; neither may reach the output as NaN or inf."""
    _, _, values = draw_segment(dtype)
    queries = torch.full((BATCH, HEADS, LENGTH, DIM), size, dtype=dtype).requires_grad_()
    keys = torch.full((BATCH, KV_HEADS, LENGTH, DIM), size, dtype=dtype).requires_grad_()
    state = memory_math.empty(keys)
    for _ in range(3):
        state = memory_math.update(keys, values, *state, rule, feature_map)
    retrieved = retrieve(queries, *state, feature_map)
    retrieved.sum().backward()
    for tensor in (*state, retrieved, queries.grad, keys.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("retrieve", READS)
@pytest.mark.parametrize(("feature_map", "size"), [("elu", -16.0), ("exp", -40.0), ("softmax", -40.0)])
def test_small_but_real_denominators_keep_their_quotient(retrieve, feature_map, size):
    """The guard stands far below what real keys write: a single faint key is still returned as its value."""
    keys, values = torch.full((1, 1, 1, DIM), size), draw(1, 1, 1, DIM)
    state = memory_math.update(keys, values, *memory_math.empty(keys), "linear", feature_map)
    retrieved = retrieve(torch.zeros(1, 1, 1, DIM), *state, feature_map)
    assert_close(retrieved, values.double())


@pytest.mark.parametrize("retrieve", READS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shift", [-8.0, -20.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_far_negative_queries_and_keys_keep_their_precision(retrieve, feature_map, shift, dtype):
    """ELU(x) + 1 is exp(x) there, which 1 - (1 - exp(x)) rounds away: a query would find nothing, a key leave none."""
    queries, keys, values = draw_segment()
    queries, keys = (queries + shift).to(dtype).requires_grad_(), (keys + shift).to(dtype)
    state = draw_state()
    retrieved = retrieve(queries, *state, feature_map)
    retrieved.sum().backward()
    wide = queries.detach().double().requires_grad_()
    expected = naive_retrieve(wide, *state, feature_map)
    expected.sum().backward()
    assert_close(retrieved.detach(), expected.detach())
    assert_close(queries.grad, wide.grad, max(1e-4, torch.finfo(dtype).eps))
    added = memory_math.update(keys, values, *memory_math.empty(keys), "linear", feature_map)
    written = naive_update(keys, values, *memory_math.empty(keys), "linear", feature_map)
    for actual, wanted in zip(added, written, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", HALF)
def test_4096_ones_sum_to_4096(dtype):
    """In bfloat16 they would sum to 256. ELU(0) + 1 = 1, and exp(0) = 1."""
    keys = torch.zeros(1, 1, 1, DIM, dtype=dtype)
    values = torch.ones(1, 1, 1, DIM, dtype=dtype)
    for feature_map in FEATURE_MAPS:
        state = memory_math.empty(keys)
        for _ in range(4096):
            state = memory_math.update(keys, values, *state, "linear", feature_map)
        assert state[0].eq(4096).all()
        assert state[1].eq(4096).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("rule", "feature_map"), RULES_AND_MAPS)
def test_a_million_tokens_stay_finite_and_in_the_range_of_the_values(rule, feature_map, dtype):
    """512 segments of 2,048 keys, some as large as keys get; fp16 alone would overflow at 65,504."""
    keys = (5 * torch.randn(1, KV_HEADS, 2048, DIM)).to(dtype)
    values = torch.randn(1, KV_HEADS, 2048, DIM).to(dtype)
    state = memory_math.empty(keys)
    for _ in range(512):
        state = memory_math.update(keys, values, *state, rule, feature_map)
    tokens = state[1].double() / map_key(keys.double(), feature_map).sum(2)
    assert (tokens - 512).abs().max() <= 512 * 1e-4
    retrieved = memory_math.retrieve(draw(1, HEADS, LENGTH, DIM, dtype=dtype), *state, feature_map)
    assert all(tensor.isfinite().all() for tensor in (*state, retrieved))
    if rule == "linear":
        # A quotient of weighted sums: an average of values.
        assert retrieved.abs().max() <= values.abs().max()


def test_the_key_of_exp_is_clamped_and_its_queries_scale_cancels():
    """exp(8) is the largest weight of a key; a query may be shifted by any constant."""
    assert memory_math.map_keys(torch.tensor([7.0, 8.0, 500.0]), "exp").tolist() == pytest.approx(
        [math.exp(7), math.exp(8), math.exp(8)], rel=1e-6
    )
    queries, state = draw(BATCH, HEADS, LENGTH, DIM), draw_state()
    shifted = memory_math.retrieve(queries + 300, *state, "exp")
    # Adding 300 rounds the queries to 3e-5.
    assert_close(shifted, memory_math.retrieve(queries, *state, "exp").double(), 1e-3)


def test_the_key_of_softmax_has_a_largest_sum_which_its_channels_share():
    """Quiet keys are those of exp; loud ones are softmax, gradients too, and equally loud however loud they were."""
    quiet, loud = draw(5, DIM), draw(5, DIM) + 20.0
    assert torch.equal(memory_math.map_keys(quiet, "softmax"), memory_math.map_keys(quiet, "exp"))
    assert_close(memory_math.map_keys(loud, "softmax"), math.exp(8) * loud.double().softmax(-1))
    assert_close(memory_math.map_keys(loud + 300, "softmax"), math.exp(8) * loud.double().softmax(-1), 1e-3)
    gradients = []
    for mapped in (lambda keys: memory_math.map_keys(keys, "softmax"), lambda keys: math.exp(8) * keys.softmax(-1)):
        keys = loud.clone().requires_grad_()
        (mapped(keys) * quiet).sum().backward()
        gradients.append(keys.grad)
    assert_close(gradients[0], gradients[1].double(), 1e-4)


def test_unknown_names_are_refused():
    _, keys, values = draw_segment()
    with pytest.raises(ValueError, match=r"^feature_map='relu': must be one of 'elu', 'exp', 'softmax'$"):
        memory_math.map_keys(keys, "relu")
    with pytest.raises(ValueError, match=r"^memory_update='hebb': must be one of 'linear', 'delta'$"):
        memory_math.update(keys, values, *memory_math.empty(keys), "hebb")
