"""Decoding on static tensors: what the ordinary cache says and remembers, compiled once for any place of a segment."""

import copy
import pickle

import pytest
import torch
from models import FAMILIES, HYBRID, VOCABULARY, build, build_patched, open_gates, random_ids
from reading import assert_close, assert_same_state
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from transformers import CompileConfig, GenerationConfig

from infini_hf import InfiniCache, InfiniConfig, generate, patch_model, prefill, score, unpatch_model
from infini_hf.attention import InfiniAttention
from infini_hf.static_cache import StaticInfiniCache

SEGMENT = 8
BOUNDARIES = 3 * SEGMENT + 2
CARRY = {"overlap": 3, "sink_tokens": 2}
# Rows that begin, and stand in, before, at and after the end of a segment, and in later segments.
LENGTHS = (1, 5, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 3 * SEGMENT + 6)
GREEDY = {"do_sample": False, "max_new_tokens": BOUNDARIES}


@pytest.fixture
def model():
    return endless(build_patched(attention="sdpa", segment_length=SEGMENT, memory_update="delta", **CARRY))


@pytest.fixture
def compiled():
    """Compiles a model in one piece, the trace run as it is; a second trace is an error. Also counts the traces."""
    torch._dynamo.reset()
    traces = []

    def backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    def step(model, **options):
        return torch.compile(model, backend=backend, fullgraph=True, **options)

    step.backend, step.traces = backend, traces
    yield step
    torch._dynamo.reset()


def endless(model):
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def left_padded(lengths):
    """A left-padded batch of rows of several lengths, and its mask."""
    rows = [random_ids(1, length, seed=number) for number, length in enumerate(lengths)]
    ids = torch.cat([F.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    return ids, (ids > 0).long()


def filled(model, lengths=LENGTHS):
    """An ordinary cache of rows of several lengths."""
    ids, mask = left_padded(lengths)
    return prefill(model, ids, attention_mask=mask, progress=False)


def no_grad_step(step, token, cache, **options):
    with torch.no_grad():
        return step(token.contiguous(), past_key_values=cache, **options).logits[:, -1]


def decode_beside(model, cache, static, steps=BOUNDARIES, step=None):
    """Greedy tokens of the ordinary cache, with the static one read beside it: same logits, same choice at each."""
    token, chosen = random_ids(len(cache.seen), 1), []
    for _ in range(steps):
        expected = no_grad_step(model, token, cache)
        actual = no_grad_step(model if step is None else step, token, static)
        assert_close(actual, expected, 1e-5, f"logits after {cache.seen}")
        token = expected.argmax(-1, keepdim=True)
        assert torch.equal(actual.argmax(-1, keepdim=True), token)
        chosen.append(token)
    return torch.cat(chosen, dim=1)


def assert_same_rows(actual, expected, tolerance=1e-5):
    """The state row by row: what stands left of a short row's window is no state."""
    assert (actual.seen, actual.columns) == (expected.seen, expected.columns)
    for row in range(len(expected.seen)):
        assert_same_state(actual, expected, tolerance, row, row)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, InfiniAttention)]


# The same as an ordinary cache.


