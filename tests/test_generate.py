"""Generation, prefilling and scoring: every way to the next token gives the same one."""

import copy
import threading

import pytest
import torch
from models import FAMILIES, build, build_patched, random_ids, relative_error
from reading import assert_close, assert_same_state, read, read_whole, state_of
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from infini_hf import InfiniCache, generate, prefill, score

SEGMENT = 8
BOUNDARIES = 3 * SEGMENT
CARRY = {"overlap": 3, "sink_tokens": 2}


@pytest.fixture(params=["llama-carry", "llama", "gemma3_text-carry"])
def model(request):
    """A patched model that never ends a text by itself, with and without overlap and sinks."""
    family, _, carry = request.param.partition("-")
    options = {"memory_update": "delta", **CARRY} if carry else {}
    return endless(build_patched(family, segment_length=SEGMENT, **options))


@pytest.fixture
def llama():
    return endless(build_patched("llama", segment_length=SEGMENT, **CARRY))


def endless(model):
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def greedy_by_hand(model, ids, steps, mask=None):
    """The argmax of a plain forward over everything so far, token by token: no cache, no `generate`."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        chosen = read_whole(model, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
    return ids


def left_padded(lengths, seed=0):
    """Rows of several lengths, the left-padded batch, and its mask."""
    rows = [random_ids(1, length, seed=seed + number) for number, length in enumerate(lengths)]
    width = max(lengths)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=0) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (width - row.shape[1], 0), value=0) for row in rows])
    return rows, ids, mask


# Greedy, batches, beams, sampling.


@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 2])
def test_cached_greedy_equals_no_cache_and_the_teacher_forced_argmax(model, length):
    ids = random_ids(2, length)
    cached = model.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False, use_cache=False))
    assert torch.equal(cached, greedy_by_hand(model, ids, BOUNDARIES))
    assert torch.equal(cached[:, length:], read_whole(model, cached)[:, length - 1 : -1].argmax(-1))
    assert len(set(cached[0, length:].tolist())) > 3, "a model that repeats one token would hide every error"


def test_logits_of_cached_generation_are_those_of_a_plain_forward(model):
    ids = random_ids(2, SEGMENT + 3)
    output = model.generate(
        ids, max_new_tokens=BOUNDARIES, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    plain = read_whole(model, output.sequences)[:, ids.shape[1] - 1 : -1]
    assert_close(torch.stack(output.logits, dim=1), plain, 1e-5, "logits")
    assert isinstance(output.past_key_values, InfiniCache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_batches_generate_what_each_row_does_alone(model, use_cache):
    rows, ids, mask = left_padded([SEGMENT + 1, 3 * SEGMENT, 2])
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=BOUNDARIES, do_sample=False, use_cache=use_cache)
    for number, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=BOUNDARIES, do_sample=False)
        assert torch.equal(batch[number, ids.shape[1] :], alone[0, row.shape[1] :]), f"row {number}"


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"length_penalty": 2.0, "early_stopping": True}])
@pytest.mark.parametrize("lengths", [(SEGMENT - 1, SEGMENT), (SEGMENT + 1, 3 * SEGMENT + 2)])
def test_beams_equal_no_cache(model, options, lengths):
    _, ids, mask = left_padded(lengths)
    options = {"num_beams": 3, "max_new_tokens": BOUNDARIES, "do_sample": False, "attention_mask": mask, **options}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_in_a_padded_batch_what_a_row_does_alone_and_in_chunks(family):
    model = endless(build_patched(family, segment_length=SEGMENT, **CARRY))
    rows, ids, mask = left_padded([SEGMENT - 3, 3 * SEGMENT + 2])
    options = {"max_new_tokens": BOUNDARIES, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(batch, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for number, row in enumerate(rows):
        cache = prefill(model, row[:, :-1], chunk_size=3, progress=False)
        alone = generate(model, row[:, -1:], cache=cache, **options)
        assert torch.equal(batch[number, ids.shape[1] :], alone[0, 1:])


def test_sampling_with_a_seed_equals_no_cache(model):
    ids, results = random_ids(2, SEGMENT + 1), []
    for use_cache in (True, False, True):
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 2}
        results.append(model.generate(ids, max_new_tokens=BOUNDARIES, use_cache=use_cache, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("size", [1, 5, SEGMENT, 100])
def test_prefill_chunk_size_changes_nothing(model, size):
    ids = random_ids(2, 3 * SEGMENT + 2)
    expected = model.generate(ids, max_new_tokens=SEGMENT, do_sample=False)
    chunked = model.generate(ids, max_new_tokens=SEGMENT, do_sample=False, prefill_chunk_size=size)
    assert torch.equal(chunked, expected)


# Turns of a conversation.


def test_turns_over_a_warm_cache_equal_one_long_context(model):
    """Three turns, each with only the new ids, equal generation from the whole text so far."""
    cache, text = InfiniCache(model.config), torch.zeros(2, 0, dtype=torch.long)
    for turn, length in enumerate([SEGMENT + 3, 1, 2 * SEGMENT]):
        new = random_ids(2, length, seed=turn)
        text = torch.cat([text, new], dim=1)
        # With the mask, since the text may hold generated pad tokens, which generate takes for padding.
        expected = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=11, do_sample=False)
        output = generate(model, new, cache=cache, max_new_tokens=11, do_sample=False)
        assert torch.equal(output, torch.cat([new, expected[:, text.shape[1] :]], dim=1)), f"turn {turn}"
        assert cache.seen == (expected.shape[1],) * 2
        text = expected
    assert_same_state(cache, prefill(model, text, progress=False))


def test_the_plain_call_continues_a_warm_cache(model):
    """`model.generate` itself takes the whole text and a cache that lacks its end, as in transformers."""
    ids = random_ids(2, 3 * SEGMENT + 2)
    cache = prefill(model, ids[:, :-5], progress=False)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=BOUNDARIES, do_sample=False)
    assert torch.equal(output, model.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False))


def test_turns_of_padded_rows_equal_each_row_alone():
    model = endless(build_patched("llama", segment_length=SEGMENT, memory_update="delta", **CARRY))
    lengths = [[SEGMENT + 1, 3, 2 * SEGMENT], [2, SEGMENT, 1], [5, 4, 3]]
    together, alone = InfiniCache(model.config), [InfiniCache(model.config) for _ in range(3)]
    for turn, counts in enumerate(lengths):
        rows, ids, mask = left_padded(counts, seed=10 * turn)
        output = generate(model, ids, cache=together, attention_mask=mask, max_new_tokens=10, do_sample=False)
        for number, row in enumerate(rows):
            single = generate(model, row, cache=alone[number], max_new_tokens=10, do_sample=False)
            assert torch.equal(output[number, ids.shape[1] :], single[0, row.shape[1] :]), f"turn {turn}, row {number}"
    for number in range(3):
        assert_same_state(together, alone[number], row=number, expected_row=0)


def test_generate_after_prefill_equals_generate_from_the_whole_text(model):
    ids = random_ids(2, 5 * SEGMENT + 3)
    cache = prefill(model, ids[:, :-2], chunk_size=7, progress=False)
    output = generate(model, ids[:, -2:], cache=cache, max_new_tokens=BOUNDARIES, do_sample=False)
    expected = model.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False)
    assert torch.equal(output[:, 2:], expected[:, ids.shape[1] :])


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_afterwards_the_cache_holds_every_returned_token_and_no_padding(llama, pad_is_eos, beams):
    """The end-of-text token is one that row 0 alone says early; the rows go on as if each had been alone."""
    lengths = [SEGMENT + 2, 3]
    rows, ids, mask = left_padded(lengths)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    options |= {"early_stopping": True} if beams > 1 else {}
    for eos in range(3, 97):
        options |= {"eos_token_id": eos, "pad_token_id": eos if pad_is_eos else 0}
        said = llama.generate(ids, **options)[:, ids.shape[1] :]
        ends = (said == eos).int().argmax(1) + 1
        if eos in said[0] and eos not in said[1] and 3 < ends[0] < 17:
            break
    counts = [int(ends[0]), 20]
    cache = InfiniCache(llama.config)
    output = generate(llama, ids, cache=cache, **options)[:, ids.shape[1] :]
    assert torch.equal(output, said)
    assert cache.seen == (lengths[0] + counts[0], lengths[1] + counts[1])
    for number, row in enumerate(rows):
        text = torch.cat([row, output[number : number + 1, : counts[number]]], dim=1)
        assert_same_state(cache, prefill(llama, text, progress=False), row=number, expected_row=0)


@pytest.mark.parametrize("has_eos", [False, True], ids=["no end-of-text token", "one that nobody says"])
def test_a_generated_pad_token_is_a_token_like_any_other(llama, has_eos):
    """Where no row has finished there is no padding, whatever ids were generated last."""
    ids = random_ids(1, SEGMENT)
    free = llama.generate(ids, max_new_tokens=12, do_sample=False)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": int(free[0, -1])}
    if has_eos:
        options["eos_token_id"] = min(set(range(97)) - set(free[0].tolist()))
    cache = InfiniCache(llama.config)
    assert torch.equal(generate(llama, ids, cache=cache, **options), free)
    assert cache.seen == (free.shape[1],)


class StopsAfter(StoppingCriteria):
    """Ends a row behind a token, which transformers then pads."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("pad", ["another", "the end of a text", "the last token said"])
