"""Loading: a vanilla or a patched checkpoint gives the model it should, with every gate where it was."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from models import build, gate_parameters, open_gates
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infini_hf import AutoInfiniModelForCausalLM, InfiniConfig, is_patched, patch_model
from infini_hf.calibration import calibrate_memory

PATCH = InfiniConfig(segment_length=16, overlap=3, sink_tokens=1)


def gates(model):
    return [tensor for name, tensor in model.state_dict().items() if name.endswith("memory_gate.bias")]


@pytest.fixture
def ids():
    return torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(0))


def test_vanilla_checkpoint_gets_gates_at_exactly_zero(tmp_path, ids):
    base = build("llama")
    base.save_pretrained(tmp_path)
    model = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=PATCH)
    assert is_patched(model)
    assert len(gates(model)) == base.config.num_hidden_layers
    assert all(torch.equal(gate, torch.zeros_like(gate)) for gate in gates(model))
    torch.testing.assert_close(model(ids[:, :16]).logits, base(ids[:, :16]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_patched_checkpoint_comes_back_with_its_options_and_gates(tmp_path, ids, family, shard):
    saved = patch_model(build(family), PATCH)
    open_gates(saved, seed=1)
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.infini_attention == saved.config.infini_attention
    assert all(torch.equal(a, b) for a, b in zip(gates(loaded), gates(saved), strict=True))
    assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)


@pytest.mark.parametrize("last", ["5GB", "20KB"])
def test_of_two_checkpoints_in_a_folder_gates_and_weights_are_of_the_same(tmp_path, ids, last):
    """An index is left where shards were saved over; transformers prefers the single file."""
    whole, shards = (patch_model(build("llama"), PATCH) for _ in range(2))
    for seed, model in enumerate((whole, shards)):
        open_gates(model, seed=seed)
    order = [(shards, "20KB"), (whole, "5GB")]
    for model, size in order if last == "5GB" else order[::-1]:
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert all(torch.equal(a, b) for a, b in zip(gates(loaded), gates(whole), strict=True))
    assert torch.equal(loaded(ids).logits, whole.eval()(ids).logits)


def test_gates_stay_float32_in_a_half_precision_model(tmp_path):
    saved = patch_model(build("llama"), PATCH)
    open_gates(saved, seed=1)
    saved.save_pretrained(tmp_path)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert all(gate.dtype == torch.float32 for gate in gates(loaded))
    assert all(torch.equal(a, b) for a, b in zip(gates(loaded), gates(saved), strict=True))


def test_a_config_may_be_named_by_its_folder(tmp_path, ids):
    saved = open_gates(patch_model(build("llama"), PATCH), seed=1)
    saved.save_pretrained(tmp_path / "model")
    # With the patch, which decides here, and other words on what the base does.
    saved.config.bos_token_id = 5
    saved.config.save_pretrained(tmp_path / "config")
    for folder in (tmp_path / "config", str(tmp_path / "config")):
        loaded = AutoInfiniModelForCausalLM.from_pretrained(
            tmp_path / "model", config=folder, attn_implementation="eager"
        ).eval()
        assert loaded.config.bos_token_id == 5
        assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)


def test_device_map_with_offload_gives_the_same_logits(tmp_path, ids):
    whole = patch_model(build("llama"), PATCH)
    open_gates(whole, seed=1)
    whole.save_pretrained(tmp_path / "saved")
    on_cpu = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    offloaded = AutoInfiniModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map={**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
        attn_implementation="eager",
    ).eval()
    assert offloaded.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(offloaded(ids).logits, whole(ids).logits)


def test_stock_loading_of_a_patched_checkpoint_gives_the_base_model(tmp_path, ids):
    base = build("llama").eval()
    expected = base(ids).logits
    open_gates(patch_model(base, PATCH), seed=1)
    base.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert not is_patched(stock)
    assert torch.equal(stock(ids).logits, expected)


def test_patching_a_stock_loaded_patched_checkpoint_says_that_its_gates_are_gone(tmp_path, caplog):
    patch_model(build("llama"), PATCH).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        patch_model(stock, PATCH)
    assert "its gates were dropped" in caplog.text


def test_loading_prints_no_report_of_gates_and_no_other_warning(tmp_path, caplog):
    patch_model(build("llama"), PATCH).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path)
    assert caplog.text == ""


def test_other_options_than_the_checkpoints_are_used_and_said(tmp_path, caplog):
    patch_model(build("llama"), PATCH).save_pretrained(tmp_path)
    other = InfiniConfig(segment_length=8)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        model = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=other)
    assert "segment_length=16" in caplog.text
    assert "segment_length=8" in caplog.text
    assert model.config.infini_attention["segment_length"] == 8


def test_one_info_line_says_what_was_patched(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="infini_hf"):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=PATCH)
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1
    assert "segments of 16 tokens" in lines[0]


def test_layers_without_a_gate_in_the_checkpoint_are_refused(tmp_path):
    patch_model(build("llama"), InfiniConfig(segment_length=16, layers=[0])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.memory_gate\.bias.*no gate for"):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=InfiniConfig(segment_length=16, layers=[1]))


def saved_without(folder, *parts):
    """A patched checkpoint whose weights have lost every tensor with one of these texts in its name."""
    model = open_gates(patch_model(build("llama"), replace(PATCH, feature_map="exp")), seed=1)
    calibrate_memory(model, torch.arange(48)[None])
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["1.self_attn.memory_gate", "memory_gate", "0.self_attn.memory_gate.key_shift"])
def test_a_patched_checkpoint_that_lost_something_of_its_gates_is_refused(tmp_path, part):
    saved_without(tmp_path, part)
    with pytest.raises(ValueError, match=rf"weights lack .*{re.escape(part)}.*shut"):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path)


def test_fresh_gates_for_a_patched_checkpoint_without_any_have_to_be_asked_for(tmp_path, caplog):
    saved_without(tmp_path, "memory_gate")
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        model = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=PATCH)
    assert "hold no gate" in caplog.text
    assert all(torch.equal(bias, torch.zeros_like(bias)) for bias in gate_parameters(model).values())


def test_layers_beyond_those_of_the_checkpoint_get_fresh_gates(tmp_path):
    trained = open_gates(patch_model(build("llama"), InfiniConfig(segment_length=16, layers=[0])), seed=1)
    trained.save_pretrained(tmp_path)
    model = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config=PATCH)
    first, second = gate_parameters(model).values()
    assert torch.equal(first, next(iter(gate_parameters(trained).values())))
    assert torch.equal(second, torch.zeros_like(second))


def test_wrong_kinds_are_refused(tmp_path):
    with pytest.raises(TypeError, match="InfiniConfig"):
        AutoInfiniModelForCausalLM.from_pretrained(tmp_path, infini_config={"segment_length": 16})
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoInfiniModelForCausalLM()
