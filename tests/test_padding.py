"""Padding is never written, never read, and never moves a segment boundary: a padded row is the row alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HYBRID, build, build_patched, open_gates, random_ids
from reading import assert_close, assert_same_state, read, read_whole, state_of

from infini_hf import InfiniCache, InfiniConfig, patch_model, unpatch_model
from infini_hf.fast_paths import MODES, fast_paths

SEGMENT = 8
# Past three segment boundaries, at one, just before one, short of the first, and a single token.
LENGTHS = (29, 24, 23, 5, 1)
CARRIED = {"no carry": {}, "carry": {"overlap": 5, "sink_tokens": 2}, "whole overlap": {"overlap": 8}}
carried = pytest.mark.parametrize("carry", CARRIED.values(), ids=CARRIED)


def scatter(rows, side, width, generator):
    """Mask `(batch, width)` with as many valid columns as each row has tokens: left, right, or anywhere."""
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        count = row.shape[1]
        if side == "right":
            columns = torch.arange(count)
        elif side == "left":
            columns = torch.arange(width - count, width)
        else:
            columns = torch.randperm(width, generator=generator)[:count]
        mask[number, columns] = 1
    return mask


def pad(rows, mask, generator):
    """Rows `(1, n)` laid into the valid columns of `mask`; the padding holds random tokens, which must not matter."""
    ids = torch.randint(3, 97, mask.shape, generator=generator)
    for number, row in enumerate(rows):
        ids[number, mask[number].bool()] = row[0]
    return ids


def ragged(side, lengths=LENGTHS, width=None, seed=0):
    """Rows of several lengths, and the same rows in one padded batch with its mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [random_ids(1, length, seed=seed + number) for number, length in enumerate(lengths)]
    mask = scatter(rows, side, width or max(lengths) + 3, generator)
    return rows, pad(rows, mask, generator), mask


def assert_rows_are_alone(model, rows, ids, mask, sizes=None, tolerance=1e-5):
    """Each row of the batch, whole and in chunks, says and remembers what it does alone."""
    whole = read_whole(model, ids, mask)
    chunked, cache = read(model, ids, sizes, mask)
    for number, row in enumerate(rows):
        alone, expected = read(model, row)
        valid = mask[number].bool()
        assert_close(whole[number, valid], alone[0], tolerance, f"row {number}, layer-major")
        assert_close(chunked[number, valid], alone[0], tolerance, f"row {number}, chunks {sizes}")
        if not cache.stock_layers:
            assert_same_state(cache, expected, tolerance, row=number, expected_row=0)
    assert cache.seen == tuple(row.shape[1] for row in rows)
    return cache


@carried
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padded_rows_equal_the_rows_alone(side, rule, carry):
    model = build_patched("llama", segment_length=SEGMENT, memory_update=rule, **carry)
    rows, ids, mask = ragged(side)
    assert_rows_are_alone(model, rows, ids, mask, sizes=[1, 3, 8, 2, 18])


# Two rows of which one is past its first segment may hold windows of one length and yet end their segments at other
# tokens: what the one carries, the other has read of its first segment.
@pytest.mark.parametrize("kept", [{"overlap": 1}, {"sink_tokens": 2}, {"overlap": 1, "sink_tokens": 1}], ids=str)
def test_two_rows_of_any_lengths_are_read_on_token_by_token_as_the_rows_alone(kept):
    model = build_patched("llama", segment_length=4, **kept)
    more = random_ids(2, 9, seed=9)
    alone = {}
    for first, second in itertools.product(range(1, 10), repeat=2):
        rows, ids, mask = ragged("left", lengths=(first, second), width=max(first, second))
        _, cache = read(model, ids, mask=mask)
        logits, cache = read(model, more, [1] * 9, cache=cache)
        for number, row in enumerate(rows):
            key = number, row.shape[1]
            if key not in alone:
                alone[key] = read(model, torch.cat([row, more[number : number + 1]], dim=1))
            expected, memory = alone[key]
            assert_close(logits[number], expected[0, row.shape[1] :], what=f"rows of {first} and {second}, {number}")
            assert_same_state(cache, memory, row=number, expected_row=0)


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("options", [{"feature_map": "exp"}, {"gate": "sigmoid"}, {"layers": [1]}], ids=str)
def test_padded_rows_equal_the_rows_alone_with_other_options(side, options):
    model = build_patched("qwen3", "sdpa", segment_length=SEGMENT, overlap=3, **options)
    rows, ids, mask = ragged(side, seed=1)
    assert_rows_are_alone(model, rows, ids, mask, sizes=[11, 11, 10])


# Stock sliding layers count columns, so padding inside a row narrows their window: left padding is what they promise.
@carried
@pytest.mark.parametrize("family", HYBRID)
def test_left_padded_rows_of_hybrids_equal_the_rows_alone(family, carry):
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **carry)
    rows, ids, mask = ragged("left")
    assert_rows_are_alone(model, rows, ids, mask, sizes=[1, 3, 8, 2, 18])
    assert_rows_are_alone(model, rows, ids, mask, sizes=[4] * 8)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_mask_and_any_chunks_equal_the_rows_alone(stock_model, data):
    """Random valid columns, chunk cuts and carry-over: rows at every place of their segments beside each other."""
    overlap, sinks = data.draw(st.integers(0, SEGMENT)), data.draw(st.integers(0, SEGMENT))
    rule, mode = data.draw(st.sampled_from(["linear", "delta"])), data.draw(st.sampled_from(MODES))
    lengths = data.draw(st.lists(st.integers(0, 4 * SEGMENT), min_size=2, max_size=3).filter(any))
    rows, ids, mask = ragged("anywhere", lengths, width=4 * SEGMENT + 2, seed=data.draw(st.integers(0, 99)))
    cuts = sorted(data.draw(st.sets(st.integers(1, ids.shape[1] - 1), max_size=5)))
    sizes = [end - start for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)]
    config = InfiniConfig(segment_length=SEGMENT, overlap=overlap, sink_tokens=sinks, memory_update=rule)
    model = open_gates(patch_model(stock_model, config))
    try:
        kept = [number for number, row in enumerate(rows) if row.shape[1]]
        with fast_paths(mode):
            whole = read_whole(model, ids, mask)
            chunked, cache = read(model, ids, sizes, mask)
        assert cache.seen == tuple(lengths)
        for number in kept:
            alone, expected = read(model, rows[number])
            valid = mask[number].bool()
            assert_close(whole[number, valid], alone[0], 1e-5, f"row {number}, layer-major")
            assert_close(chunked[number, valid], alone[0], 1e-5, f"row {number}, chunks {sizes}")
            assert_same_state(cache, expected, 1e-5, row=number, expected_row=0)
    finally:
        unpatch_model(model)


@pytest.fixture(scope="module")
def stock_model():
    return build("llama")


@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_a_chunk_of_padding_alone_changes_nothing_for_its_row(family):
    """Row 1 has no token in the second chunk, both have none in the third, and row 1 goes on in the fourth."""
    model = build_patched(family, segment_length=SEGMENT, overlap=2, sink_tokens=1)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    mask[:, 20:28] = 0 if family == "llama" else 1
    rows = [ids[number : number + 1, mask[number].bool()] for number in range(2)]
    assert_rows_are_alone(model, rows, ids, mask, sizes=[10, 10, 8, 12])


def test_a_call_of_nothing_but_padding_leaves_the_state_alone():
    model = build_patched(segment_length=SEGMENT, overlap=2)
    ids = random_ids(2, 21)
    _, cache = read(model, ids)
    _, expected = read(model, ids)
    read(model, random_ids(2, 9), mask=torch.zeros(2, 9, dtype=torch.long), cache=cache)
    assert cache.seen == (21, 21)
    assert cache.columns == 30
    for (name, tensor), (_, before) in zip(state_of(cache), state_of(expected), strict=True):
        assert torch.equal(tensor, before), name