def test_a_row_that_another_criterion_ends_leaves_no_padding(llama, pad):
    """Such a row has no end-of-text token of its own; what follows its last token is padding, whatever that is."""
    ids, options = random_ids(2, SEGMENT), {"max_new_tokens": 12, "do_sample": False}
    free = llama.generate(ids, **options)[:, SEGMENT:]
    eos = min(set(range(1, 97)) - set(free.flatten().tolist()))
    last = next(int(token) for token in free[0, 3:8] if token not in free[1])
    said = int((free[0] == last).nonzero()[0]) + 1
    cache = InfiniCache(llama.config)
    options |= {"eos_token_id": eos, "pad_token_id": {"another": 0, "the end of a text": eos}.get(pad, last)}
    options |= {"stopping_criteria": StoppingCriteriaList([StopsAfter(last)])}
    output = generate(llama, ids, cache=cache, **options)
    assert torch.equal(output[0, SEGMENT : SEGMENT + said], free[0, :said])
    assert (output[0, SEGMENT + said :] == options["pad_token_id"]).all()
    assert cache.seen == (SEGMENT + said, SEGMENT + 12)
    text = torch.cat([ids[:1], free[:1, :said]], dim=1)
    assert_same_state(cache, prefill(llama, text, progress=False), row=0, expected_row=0)