@pytest.mark.parametrize("feature_map", ["elu", "exp", "softmax"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize(("overlap", "sinks"), [(0, 0), (3, 2), (SEGMENT, 4)])
def test_a_step_is_that_of_the_ordinary_cache_wherever_rows_stand(rule, feature_map, overlap, sinks):
    options = {"memory_update": rule, "feature_map": feature_map, "overlap": overlap, "sink_tokens": sinks}
    model = build_patched(segment_length=SEGMENT, **options)
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    chosen = decode_beside(model, cache, static)
    assert_same_rows(static.to_infini_cache(), cache)
    assert len(chosen.unique()) > 10, "a model that repeats one token would hide every error"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_on_static_tensors(family):
    # Stock Gemma 2 has no sdpa; the other tests of this file have llama in eager mode.
    backend = "eager" if family == "gemma2" else "sdpa"
    model = build_patched(family, attention=backend, segment_length=SEGMENT, memory_update="delta", **CARRY)
    cache = filled(model, (3, SEGMENT + 6, 2 * SEGMENT))
    static = StaticInfiniCache.from_cache(cache, model)
    decode_beside(model, cache, static, steps=2 * SEGMENT)
    assert_same_rows(static.to_infini_cache(), cache)


def test_the_sigmoid_gate_and_an_empty_memory_leave_local_attention_exactly():
    """No gate moves a bit of what a row says before its first segment ends."""
    model = build_patched(segment_length=SEGMENT, gate="sigmoid", overlap=3)
    said = []
    for seed in (1, 2):
        cache = InfiniCache(open_gates(model, seed).config)
        with torch.no_grad():
            model(random_ids(2, 2), past_key_values=cache)
        static = StaticInfiniCache.from_cache(cache, model)
        said.append([no_grad_step(model, token, static) for token in random_ids(2, SEGMENT).split(1, dim=1)])
    for index, (ours, theirs) in enumerate(zip(*said, strict=True)):
        assert torch.equal(ours, theirs) == (index < SEGMENT - 2)


def test_shifts_of_a_calibrated_gate_are_respected():
    model = build_patched(segment_length=SEGMENT, feature_map="exp", overlap=3)
    for layer in layers_of(model):
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        layer.memory_gate.set_shifts(torch.randn(heads, layer.head_dim), torch.randn(kv_heads, layer.head_dim))
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    decode_beside(model, cache, static)
    assert_same_rows(static.to_infini_cache(), cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_in_a_step_is_not_read_and_moves_no_row(family):
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **CARRY)
    cache = filled(model, (3, SEGMENT - 1, 2 * SEGMENT))
    static = StaticInfiniCache.from_cache(cache, model)
    generator = torch.Generator().manual_seed(1)
    for token in random_ids(3, BOUNDARIES).split(1, dim=1):
        mask = (torch.rand(3, 1, generator=generator) > 0.4).long()
        expected = no_grad_step(model, token, cache, attention_mask=mask)
        actual = no_grad_step(model, token, static, attention_mask=mask)
        real = mask[:, 0].bool()
        assert_close(actual[real], expected[real], 1e-5, "logits")
    assert len(set(static.seen)) == 3
    if family == "llama":
        # Stock layers keep what stands at padding, which nobody sees.
        assert_same_rows(static.to_infini_cache(), cache)
    decode_beside(model, cache, static, steps=SEGMENT)


def test_the_memory_is_float32_under_a_bfloat16_model():
    model = build_patched(attention="sdpa", segment_length=SEGMENT, **CARRY).to(torch.bfloat16)
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    for token in random_ids(len(LENGTHS), BOUNDARIES).split(1, dim=1):
        assert_close(no_grad_step(model, token, static), no_grad_step(model, token, cache), 4e-2, "logits")
    for layer in static.layers:
        assert {getattr(layer, name).dtype for name in layer.SUMS} == {torch.float32}
        assert layer.rotated.dtype == torch.bfloat16


# There and back.


@pytest.mark.parametrize("family", ["llama", *HYBRID])
@pytest.mark.parametrize(("overlap", "sinks"), [(0, 0), (3, 2), (SEGMENT, SEGMENT)])
def test_conversion_there_and_back_is_the_same_state(family, overlap, sinks):
    model = build_patched(family, segment_length=SEGMENT, overlap=overlap, sink_tokens=sinks)
    for lengths in [(n,) for n in LENGTHS] + [LENGTHS]:
        cache = filled(model, lengths)
        before = [tensor.clone() for tensor in cache.tensors()]
        back = StaticInfiniCache.from_cache(cache, model).to_infini_cache()
        assert_same_rows(back, cache, 0.0)
        assert all(map(torch.equal, before, cache.tensors()))
        # What comes back is an ordinary cache in all respects.
        tokens = random_ids(len(lengths), 3)
        assert torch.equal(score(model, tokens, cache=back), score(model, tokens, cache=cache))


def test_an_empty_cache_converts_and_begins_with_one_token(model):
    static = StaticInfiniCache.from_cache(InfiniCache(model.config), model)
    assert (static.seen, static.columns, static.get_seq_length()) == ((), 0, 0)
    assert static.to_infini_cache().seen == ()
    ids, cache = random_ids(2, BOUNDARIES), InfiniCache(model.config)
    for token in ids.split(1, dim=1):
        assert_close(no_grad_step(model, token, static), no_grad_step(model, token, cache))
    assert_same_rows(static.to_infini_cache(), cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_longer_calls_between_steps_read_as_with_an_ordinary_cache(family):
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **CARRY)
    cache, static = InfiniCache(model.config), StaticInfiniCache(model.config)
    ids, mask = left_padded((4, SEGMENT + 3))
    for number, columns in enumerate((SEGMENT + 3, 1, 5, 1, 1, 1, 2, 2 * SEGMENT, 1, 3, 1, 1)):
        if number:
            ids, mask = random_ids(2, columns, seed=number), torch.ones(2, columns, dtype=torch.long)
            # Padding of a step, which stock layers have to leave out in the longer calls after it.
            mask[0, 0] = int(columns > 1)
        options = {"attention_mask": mask}
        expected, actual = no_grad_step(model, ids, cache, **options), no_grad_step(model, ids, static, **options)
        real = mask[:, -1].bool()
        assert_close(actual[real], expected[real], 1e-5, "logits")
        assert static.seen == cache.seen
    if family == "llama":
        assert_same_rows(static.to_infini_cache(), cache)
    decode_beside(model, cache, static, steps=SEGMENT)


def test_prefill_and_score_take_a_static_cache(model):
    ids = random_ids(2, 2 * SEGMENT + 3)
    cache, static = InfiniCache(model.config), StaticInfiniCache(model.config)
    for each in (cache, static):
        prefill(model, ids, cache=each, chunk_size=5, progress=False)
    assert_same_rows(static.to_infini_cache(), cache)
    assert_close(score(model, ids, cache=static), score(model, ids, cache=cache))


def test_a_snapshot_of_a_static_cache_is_one_of_an_ordinary_cache(model, tmp_path):
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    decode_beside(model, cache, static, steps=SEGMENT)
    static.notes["title"] = "A book"
    static.save_pretrained(tmp_path)
    assert_same_rows(InfiniCache.from_pretrained(tmp_path, model), cache)
    loaded = StaticInfiniCache.from_pretrained(tmp_path, model)
    assert isinstance(loaded, StaticInfiniCache)
    assert loaded.notes == {"title": "A book"}
    decode_beside(model, cache, loaded, steps=SEGMENT)


# Static.


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_tensor_moves_or_changes_its_shape(family):
    model = build_patched(family, segment_length=SEGMENT, **CARRY)
    static = StaticInfiniCache.from_cache(filled(model), model)
    names = [(layer, name) for layer in static.layers for name in layer.TENSORS]
    places = [(getattr(*name).data_ptr(), getattr(*name).shape) for name in names]
    size = static.state_bytes()
    for token in random_ids(len(LENGTHS), BOUNDARIES).split(1, dim=1):
        no_grad_step(model, token, static)
    static.reorder_cache(torch.arange(len(LENGTHS)).flip(0))
    assert places == [(getattr(*name).data_ptr(), getattr(*name).shape) for name in names]
    assert static.state_bytes() == size
    assert static.is_compileable


@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_one_compilation_serves_every_place_of_every_cache(family, compiled):
    """Three boundaries, rows that differ, and a cache of another fill: traced once, whole, with no wait inside."""
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **CARRY)
    step = compiled(model)
    for lengths in ((1, SEGMENT + 5), (3 * SEGMENT, 2)):
        cache = filled(model, lengths)
        decode_beside(model, cache, StaticInfiniCache.from_cache(cache, model), step=step)
        assert len(compiled.traces) == 1


def test_generate_compiles_its_step_once(model, compiled):
    options = CompileConfig(backend=compiled.backend, mode="default", fullgraph=True)
    # What `generate` compiles for by itself is no CPU.
    options._compile_all_devices = True
    options = {**GREEDY, "cache_implementation": "static", "compile_config": options}
    ids, mask = left_padded((4, 2 * SEGMENT + 1))
    for number, length in enumerate((1, 5, ids.shape[1])):
        prompt, said = ids[:, -length:], mask[:, -length:]
        expected = model.generate(prompt, attention_mask=said, **GREEDY)
        assert torch.equal(model.generate(prompt, attention_mask=said, **options), expected), f"call {number}"
    cache, static = filled(model, (5, 9)), filled(model, (5, 9))
    for turn in range(2):
        question = random_ids(2, 4, seed=turn)
        expected = generate(model, question, cache=cache, **GREEDY)
        assert torch.equal(generate(model, question, cache=static, **options), expected)
        assert_same_rows(static, cache)
    assert len(compiled.traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_inductor_compiles_the_step(family):
    torch._dynamo.reset()
    model = build_patched(family, attention="sdpa", segment_length=SEGMENT, memory_update="delta", **CARRY)
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    step = torch.compile(model, fullgraph=True)
    _, code = run_and_get_code(no_grad_step, step, random_ids(len(LENGTHS), 1), copy.copy(static))
    # Windows are written in place: no buffer of their shape is made.
    shape = ", ".join(map(str, static.first.keys.shape))
    assert f"({shape})" in code[0]
    assert f"empty_strided_cpu(({shape})" not in code[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        decode_beside(model, cache, static, step=step)
    assert_same_rows(static.to_infini_cache(), cache)


@pytest.mark.gpu
def test_generate_compiles_by_itself_on_an_accelerator_and_records_a_cuda_graph():
    torch._dynamo.reset()
    model = endless(build_patched(attention="sdpa", segment_length=SEGMENT, memory_update="delta", **CARRY)).cuda()
    ids, mask = (tensor.cuda() for tensor in left_padded((4, 2 * SEGMENT + 1)))
    torch._dynamo.utils.counters.clear()
    for number in range(3):
        prompt, said = ids[:, number:], mask[:, number:]
        expected = model.generate(prompt, attention_mask=said, **GREEDY)
        static = model.generate(prompt, attention_mask=said, cache_implementation="static", **GREEDY)
        assert torch.equal(static, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]


# Generation.


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams returned", "samples"],
)
def test_both_generates_say_the_same_and_the_cache_holds_what_they_return(family, options):
    model = endless(build_patched(family, segment_length=SEGMENT, **CARRY))
    (ids, mask), results, options = left_padded((4, 2 * SEGMENT + 1)), [], {**GREEDY, **options}
    for kind in (None, "static"):
        torch.manual_seed(3)
        cache = filled(model, (SEGMENT - 2, 3))
        results.append(
            (
                model.generate(ids, attention_mask=mask, cache_implementation=kind, **options),
                generate(model, ids, cache, attention_mask=mask, cache_implementation=kind, **options),
                cache,
            )
        )
    (plain, streamed, cache), (static_plain, static_streamed, static) = results
    assert torch.equal(static_plain, plain)
    assert torch.equal(static_streamed, streamed)
    assert type(static) is InfiniCache
    assert_same_rows(static, cache)


@pytest.mark.parametrize("way", ["model", "config", "cache"])
def test_every_way_to_ask_for_it_reaches_a_static_cache(model, way):
    """The model's generation config, one that is passed, a cache of one's own; rows that end early leave no pads."""
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=[5, 6, 7, 8, 9, 10])
    expected_cache, cache = filled(model, (3, 9)), filled(model, (3, 9))
    question, met = random_ids(2, 3), []
    expected = generate(model, question, cache=expected_cache, **GREEDY)
    assert (expected == 0).any(), "no row ends before the others"
    options = dict(GREEDY)
    if way == "model":
        model.generation_config.cache_implementation = "static"
    elif way == "config":
        config = copy.deepcopy(model.generation_config)
        config.update(**GREEDY, cache_implementation="static")
        options = {"generation_config": config}
    else:
        cache = StaticInfiniCache.from_cache(cache, model)
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: met.append(type(kwargs["past_key_values"])), with_kwargs=True, prepend=True
    )
    assert torch.equal(generate(model, question, cache=cache, **options), expected)
    assert met.count(StaticInfiniCache) >= expected.shape[1] - question.shape[1]
    assert_same_rows(cache.to_infini_cache() if way == "cache" else cache, expected_cache)


