"""Centered queries and keys: what is subtracted, what that is equal to, and that it travels with the gates."""

import copy

import pytest
import torch
from models import build, build_patched, random_ids, relative_error
from peft import get_peft_model

from infini_hf import AutoInfiniModelForCausalLM, InfiniCache, InfiniConfig, patch_model, prefill, unpatch_model
from infini_hf.attention import InfiniAttention
from infini_hf.calibration import calibrate_memory
from infini_hf.lora import load_adapter, lora_config

OPTIONS = {"segment_length": 8, "feature_map": "exp", "overlap": 2}


def patched_layers(model):
    return [module for module in model.modules() if isinstance(module, InfiniAttention)]


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_shifts_are_the_means_of_what_is_projected(family):
    model, ids = build_patched(family, **OPTIONS), random_ids(2, 40)
    before = logits_of(model, ids)
    met = {}

    def note(module, args, kwargs):
        met.setdefault(module, kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in patched_layers(model)]
    assert calibrate_memory(model, ids) is model
    for handle in handles:
        handle.remove()
    for layer in patched_layers(model):
        with torch.no_grad():
            queries, keys, _ = layer.project(met[layer])
        torch.testing.assert_close(layer.memory_gate.query_shift, queries.mean((0, 2)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.memory_gate.key_shift, keys.mean((0, 2)), rtol=1e-5, atol=1e-6)
        assert "project" not in vars(layer)
    after = logits_of(model, ids)
    assert torch.equal(after[:, :8], before[:, :8])
    assert relative_error(after, before) > 1e-3


def test_shifting_keys_is_shifting_queries():
    """exp(q) · exp(k - s) = exp(q - s) · exp(k): two paths to the same number, while no key meets its bound."""
    model, ids = build_patched("llama", overrides={"initializer_range": 0.15}, **OPTIONS), random_ids(2, 40)
    other, plain = copy.deepcopy(model), logits_of(model, ids)
    for mine, theirs in zip(patched_layers(model), patched_layers(other), strict=True):
        shift = torch.randn(3, 8)
        mine.memory_gate.set_shifts(torch.zeros(6, 8), shift)
        theirs.memory_gate.set_shifts(shift.repeat_interleave(2, dim=0), torch.zeros(3, 8))
    assert relative_error(logits_of(model, ids), logits_of(other, ids)) < 1e-5
    assert relative_error(logits_of(model, ids), plain) > 1e-3


def test_chunks_and_gradients_go_through_the_shifts():
    model, ids = calibrate_memory(build_patched("llama", **OPTIONS), random_ids(1, 64)), random_ids(2, 43, seed=1)
    cache, parts = InfiniCache(model.config), []
    with torch.no_grad():
        for chunk in ids.split(5, dim=1):
            parts.append(model(chunk, past_key_values=cache).logits)
    assert relative_error(torch.cat(parts, dim=1), logits_of(model, ids)) < 1e-5
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    names = {name for name, _ in model.named_parameters()}
    assert not any("shift" in name for name in names)
    assert all(layer.memory_gate.bias.grad.abs().max() > 0 for layer in patched_layers(model))


def test_the_shifts_are_saved_and_loaded_with_the_gates(tmp_path):
    model, ids = calibrate_memory(build_patched("llama", **OPTIONS), random_ids(1, 64)), random_ids(2, 40, seed=1)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    cache = prefill(model, ids)
    cache.save_pretrained(tmp_path / "memory")
    InfiniCache.from_pretrained(tmp_path / "memory", model=loaded)
    plain = patch_model(build("llama"), InfiniConfig(**OPTIONS))
    with pytest.raises(ValueError, match="other weights, gates or adapters"):
        InfiniCache.from_pretrained(tmp_path / "memory", model=plain)
    assert not any("memory_gate" in key for key in unpatch_model(model).state_dict())


def test_an_adapter_brings_the_shifts_along(tmp_path):
    model, ids = calibrate_memory(build_patched("llama", **OPTIONS), random_ids(1, 64)), random_ids(2, 40, seed=1)
    adapted = get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"])).eval()
    expected = logits_of(adapted, ids)
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(build("llama"), tmp_path).eval()
    assert torch.equal(logits_of(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    assert relative_error(logits_of(merged, ids), expected) < 1e-5
    assert patched_layers(merged)[0].memory_gate.key_shift is not None


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ValueError, match="feature_map='elu'"):
        calibrate_memory(build_patched("llama", segment_length=8), random_ids(1, 20))
    with pytest.raises(ValueError, match="hold no token"):
        calibrate_memory(build_patched("llama", **OPTIONS), random_ids(1, 0))
    with pytest.raises(ValueError, match="not patched"):
        calibrate_memory(build("llama"), random_ids(1, 20))
