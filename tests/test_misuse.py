"""What a tired user does: each is right, or a sentence that names the value and the way out."""

import copy
import gc
import logging
import pickle

import numpy as np
import pytest
import torch
from models import build, build_patched, random_ids, relative_error
from reading import read, read_whole

from infini_hf import (
    AutoInfiniModelForCausalLM,
    InfiniCache,
    InfiniConfig,
    generate,
    is_patched,
    patch_model,
    patched,
    prefill,
    score,
    unpatch_model,
)
from infini_hf.static_cache import StaticInfiniCache


@pytest.fixture
def llama():
    return build_patched("llama", segment_length=8, overlap=2)


def test_arrays_are_rows_and_not_a_stream(llama):
    ids = random_ids(2, 20)
    assert prefill(llama, ids.numpy()).seen == (20, 20)
    assert torch.equal(score(llama, ids.numpy()), score(llama, ids))
    assert prefill(llama, list(np.split(ids.numpy(), 4, axis=1))).seen == (20, 20)


def test_what_a_tokenizer_returns_is_refused_with_the_way_out(llama):
    for function in (prefill, generate, score):
        with pytest.raises(TypeError, match=r"tokenizer\(text\)\['input_ids'\]"):
            function(llama, {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]})


def test_pieces_of_another_batch_are_refused(llama):
    with pytest.raises(ValueError, match="a piece of 1 rows after pieces of 2"):
        prefill(llama, iter([random_ids(2, 3), random_ids(1, 3)]))


def test_a_mask_that_contradicts_the_past_is_refused(llama):
    ids, mask = random_ids(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[:, :4] = 0
    _, cache = read(llama, ids[:, :10])
    with pytest.raises(ValueError, match=r"says that \[6\] of the earlier tokens .* read \[10\]"):
        llama(ids[:, 10:], attention_mask=mask, past_key_values=cache)


def test_a_cache_of_another_model_is_refused(llama):
    cache, other = prefill(llama, random_ids(1, 20)), build_patched("llama", seed=1, segment_length=8, overlap=2)
    with pytest.raises(ValueError, match="filled by another model"):
        prefill(other, random_ids(1, 5), cache=cache)


def test_a_memory_of_an_unpatched_model_is_not_saved(tmp_path):
    model = build("llama")
    with patched(model, InfiniConfig(segment_length=8)):
        cache = prefill(model, random_ids(1, 20))
    with pytest.raises(ValueError, match="no longer patched with InfiniConfig"):
        cache.save_pretrained(tmp_path)


def test_a_snapshot_says_what_differs_and_overlooks_what_does_not_matter(llama, tmp_path):
    prefill(llama, random_ids(1, 20)).save_pretrained(tmp_path)
    llama.config.an_option_of_a_later_version = None
    assert InfiniCache.from_pretrained(tmp_path, model=llama).seen == (20,)
    llama.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match=r"rms_norm_eps 1e-06 there and 0\.5 here"):
        InfiniCache.from_pretrained(tmp_path, model=llama)


def test_a_long_prompt_is_read_once_and_in_chunks(llama, monkeypatch):
    widths = []
    llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = random_ids(1, 9000)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generate(llama, ids, **options)
    assert max(widths) == 2048
    assert sum(widths) <= 9000 + 2 * 4


def test_a_generation_config_is_used_and_stays_as_it_was(llama, caplog):
    config = llama.generation_config
    config.max_new_tokens, config.use_cache = 4, False
    with caplog.at_level(logging.WARNING):
        out = generate(llama, random_ids(1, 5), generation_config=config)
    assert out.shape == (1, 9)
    assert config.use_cache is False


def test_loading_takes_options_of_the_config(tmp_path):
    build("mistral", sliding_window=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window=None"):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=InfiniConfig(segment_length=8))
    model = AutoInfiniModelForCausalLM.from_pretrained(
        tmp_path, infini_config=InfiniConfig(segment_length=8), sliding_window=None, use_cache=False
    )
    assert model.config.sliding_window is None
    assert model.config.use_cache is False


def test_loading_takes_a_variant(llama, tmp_path):
    llama.save_pretrained(tmp_path, variant="fp16")
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, variant="fp16", attn_implementation="eager").eval()
    ids = random_ids(1, 30)
    assert torch.equal(read_whole(loaded, ids), read_whole(llama, ids))


def test_model_and_cache_survive_pickling(llama):
    ids = random_ids(1, 30)
    _, cache = read(llama, ids[:, :20])
    model, copied = pickle.loads(pickle.dumps((llama, cache)))
    rest, _ = read(model, ids[:, 20:], cache=copied)
    assert relative_error(rest, read_whole(llama, ids)[:, 20:]) <= 1e-5
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