def test_a_step_of_generation_costs_nothing_of_what_was_read_before(model):
    """The stock loop learns of no column before the call, so neither its mask nor its ids grow with the past."""
    cache, widths = prefill(model, random_ids(1, 20 * SEGMENT), progress=False), []

    def note(_, args, kwargs):
        if isinstance(kwargs["past_key_values"], StaticInfiniCache):
            tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
            widths.append(max(tensor.shape[-1] for tensor in tensors))

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    prepared, prepare = [], model.prepare_inputs_for_generation

    def spy(input_ids, **kwargs):
        prepared.append(max(part.shape[-1] for part in (input_ids, kwargs["position_ids"])))
        return prepare(input_ids, **kwargs)

    model.prepare_inputs_for_generation = spy
    generate(model, random_ids(1, 2), cache=cache, cache_implementation="static", **GREEDY)
    assert max(widths) == 1
    assert max(prepared) <= 2 + BOUNDARIES


def test_a_returned_cache_goes_on(model):
    ids = random_ids(2, SEGMENT + 3)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    assert isinstance(static.past_key_values, StaticInfiniCache)
    assert_close(torch.stack(static.logits), torch.stack(plain.logits), 1e-5, "logits")
    assert_same_rows(static.past_key_values.to_infini_cache(), plain.past_key_values)
    given = StaticInfiniCache.from_cache(prefill(model, ids[:, :-1], progress=False), model)
    again = model.generate(ids, past_key_values=given, cache_implementation="static", **GREEDY)
    assert torch.equal(again, plain.sequences)
    assert_same_rows(given.to_infini_cache(), plain.past_key_values)