@carried
@pytest.mark.parametrize("family", ["llama", *HYBRID])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_never_mix(family, padded, carry):
    """Other tokens in row 0 leave row 1 bit-equal, in the logits and in the state."""
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **carry)
    _, ids, mask = ragged("left", (29, 25))
    if not padded:
        ids, mask = random_ids(2, 29), None
    other = ids.clone()
    other[0] = (other[0] - 3 + 11) % 94 + 3
    logits, cache = read(model, ids, mask=mask)
    changed, moved = read(model, other, mask=mask)
    assert not torch.equal(logits[0], changed[0])
    assert torch.equal(logits[1], changed[1])
    for (name, tensor), (_, after) in zip(state_of(cache), state_of(moved), strict=True):
        assert torch.equal(tensor[1], after[1]), name
        assert not torch.equal(tensor[0], after[0]), name


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_what_stands_in_the_padding_does_not_matter(side):
    model = build_patched(segment_length=SEGMENT, overlap=3, memory_update="delta")
    rows, ids, mask = ragged(side)
    other = pad(rows, mask, torch.Generator().manual_seed(99))
    assert not torch.equal(ids, other)
    valid = mask.bool()
    assert torch.equal(read_whole(model, ids, mask)[valid], read_whole(model, other, mask)[valid])


@carried
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_gradients_of_a_padded_batch_are_the_sum_of_the_rows_alone(side, rule, carry):
    model = build_patched(segment_length=SEGMENT, memory_update=rule, **carry)
    model.train()
    # A row that never fills its segment beside rows with a memory is where 0/0 would show.
    rows, ids, mask = ragged(side)

    def gradients(batches):
        model.zero_grad()
        for tokens, valid in batches:
            logits = model(tokens, attention_mask=valid, use_cache=False).logits
            logits[torch.ones_like(tokens).bool() if valid is None else valid.bool()].logsumexp(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    padded = gradients([(ids, mask)])
    for name, expected in gradients([(row, None) for row in rows]).items():
        assert bool(padded[name].isfinite().all()), name
        assert bool(expected.any()), name
        assert_close(padded[name], expected, 1e-4, f"gradient of {name}")


def test_a_mask_of_the_call_and_of_the_whole_stream_mean_the_same():
    model = build_patched(segment_length=SEGMENT)
    _, ids, mask = ragged("left", (29, 17))
    expected, _ = read(model, ids, [12, ids.shape[1] - 12], mask)
    cache = InfiniCache(model.config)
    read(model, ids[:, :12], mask=mask[:, :12], cache=cache)
    with torch.no_grad():
        rest = model(ids[:, 12:], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(rest, expected[:, 12:])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 5), ValueError, "shape"),
        (torch.ones(1, 10), ValueError, "shape"),
        (torch.ones(2, 1, 10, 10), NotImplementedError, "two dimensions"),
        ({"full_attention": torch.ones(2, 10)}, NotImplementedError, "two dimensions"),
    ],
    ids=["too short", "too few rows", "four dimensions", "a dict"],
)
def test_masks_that_do_not_fit_are_refused(mask, error, message):
    model = build_patched(segment_length=SEGMENT)
    with pytest.raises(error, match=message):
        model(random_ids(2, 10), attention_mask=mask)


@pytest.mark.parametrize(
    ("positions", "told"),
    [([0, 1, 2, 3, 0, 1], "3 to 0"), ([0, 0, 1, 2, 3, 4], "0 to 0"), ([5, 9, 10, 11, 12, 13], "5 to 9")],
    ids=["a document more", "after one of one token", "after a jump"],
)
def test_packed_documents_are_refused(positions, told):
    model, ids = build_patched(segment_length=SEGMENT), random_ids(2, 6)
    with pytest.raises(NotImplementedError, match=f"position_ids go from {told} inside a row, .* packed"):
        model(ids, position_ids=torch.tensor([positions]))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q says that several texts lie in one row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 6]))
    # Padding has any position, and a row may begin to count anywhere.
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)
    counted = torch.tensor([[1, 0, 1, 2, 3, 4], [9, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        given = model(ids, attention_mask=mask, position_ids=counted).logits
        assert torch.equal(given, model(ids, attention_mask=mask).logits)