@pytest.mark.parametrize("padded", [False, True])
def test_every_gate_gets_a_gradient_in_training_however_short_the_call(llama, padded):
    ids = random_ids(2, 5)
    mask = torch.zeros_like(ids) if padded else None
    llama.train()(ids, attention_mask=mask).logits.sum().backward()
    for layer in llama.model.layers:
        assert torch.equal(layer.self_attn.memory_gate.bias.grad, torch.zeros(6))


def test_padding_inside_a_row_of_a_hybrid_is_said(caplog):
    model, ids = build_patched("gemma3_text", segment_length=8), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        _, cache = read(model, ids, mask=mask)
        assert "padding between the tokens of a row" not in caplog.text
        read(model, ids, mask=mask, cache=cache)
    assert "padding between the tokens of a row" in caplog.text


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_inside_a_row_of_a_hybrid_is_said_before_steps_of_fixed_shapes(padding, caplog):
    model, ids = build_patched("gemma3_text", segment_length=4), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = padding == "right"
    mask[0, 6:] = padding == "left"
    cache = prefill(model, ids, attention_mask=mask)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        StaticInfiniCache.from_cache(cache, model)
    # A token of the next step stands after what is right of the row's last one.
    assert ("padding between the tokens of a row" in caplog.text) == (padding == "right")


def test_a_cache_of_a_model_that_is_gone_is_refused():
    model = build_patched("llama", segment_length=8, overlap=2)
    cache = prefill(model, random_ids(1, 20))
    twin = copy.copy(cache)
    model = build_patched("llama", seed=1, segment_length=8, overlap=2)
    gc.collect()
    with pytest.raises(ValueError, match=r"filled by a model that is gone, .* cache.save_pretrained, while the first"):
        prefill(model, random_ids(1, 5), cache=cache)
    with pytest.raises(ValueError, match="a model that is gone"):
        StaticInfiniCache.from_cache(twin, model)
    # Emptied it belongs to nobody.
    cache.reset()
    assert prefill(model, random_ids(1, 5), cache=cache).seen == (5,)


@pytest.mark.parametrize("count", [21, 15])
def test_ids_that_the_cache_holds_already_are_not_read_again(llama, count):
    ids = random_ids(1, 21)
    cache = prefill(llama, ids)
    with pytest.raises(ValueError, match=f"holds 21 columns and the call has {count}: .* one id more; infini"):
        llama.generate(ids[:, :count], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.seen == (21,)
    # The ways out: one id more, or the new ones alone.
    more = torch.cat([ids, random_ids(1, 1, seed=2)], dim=1)
    expected = llama.generate(more, max_new_tokens=6, do_sample=False)
    found = llama.generate(more, past_key_values=copy.copy(cache), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    found = generate(llama, more[:, -1:], cache=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(found[:, 1:], expected[:, 22:])


def test_layers_that_stay_global_make_padding_inside_a_row_no_matter(caplog):
    model, ids = build_patched("llama", segment_length=8, layers=[1]), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    rest = random_ids(2, 5, seed=3)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        _, cache = read(model, ids, mask=mask)
        found, _ = read(model, rest, cache=cache)
    assert "padding between the tokens of a row" not in caplog.text
    alone = read_whole(model, torch.cat([ids[1:, :12], rest[1:]], dim=1))
    assert relative_error(found[1:], alone[:, 12:]) <= 1e-5


def test_a_model_without_a_head_reads_and_says_why_it_does_not_write(tmp_path):
    stock = build("llama")
    model = patch_model(type(stock.model)(stock.config), InfiniConfig(segment_length=8)).eval()
    ids = random_ids(1, 20)
    assert prefill(model, ids).seen == (20,)
    for function in (generate, score):
        with pytest.raises(TypeError, match="a LlamaModel predicts no tokens: load the checkpoint as a causal"):
            function(model, ids)
    # Its gates have their own names in a folder, and find their places all the same.
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.memory_gate.bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path)
    for own, other in zip(model.layers, loaded.model.layers, strict=True):
        assert torch.equal(own.self_attn.memory_gate.bias, other.self_attn.memory_gate.bias)


def test_a_decoder_that_was_patched_alone_is_unpatched_from_outside_too():
    model = build("llama")
    expected = read_whole_stock(model)
    patch_model(model.model, InfiniConfig(segment_length=8))
    with pytest.raises(ValueError, match="patched already: call unpatch_model"):
        patch_model(model)
    unpatch_model(model)
    assert not is_patched(model)
    assert "infini_attention" not in vars(model.model.config)
    assert torch.equal(read_whole_stock(model), expected)
    assert is_patched(patch_model(model))


def read_whole_stock(model):
    with torch.no_grad():
        return model(random_ids(1, 20)).logits


def test_an_error_inside_a_context_is_the_one_that_comes_out():
    model = build("llama")
    context = patched(model)
    context.__enter__()
    unpatch_model(model)
    # What the context does with an error of the user.
    assert not context.__exit__(RuntimeError, RuntimeError("of the user"), None)
    assert not is_patched(model)