# The cache as an object.


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_tensors_of_its_own(family, way):
    model = build_patched(family, segment_length=SEGMENT, **CARRY)
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    twin = way(static)
    for token in random_ids(len(LENGTHS), SEGMENT, seed=5).split(1, dim=1):
        no_grad_step(model, token, twin)
    assert_same_rows(static.to_infini_cache(), cache)
    decode_beside(model, cache, static, steps=SEGMENT)
    assert twin.seen == cache.seen
    static.restore(twin)
    no_grad_step(model, random_ids(len(LENGTHS), 1), static)
    assert static.seen != twin.seen


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_are_reordered_selected_repeated_and_forgotten_as_in_an_ordinary_cache(family):
    model = build_patched(family, segment_length=SEGMENT, memory_update="delta", **CARRY)
    changes = [
        lambda cache: cache.reorder_cache(torch.arange(len(cache.seen)).flip(0)),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 4, 4, 6])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, True])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset_rows(torch.tensor([False, True, True, False, False, False])),
    ]
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    for change in changes:
        change(cache), change(static)
        decode_beside(model, cache, static, steps=4)
        assert_same_rows(static.to_infini_cache(), cache)
    cache.reset(), static.reset()
    assert static.seen == ()
    assert static.batch_size == -1
    decode_beside(model, filled(model, (2,)), StaticInfiniCache.from_cache(filled(model, (2,)), model), steps=2)