def test_beams_that_another_criterion_ends_need_a_pad_token_of_their_own(llama):
    ids, options = random_ids(2, SEGMENT), {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": 5, "pad_token_id": 5}
    with pytest.raises(ValueError, match="pad_token_id=5"):
        generate(llama, ids, stopping_criteria=StoppingCriteriaList([StopsAfter(9)]), **options)
    # One row has no padding, and without another criterion each row ends with its own token.
    generate(llama, ids[:1], stopping_criteria=StoppingCriteriaList([StopsAfter(9)]), **options)
    generate(llama, ids, **options)


def test_stop_strings_end_a_row_where_they_end(prose_model, prose_tokenizer):
    ids, eos = (
        torch.randint(10, 300, (2, 20), generator=torch.Generator().manual_seed(1)),
        prose_tokenizer.eos_token_id,
    )
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
    free = prose_model.generate(ids, **options)[:, 20:]
    assert eos not in free, "rows that end by themselves show nothing"
    other = prose_tokenizer.decode(free[1])
    pieces = (prose_tokenizer.decode(free[0, place : place + 2]) for place in range(4, 15))
    word = next(piece for piece in pieces if piece.isascii() and piece not in other)
    options |= {"stop_strings": word, "tokenizer": prose_tokenizer}
    expected = prose_model.generate(ids, **options)[:, 20:]
    said = [row.tolist().index(eos) if eos in row else len(row) for row in expected]
    assert 4 < said[0] < said[1] == 20, "one row has to end before the other"
    cache = InfiniCache(prose_model.config)
    assert torch.equal(generate(prose_model, ids, cache=cache, **options)[:, 20:], expected)
    assert cache.seen == (20 + said[0], 20 + said[1])


def test_end_of_text_tokens_of_the_model_can_be_switched_off(llama, monkeypatch):
    ids = random_ids(1, SEGMENT)
    free = llama.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", int(free[0, SEGMENT + 5]))
    cache = InfiniCache(llama.config)
    output = generate(llama, ids, cache=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(output, free)
    assert cache.seen == (SEGMENT + 20,)


def test_several_end_of_text_tokens(llama):
    ids = random_ids(2, SEGMENT)
    free = llama.generate(ids, max_new_tokens=20, do_sample=False)[:, SEGMENT:]
    ends = [int(free[0, 3]), int(free[1, 9])]
    cache = InfiniCache(llama.config)
    output = generate(llama, ids, cache=cache, max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0)
    said = [min(int((row == end).nonzero()[0]) for end in ends if end in row) + 1 for row in free]
    assert cache.seen == tuple(SEGMENT + count for count in said)
    assert output.shape[1] == SEGMENT + max(said)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("beams", [1, 4])
def test_several_returned_sequences_leave_a_row_for_each(model, warm, beams):
    past, ids = random_ids(2, SEGMENT + 1), random_ids(2, 3, seed=1)
    cache = prefill(model, past, progress=False) if warm else InfiniCache(model.config)
    options = {"num_return_sequences": 3, "num_beams": beams, "do_sample": beams == 1, "max_new_tokens": 9}
    torch.manual_seed(3)
    output = generate(model, ids, cache=cache, **options)
    text = torch.cat([past, ids], dim=1) if warm else ids
    torch.manual_seed(3)
    expected = model.generate(text, **options)
    assert torch.equal(output[:, 3:], expected[:, text.shape[1] :])
    assert cache.seen == (expected.shape[1],) * 6
    assert_same_state(cache, prefill(model, expected, progress=False))


def test_return_dict_hands_back_the_callers_cache(llama):
    cache = InfiniCache(llama.config)
    output = generate(
        llama, random_ids(2, 5), cache=cache, max_new_tokens=7, do_sample=False, return_dict_in_generate=True
    )
    assert output.past_key_values is cache
    assert cache.seen == (output.sequences.shape[1],) * 2 == (12, 12)


def test_a_generation_config_is_obeyed(llama):
    ids = random_ids(1, 5)
    free = llama.generate(ids, max_new_tokens=12, do_sample=False)
    eos = int(free[0, 8])
    first = 5 + int((free[0, 5:] == eos).nonzero()[0]) + 1
    cache = InfiniCache(llama.config)
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    output = generate(llama, ids, cache=cache, generation_config=settings)
    assert torch.equal(output, free[:, :first])
    assert cache.seen == (first,)


# What people build on generate.


def make_tokenizer():
    """One word for each id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {f"w{index}": index for index in range(97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2")


def test_a_streamer_prints_the_tokens_generated(llama, capsys):
    tokenizer, ids = make_tokenizer(), random_ids(1, SEGMENT)
    output = generate(
        llama, ids, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0, SEGMENT:]).split()


def test_the_text_generation_pipeline_runs_on_a_patched_model(llama):
    tokenizer, ids = make_tokenizer(), random_ids(1, SEGMENT + 1)
    llama.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2, max_new_tokens=12, do_sample=False)
    prompts = [tokenizer.decode(ids[0]), tokenizer.decode(random_ids(1, 2)[0])]
    tokenizer.padding_side = "left"
    answers = pipeline("text-generation", model=llama, tokenizer=tokenizer)(
        prompts, batch_size=2, return_full_text=False
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = llama.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        assert answer[0]["generated_text"].split() == tokenizer.decode(alone[0], skip_special_tokens=True).split()


def test_two_conversations_on_one_model_never_meet(model):
    caches = [InfiniCache(model.config), InfiniCache(model.config)]
    texts = [torch.zeros(1, 0, dtype=torch.long)] * 2
    for turn in range(3):
        for who in range(2):
            new = random_ids(1, 5 + 4 * who, seed=7 * turn + who)
            output = generate(model, new, cache=caches[who], max_new_tokens=6, do_sample=False)
            texts[who] = torch.cat([texts[who], output], dim=1)
    for who in range(2):
        assert_same_state(caches[who], prefill(model, texts[who], progress=False))


def test_two_threads_on_one_model_never_meet(model):
    results = {}

    def talk(who):
        cache = InfiniCache(model.config)
        pieces = [
            generate(model, random_ids(1, 9, seed=10 * who + turn), cache=cache, max_new_tokens=8, do_sample=False)
            for turn in range(4)
        ]
        results[who] = torch.cat(pieces, dim=1), cache

    threads = [threading.Thread(target=talk, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart = dict(results)
    for who in range(2):
        talk(who)
        assert torch.equal(results[who][0], apart[who][0])
        assert_same_state(apart[who][1], results[who][1])


# score


@pytest.mark.parametrize("chunk_size", [1, 5, SEGMENT, 64])
def test_score_is_the_cross_entropy_of_a_plain_forward(model, chunk_size):
    ids = random_ids(2, 4 * SEGMENT + 3)
    expected = F.cross_entropy(read_whole(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    nll = score(model, ids, chunk_size=chunk_size, progress=False)
    assert nll.dtype == torch.float32
    assert_close(nll, expected, 1e-5, "nll")
    assert_close(score(model, ids[0].tolist(), chunk_size=chunk_size, progress=False), expected[:1], 1e-5, "of a list")


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_score_of_padded_rows_is_that_of_the_rows_alone(model, chunk_size):
    rows, ids, mask = left_padded([3 * SEGMENT + 1, SEGMENT, 2])
    nll = score(model, ids, attention_mask=mask, chunk_size=chunk_size, progress=False)
    for number, row in enumerate(rows):
        count = row.shape[1] - 1
        assert_close(nll[number, nll.shape[1] - count :], score(model, row, progress=False)[0], 1e-5, f"row {number}")
        assert not nll[number, : nll.shape[1] - count].any()


def test_score_goes_on_from_a_cache(model):
    ids = random_ids(2, 4 * SEGMENT)
    cache = prefill(model, ids[:, :19], progress=False)
    nll = score(model, ids[:, 19:], cache=cache, progress=False)
    assert_close(nll, score(model, ids, progress=False)[:, 19:], 1e-5, "nll")
    assert cache.seen == (4 * SEGMENT,) * 2


@pytest.mark.parametrize("length", [0, 1])
def test_score_of_too_few_tokens_is_empty(llama, length):
    assert score(llama, random_ids(2, length), progress=False).shape == (2, 0)


# prefill


PIECES = [1, 2, 13, 4, 0, 9]
KINDS = {
    "tensor": lambda ids: ids,
    "row": lambda ids: ids[0],
    "int32": lambda ids: ids.int(),
    "list": lambda ids: ids[0].tolist(),
    "list of lists": lambda ids: ids.tolist(),
    "iterator of tensors": lambda ids: iter(ids.split(PIECES, dim=1)),
    "list of tensors": lambda ids: list(ids.split(PIECES, dim=1)),
    "iterator of lists": lambda ids: (piece[0].tolist() for piece in ids.split(PIECES, dim=1)),
}


@pytest.mark.parametrize("chunk_size", [6, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_takes_a_tensor_a_list_rows_or_pieces(llama, kind, chunk_size):
    ids = random_ids(1, sum(PIECES))
    cache = prefill(llama, KINDS[kind](ids), chunk_size=chunk_size, progress=False)
    assert_same_state(cache, read(llama, ids)[1])


def test_padding_on_the_right_is_refused(llama):
    """The row would go on from a column that is none of its text."""
    cache = InfiniCache(llama.config)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match=r"ends in padding in rows \[1\]: .* pad on the left"):
        generate(llama, random_ids(2, 3), cache=cache, attention_mask=mask, max_new_tokens=2)
    assert cache.seen == ()


def test_padding_without_a_mask_is_told(llama, caplog):
    pad, ids = llama.generation_config.pad_token_id, random_ids(3, 4)
    ids[1, 0] = pad
    one = {"max_new_tokens": 1, "do_sample": False}
    generate(llama, ids, attention_mask=(ids != pad).long(), **one)
    generate(llama, ids[1:2], **one)
    generate(llama, ids, pad_token_id=2, eos_token_id=2, **one)
    assert not caplog.text
    generate(llama, ids, **one)
    assert f"rows [1] begin with the padding token {pad}, and without attention_mask it is read as text" in caplog.text


def test_prefill_refuses_a_mask_beside_pieces(llama):
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="attention_mask"):
        prefill(llama, iter([ids]), attention_mask=torch.ones_like(ids))


def test_prefill_hands_back_the_cache_it_was_given(llama):
    cache = InfiniCache(llama.config)
    assert prefill(llama, random_ids(1, 9), cache=cache, progress=False) is cache


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("function", [prefill, score])
def test_an_interrupted_reading_leaves_the_last_whole_chunk(model, function, error):
    """The interrupt comes between two layers of the third chunk; afterwards reading goes on from the second."""
    ids, size, calls = random_ids(2, 4 * 11), 11, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error

    handle = model.model.layers[-1].register_forward_pre_hook(interrupt)
    cache = InfiniCache(model.config)
    with pytest.raises(error):
        function(model, ids, cache=cache, chunk_size=size, progress=False)
    handle.remove()
    assert_same_state(cache, prefill(model, ids[:, : 2 * size], chunk_size=size, progress=False), tolerance=0)
    prefill(model, ids[:, cache.columns :], cache=cache, progress=False)
    assert_same_state(cache, read(model, ids)[1])


def test_an_interrupted_forward_outside_prefill_is_noticed(llama):
    def interrupt(*args):
        raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
    cache = InfiniCache(llama.config)
    with pytest.raises(KeyboardInterrupt):
        llama(random_ids(1, 20), past_key_values=cache)
    handle.remove()
    with pytest.raises(ValueError, match="interrupted"):
        llama(random_ids(1, 20), past_key_values=cache)
    cache.reset()
    _, expected = read(llama, random_ids(1, 20))
    read(llama, random_ids(1, 20), cache=cache)
    assert_same_state(cache, expected, tolerance=0)


def test_after_a_reset_another_model_reads_at_its_own_positions():
    """Cosines and sines stay in the cache; they are those of the model that reads."""
    one = build_patched(segment_length=SEGMENT)
    overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    other, ids = build_patched(segment_length=SEGMENT, overrides=overrides), random_ids(1, 20)
    _, cache = read(one, ids)
    cache.reset()
    logits, _ = read(other, ids, cache=cache)
    expected, _ = read(other, ids)
    assert torch.equal(logits, expected)
    assert relative_error(read(one, ids)[0], expected) > 1e-2


def test_an_interrupted_generation_leaves_the_callers_cache_alone(model):
    cache = prefill(model, random_ids(2, 19), progress=False)
    before, calls = copy.copy(cache), []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = model.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, random_ids(2, 3), cache=cache, max_new_tokens=20, do_sample=False)
    handle.remove()
    assert_same_state(cache, before, tolerance=0)
    generate(model, random_ids(2, 3), cache=cache, max_new_tokens=20, do_sample=False)
    assert cache.seen == (42, 42)


# Refusals.


def test_crop_and_assisted_decoding_are_refused(llama):
    cache = prefill(llama, random_ids(1, 9), progress=False)
    for part in (cache, cache.layers[0]):
        with pytest.raises(NotImplementedError, match="cannot be"):
            part.crop(-1)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": llama}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            generate(llama, random_ids(1, 9), cache=cache, max_new_tokens=5, **options)
        with pytest.raises(NotImplementedError, match="an InfiniCache cannot be cropped"):
            llama.generate(random_ids(1, 9), max_new_tokens=5, **options)
    assert cache.seen == (9,)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("option", [{"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 2}])
def test_an_assistant_is_refused_before_it_touches_the_model(family, option):
    """An early exit sets the number of layers in the config, and an error in between left it there."""
    model, ids = build_patched(family, segment_length=8), random_ids(1, 30)
    layers, before = model.config.num_hidden_layers, model(ids).logits
    config = GenerationConfig(max_new_tokens=4, **option)
    for call in (
        lambda: model.generate(ids, max_new_tokens=4, **option),
        lambda: model.generate(ids, generation_config=config),
        lambda: generate(model, ids, generation_config=config),
    ):
        with pytest.raises(NotImplementedError, match="without an assistant"):
            call()
    assert model.config.num_hidden_layers == layers
    assert model(ids).logits.equal(before)
    # Of beams transformers does without.
    config.num_beams, config.do_sample = 2, False
    assert generate(model, ids, generation_config=config).equal(model.generate(ids, generation_config=config))


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), [], [[]]], ids=str)
def test_generate_without_a_token_is_refused(llama, ids):
    with pytest.raises(ValueError, match="no token"):
        generate(llama, ids, cache=prefill(llama, random_ids(1, 9), progress=False))


def test_generation_from_a_cache_without_using_it_is_refused(llama):
    """Every step would read the whole text again into the cache: wrong tokens without a word."""
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="use_cache"):
        generate(llama, ids, use_cache=False, max_new_tokens=3)
    with pytest.raises(ValueError, match="use_cache"):
        llama.generate(ids, past_key_values=InfiniCache(llama.config), use_cache=False, max_new_tokens=3)


def test_a_config_that_training_left_without_cache_does_not_matter(llama):
    """`Trainer` sets `use_cache` to false and saves it; generating from a cache goes on all the same."""
    ids, options = random_ids(2, 2 * SEGMENT + 3), {"max_new_tokens": BOUNDARIES, "do_sample": False}
    expected = generate(llama, ids, **options)
    llama.config.use_cache = llama.generation_config.use_cache = False
    cache = prefill(llama, ids[:, :-2], progress=False)
    assert torch.equal(generate(llama, ids, **options), expected)
    assert torch.equal(generate(llama, ids[:, -2:], cache=cache, **options), expected[:, ids.shape[1] - 2 :])
    assert cache.seen == (expected.shape[1],) * 2


def test_embeddings_beside_ids_are_refused(llama):
    """The stock loop would take them for the last token alone, after ids that were read before."""
    ids, cache, options = random_ids(1, 12), InfiniCache(llama.config), {"max_new_tokens": 5, "do_sample": False}
    embeddings = llama.get_input_embeddings()(ids[:, :9]).detach()
    with pytest.raises(NotImplementedError, match=r"inputs_embeds: .* reads ids alone; .*model\(inputs_embeds="):
        generate(llama, ids[:, :9], cache=cache, inputs_embeds=embeddings, **options)
    assert not cache.seen
    with torch.no_grad():
        llama(inputs_embeds=embeddings, past_key_values=cache)
    assert torch.equal(generate(llama, ids[:, 9:], cache=cache, **options), generate(llama, ids, **options)[:, 9:])


def test_two_caches_at_once_are_refused(llama):
    cache = InfiniCache(llama.config)
    with pytest.raises(ValueError, match="past_key_values beside cache"):
        generate(llama, random_ids(1, 3), cache=cache, past_key_values=cache)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.rand(1, 4), TypeError),
        (torch.ones(1, 4, dtype=torch.bool), TypeError),
        ([0.5, 1.0], TypeError),
        (["a", "b"], TypeError),
        ([[1, 2], [3]], TypeError),
        (torch.tensor([[1, 97]]), ValueError),
        (torch.tensor([[-1, 4]]), ValueError),
        (torch.ones(1, 2, 3, dtype=torch.long), ValueError),
    ],
    ids=["floats", "bools", "list of floats", "words", "rows of two lengths", "past the end", "negative", "3D"],
)
@pytest.mark.parametrize("function", [prefill, generate, score])
def test_bad_ids_are_refused(llama, function, ids, error):
    with pytest.raises(error, match="ids"):
        function(llama, ids)


def test_foreign_caches_are_refused(llama):
    ids = random_ids(1, 5)
    for cache in (DynamicCache(), DynamicCache(config=llama.config)):
        with pytest.raises(ValueError, match="DynamicCache"):
            llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="DynamicCache"):
            llama.generate(ids, past_key_values=cache, max_new_tokens=2)
        with pytest.raises(TypeError, match="DynamicCache"):
            generate(llama, ids, cache=cache)
    with pytest.raises(ValueError, match="patch"):
        InfiniCache(build("llama").config)


def test_caches_of_another_patch_or_batch_are_refused(llama):
    other = build_patched("llama", segment_length=SEGMENT + 1, **CARRY)
    with pytest.raises(ValueError, match="made for"):
        llama(random_ids(1, 5), past_key_values=InfiniCache(other.config))
    cache = prefill(llama, random_ids(2, 5), progress=False)
    with pytest.raises(ValueError, match="2 rows and the call has 3"):
        llama(random_ids(3, 5), past_key_values=cache)


def test_a_cache_of_a_patched_model_is_refused_by_a_stock_one(llama):
    with pytest.raises(TypeError, match="stock layer"):
        build("llama")(random_ids(1, 5), past_key_values=InfiniCache(llama.config))


@pytest.mark.parametrize("kind", ["offloaded_static", "quantized"])
def test_other_cache_implementations_are_refused(llama, kind):
    with pytest.raises(ValueError, match="cache_implementation"):
        llama.generate(random_ids(1, 5), max_new_tokens=2, cache_implementation=kind)


def test_the_dynamic_cache_implementation_is_what_a_patched_model_has(llama):
    ids = random_ids(1, SEGMENT + 1)
    expected = llama.generate(ids, max_new_tokens=SEGMENT, do_sample=False)
    given = llama.generate(ids, max_new_tokens=SEGMENT, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(given, expected)


def test_a_cache_under_activation_checkpointing_is_refused_in_training_alone(llama):
    llama.gradient_checkpointing_enable()
    cache, ids = InfiniCache(llama.config), random_ids(1, 20)
    llama.train()
    with pytest.raises(ValueError, match="checkpointing"):
        llama(ids, past_key_values=cache)
    llama.eval()
    read(llama, ids, cache=cache)
    assert cache.seen == (20,)


@pytest.mark.parametrize("function", [prefill, generate, score])
def test_models_that_are_not_patched_are_refused(function):
    with pytest.raises(ValueError, match="not patched"):
        function(build("llama"), random_ids(1, 5))
    with pytest.raises(TypeError, match="str"):
        function("llama", random_ids(1, 5))


# The cache as an object.


def ragged_cache(model):
    """Three rows at three places of their segments, the rows alone, and what each reads next."""
    rows, ids, mask = left_padded([2 * SEGMENT + 3, SEGMENT, 3])
    return prefill(model, ids, attention_mask=mask, progress=False), rows


def assert_rows_go_on(model, cache, rows):
    """Each row of the cache continues the text of the row given."""
    following = random_ids(len(rows), SEGMENT + 1, seed=50)
    logits, _ = read(model, following, cache=cache)
    for number, row in enumerate(rows):
        alone = read_whole(model, torch.cat([row, following[number : number + 1]], dim=1))[:, row.shape[1] :]
        assert_close(logits[number : number + 1], alone, 1e-5, f"row {number}")


def test_rows_of_a_cache_can_be_selected(model):
    for index in ([2, 0], torch.tensor([1]), torch.tensor([True, False, True])):
        cache, rows = ragged_cache(model)
        cache.batch_select_indices(index)
        chosen = torch.arange(3)[torch.as_tensor(index)].tolist()
        assert cache.seen == tuple(rows[number].shape[1] for number in chosen)
        assert_rows_go_on(model, cache, [rows[number] for number in chosen])


def test_rows_of_a_cache_can_be_repeated(model):
    cache, rows = ragged_cache(model)
    cache.batch_repeat_interleave(2)
    assert_rows_go_on(model, cache, [rows[number] for number in (0, 0, 1, 1, 2, 2)])


def test_rows_of_a_cache_can_be_reordered(model):
    cache, rows = ragged_cache(model)
    cache.reorder_cache(torch.tensor([1, 2, 1]))
    assert_rows_go_on(model, cache, [rows[number] for number in (1, 2, 1)])


def test_row_operations_on_a_fresh_cache_do_nothing(llama):
    cache = InfiniCache(llama.config)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    assert (cache.seen, cache.columns, cache.state_bytes()) == ((), 0, 0)
    assert_rows_go_on(llama, cache, [torch.zeros(1, 0, dtype=torch.long)] * 2)


def test_offload_and_prefetch_move_every_tensor(llama):
    """The meta device stands in for an accelerator: tensors go there, and none stays behind."""
    cache = prefill(llama, random_ids(2, 19), progress=False)
    before = {name: tensor.clone() for name, tensor in state_of(cache)}
    away, back = cache.layers[0], cache.layers[1]
    away.device = torch.device("meta")
    away.prefetch()
    back.offload()
    back.prefetch()
    for name, tensor in state_of(cache):
        if name.startswith("layer 0"):
            assert tensor.device.type == "meta", name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the CPU there is nowhere to offload to")
def test_an_offloaded_cache_changes_nothing(llama):
    llama.cuda()
    ids = random_ids(2, SEGMENT + 1).cuda()
    expected = llama.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False)
    offloaded = llama.generate(ids, max_new_tokens=BOUNDARIES, do_sample=False, cache_implementation="offloaded")
    assert torch.equal(offloaded, expected)


def test_reset_forgets_everything(model):
    cache, _ = ragged_cache(model)
    cache.reset()
    assert (cache.seen, cache.columns, cache.get_seq_length(), cache.state_bytes()) == ((), 0, 0, 0)
    # Another batch size and no padding: as a new cache would be.
    ids = random_ids(2, 3 * SEGMENT)
    logits, _ = read(model, ids, cache=cache)
    assert torch.equal(logits, read(model, ids)[0])
    assert_same_state(cache, read(model, ids)[1], tolerance=0)


def test_reset_leaves_copies_alone(model):
    cache, rows = ragged_cache(model)
    twin = copy.copy(cache)
    cache.reset()
    assert_rows_go_on(model, twin, rows)


def test_detach_cuts_the_graph(model):
    """The loss of the second chunk reaches the first through the cache, and no further than a detached one."""
    first, second = random_ids(1, 2 * SEGMENT + 1), random_ids(1, SEGMENT, seed=1)

    def reach(detached):
        embeddings = model.get_input_embeddings()(first).detach().requires_grad_()
        cache = InfiniCache(model.config)
        model(inputs_embeds=embeddings, past_key_values=cache)
        if detached:
            cache.detach()
        model(second, past_key_values=cache).logits.logsumexp(-1).sum().backward()
        return embeddings.grad

    assert bool((reach(detached=False).abs().sum(-1) > 0).all())
    assert reach(detached=True) is None


def test_the_state_is_bounded(llama):
    sizes = {prefill(llama, random_ids(1, count * SEGMENT), progress=False).state_bytes() for count in (2, 5, 40)}
    assert len(sizes) == 1


def test_a_wrapped_model_is_found(llama):
    ids = random_ids(1, SEGMENT + 1)
    expected = prefill(llama, ids, progress=False)
    assert_same_state(prefill(torch.nn.Sequential(llama), ids, progress=False), expected, tolerance=0)


def test_progress_is_off_when_asked(llama, capsys, monkeypatch):
    monkeypatch.setattr("infini_hf.streaming.PATIENCE", 0.0)
    prefill(llama, random_ids(1, 30), chunk_size=4, progress=False)
    assert capsys.readouterr().err == ""
    prefill(llama, random_ids(1, 30), chunk_size=4)
    assert "reading" in capsys.readouterr().err


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
@pytest.mark.parametrize("function", [prefill, score])
def test_bad_chunk_sizes_are_refused(llama, function, chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        function(llama, random_ids(1, 5), chunk_size=chunk_size)
