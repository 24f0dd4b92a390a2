"""Where rows of a beam search end that no end-of-text token ends, and what the cache holds of them."""

import pytest
import torch
from models import build_patched, random_ids
from reading import assert_same_state
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import EosTokenCriteria

from infini_hf import InfiniCache, generate, prefill

BEAMS = {"num_beams": 2, "do_sample": False, "max_new_tokens": 12}


class Stops(StoppingCriteria):
    """Ends a row at one token in six."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], torch.arange(3, 20))


class OwnEnds(Stops):
    """As transformers knows it: rows that have ended are padded."""

    eos_token_id = torch.tensor([3])


def model_of():
    model = build_patched(segment_length=8)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def held_alone(model, row):
    """The cache after one row of ids."""
    return prefill(model, row[None], progress=False)


def test_what_is_put_after_the_end_of_a_beam_is_not_remembered():
    model, ids = model_of(), random_ids(2, 9)
    rows = {}
    for pad, eos in ((95, 96), (0, None)):
        options = {**BEAMS, "pad_token_id": pad, "eos_token_id": eos}
        cache = InfiniCache(model.config)
        out = generate(model, ids, cache=cache, stopping_criteria=[Stops()], **options)
        expected = model.generate(ids, stopping_criteria=[Stops()], **options)
        assert torch.equal(out, expected)
        fill = -1 if eos is None else pad
        lengths = [len(row[row != fill]) for row in out]
        assert len(set(lengths)) == 2
        assert cache.seen == tuple(lengths)
        for index, (row, length) in enumerate(zip(out, lengths, strict=True)):
            assert_same_state(cache, held_alone(model, row[:length]), row=index, expected_row=0)
        rows[eos] = lengths
    assert rows[96] == rows[None]


@pytest.mark.parametrize(("pad", "eos", "fill"), [(0, 96, 96), (96, 96, 96), (7, [8, 7], 7)])
def test_a_search_whose_padding_ends_texts_is_refused(pad, eos, fill):
    model, cache = model_of(), InfiniCache(model_of().config)
    with pytest.raises(ValueError, match=f"pad_token_id={pad}: beam search pads with {fill}, which ends texts too"):
        generate(
            model,
            random_ids(2, 9),
            cache=cache,
            stopping_criteria=[Stops()],
            pad_token_id=pad,
            eos_token_id=eos,
            **BEAMS,
        )
    assert not cache.seen


@pytest.mark.parametrize("kind", [OwnEnds, EosTokenCriteria])
def test_criteria_that_say_what_ends_a_text_end_rows_one_by_one(kind):
    model, ids = model_of(), random_ids(3, 9, seed=3)
    criteria = [OwnEnds()] if kind is OwnEnds else [EosTokenCriteria(eos_token_id=list(range(3, 20)))]
    options = {"do_sample": False, "max_new_tokens": 12, "stopping_criteria": criteria}
    expected = model.generate(ids, **options)
    cache = InfiniCache(model.config)
    out = generate(model, ids, cache=cache, **options)
    assert torch.equal(out, expected)
    lengths = [len(row) if not (row == 0).any() else int((row == 0).nonzero()[0]) for row in out]
    assert len(set(lengths)) > 1
    assert cache.seen == tuple(lengths)


@pytest.mark.parametrize("kind", ["dynamic", "offloaded"])
@pytest.mark.parametrize("place", ["call", "config", "model"])
def test_names_of_caches_that_the_cache_is_already(kind, place):
    model, ids = model_of(), random_ids(2, 9)
    expected = generate(model, ids, max_new_tokens=5, do_sample=False)
    options = {"max_new_tokens": 5, "do_sample": False}
    if place == "call":
        options["cache_implementation"] = kind
    elif place == "config":
        options = {"generation_config": GenerationConfig(**options, pad_token_id=0, cache_implementation=kind)}
    else:
        model.generation_config.cache_implementation = kind
    assert torch.equal(generate(model, ids, **options), expected)


def test_rows_that_begin_with_padding_are_told_of_whatever_a_search_pads_with(caplog):
    model, ids = model_of(), random_ids(2, 9)
    ids[0, :3] = 0
    for eos in (None, 96):
        caplog.clear()
        generate(model, ids, eos_token_id=eos, **BEAMS)
        assert "rows [0] begin with the padding token 0" in caplog.text