def test_caches_made_in_inference_mode_serve_outside_of_it(model):
    with torch.inference_mode():
        cache = filled(model)
        static = StaticInfiniCache.from_cache(cache, model)
        no_grad_step(model, random_ids(len(LENGTHS), 1), static)
        static.batch_select_indices(torch.tensor([0, 2]))
        twin = copy.copy(static)
    for each in (static, twin):
        no_grad_step(model, random_ids(2, 1), each)


def test_an_interrupted_step_is_noticed(model):
    static = StaticInfiniCache.from_cache(filled(model), model)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        no_grad_step(model, random_ids(len(LENGTHS), 1), static)
    handle.remove()
    with pytest.raises(ValueError, match="interrupted"):
        static.to_infini_cache()


# What is refused.


def test_training_and_autograd_are_refused(model):
    static = StaticInfiniCache.from_cache(filled(model), model)
    for ids in (random_ids(len(LENGTHS), 1), random_ids(len(LENGTHS), 3)):
        with pytest.raises(ValueError, match=r"written in place.*torch\.no_grad\(\)"):
            model(ids, past_key_values=static)
        with pytest.raises(ValueError, match=r"written in place.*model\.eval\(\)"):
            no_grad_step(model.train(), ids, static)
        model.eval()
    with pytest.raises(NotImplementedError, match="train with an InfiniCache"):
        static.with_tensors(static.tensors())
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        static.crop(-1)


def test_other_models_patches_batches_and_masks_are_refused(model):
    cache = filled(model)
    static = StaticInfiniCache.from_cache(cache, model)
    token, other = random_ids(len(LENGTHS), 1), build_patched(segment_length=SEGMENT, memory_update="delta", **CARRY)
    for refused, pattern in (
        (lambda: no_grad_step(model, token[:1], static), "holds 7 rows and the call has 1"),
        (lambda: no_grad_step(other, token, static), "another model"),
        (lambda: StaticInfiniCache.from_cache(cache, other), "another model"),
        (lambda: StaticInfiniCache.from_cache(cache, build_patched(segment_length=5)), "made for"),
        (lambda: no_grad_step(model, token, static, attention_mask=torch.ones(3, 1)), r"\(3, 1\)"),
    ):
        with pytest.raises(ValueError, match=pattern):
            refused()
    with pytest.raises(NotImplementedError, match="two dimensions"):
        no_grad_step(model, token, static, attention_mask=torch.ones(len(LENGTHS), 1, 1, 1))
    with pytest.raises(NotImplementedError, match="memory_scale"), torch.no_grad():
        model.get_decoder()(token, past_key_values=static, memory_scale=torch.ones(len(LENGTHS)))
    assert_same_rows(static.to_infini_cache(), cache)
    with pytest.raises(TypeError, match="stock layer"):
        build()(token, past_key_values=static)


def test_layers_whose_cache_cannot_be_static_are_refused():
    partly = build_patched(segment_length=SEGMENT, layers=[1])
    with pytest.raises(NotImplementedError, match=r"layers=\[1\].*layers \[0\].*cache_implementation"):
        partly.generate(random_ids(1, 5), cache_implementation="static", **GREEDY)
    with pytest.raises(NotImplementedError, match=r"gemma3_text.*'flex_attention'.*sdpa"):
        StaticInfiniCache(build_patched("gemma3_text", attention="flex_attention", segment_length=SEGMENT).config)
    with pytest.raises(ValueError, match="patch the model first"):
        StaticInfiniCache(build().config)


def test_a_prompt_in_compiled_chunks_is_refused(model):
    with pytest.raises(NotImplementedError, match=r"prefill_chunk_size=4.*infini_hf\.prefill"):
        model.generate(random_ids(1, 9), cache_implementation="static", prefill_chunk_size=4, **GREEDY)


def test_nothing_of_it_stays_on_an_unpatched_model():
    model = build()
    before = set(vars(model))
    unpatch_model(patch_model(model, InfiniConfig(segment_length=SEGMENT)))
    assert set(vars(model)) == before
    ids = random_ids(1, 5)
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4, cache_implementation="static"), expected)
    assert ids.max() < VOCABULARY
