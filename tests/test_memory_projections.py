"""The memory's own projections: nothing at first, a known number after, and part of everything that a gate is."""

import copy

import pytest
import torch
from models import add_moved_projections, build, build_patched, random_ids, relative_error
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from training import make_trainer, tiny_model

import infini_hf
from infini_hf import AutoInfiniModelForCausalLM, InfiniCache, InfiniConfig, patch_model, prefill, unpatch_model
from infini_hf.attention import InfiniAttention
from infini_hf.calibration import add_memory_projections, calibrate_memory, renew_memory_projections
from infini_hf.cli.memory_arguments import MemoryArguments
from infini_hf.gate import HeadProjection, of_all_heads
from infini_hf.lora import load_adapter, lora_config
from infini_hf.projections import watched

OPTIONS = {"segment_length": 8, "feature_map": "exp", "overlap": 2}


def gates_of(model):
    return [module.memory_gate for module in model.modules() if isinstance(module, InfiniAttention)]


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


def projected(family="llama", mix_heads=False, **options):
    """A calibrated model whose projections have been moved far from where they begin."""
    model = calibrate_memory(build_patched(family, **{**OPTIONS, **options}), random_ids(1, 64))
    return add_moved_projections(model, 0.3, seed=9, mix_heads=mix_heads)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", ["elu", "exp", "softmax"])
@pytest.mark.parametrize("mix_heads", [False, True])
def test_untrained_projections_change_nothing(family, kind, mix_heads):
    model, ids = build_patched(family, **{**OPTIONS, "feature_map": kind}), random_ids(2, 40)
    if kind != "elu":
        calibrate_memory(model, random_ids(1, 64))
    before = logits_of(model, ids)
    assert add_memory_projections(model, mix_heads=mix_heads) is model
    assert torch.equal(logits_of(model, ids), before)
    first = gates_of(model)[0].query_projection
    assert gates_of(add_memory_projections(model))[0].query_projection is first
    assert gates_of(model)[0].query_shift is None


def test_mixed_heads_are_a_sum_over_all_of_them():
    """Head by head: what each gives to each of the others is a product of its own."""
    states, weight = torch.randn(2, 3, 5, 4), torch.randn(3, 13, 4)
    parts = weight[:, :-1].unflatten(1, (3, 4))
    expected = torch.stack([sum(states[:, g] @ parts[h, g] for g in range(3)) + weight[h, -1] for h in range(3)], 1)
    torch.testing.assert_close(HeadProjection(weight)(states), expected, rtol=1e-5, atol=1e-5)
    # Those of the first kind are those of the second whose heads read their own alone.
    own = torch.randn(3, 5, 4)
    torch.testing.assert_close(HeadProjection(of_all_heads(own))(states), HeadProjection(own)(states))


def test_some_layers_alone_get_them():
    model, ids = build_patched("llama", **OPTIONS), random_ids(2, 40)
    add_memory_projections(model, layers=[1], mix_heads=True)
    assert [gate.query_projection is not None for gate in gates_of(model)] == [False, True]
    before = logits_of(model, ids)
    gates_of(model)[1].key_projection.weight.data += 0.1 * torch.randn(gates_of(model)[1].key_projection.weight.shape)
    assert relative_error(logits_of(model, ids), before) > 1e-3
    with pytest.raises(ValueError, match=r"layers=\[\]: none are not among"):
        add_memory_projections(model, layers=[])
    with pytest.raises(ValueError, match=r"layers=\[1, 7\]: \[7\] are not among the patched \[0, 1\]"):
        add_memory_projections(model, layers=[1, 7])


def test_features_may_change_places():
    """A permutation of the channels of queries and keys alike permutes the terms of every sum over them."""
    model, ids = projected(), random_ids(2, 43)
    before = logits_of(model, ids)
    for gate in gates_of(model):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        for projection in (gate.query_projection, gate.key_projection):
            projection.weight.data = projection.weight.data[:, :, order]
    assert relative_error(logits_of(model, ids), before) < 1e-5
    gates_of(model)[1].key_projection.weight.data = gates_of(model)[1].key_projection.weight.data[:, :, order]
    assert relative_error(logits_of(model, ids), before) > 1e-3


def test_keys_are_written_and_queries_asked_through_them():
    """Projecting the keys by W is the same as asking a model whose key weights are multiplied by W."""
    model, ids = build_patched("llama", **OPTIONS), random_ids(2, 43)
    add_memory_projections(model)
    twin = copy.deepcopy(model)
    ours, theirs = (model.model.layers[1].self_attn for model in (model, twin))
    key_weight, query_weight = (torch.eye(8) + 0.3 * torch.randn(8, 8) for _ in range(2))
    ours.memory_gate.key_projection.weight.data[:, :-1] = key_weight
    ours.memory_gate.query_projection.weight.data[:, :-1] = query_weight

    def project(hidden_states):
        queries, keys, values = type(theirs).project(theirs, hidden_states)
        met.append((queries, keys))
        return queries, keys, values

    # The twin's layer is asked with what the weights give, multiplied by hand.
    met, gate = [], theirs.memory_gate
    theirs.project = project
    gate.center_keys = lambda keys: keys @ key_weight
    gate.center_queries = lambda queries: queries @ query_weight
    assert relative_error(logits_of(model, ids), logits_of(twin, ids)) < 1e-5
    assert met


@pytest.mark.parametrize("mix_heads", [False, True])
def test_chunks_and_static_decoding_go_through_them(mix_heads):
    model, ids = projected(mix_heads=mix_heads), random_ids(2, 43, seed=1)
    cache, parts = InfiniCache(model.config), []
    with torch.no_grad():
        for chunk in ids.split(5, dim=1):
            parts.append(model(chunk, past_key_values=cache).logits)
    assert relative_error(torch.cat(parts, dim=1), logits_of(model, ids)) < 1e-5
    options = {"max_new_tokens": 20, "do_sample": False, "disable_compile": True}
    expected = infini_hf.generate(model, ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("mix_heads", [False, True])
def test_they_are_saved_loaded_and_taken_off_with_the_gates(tmp_path, mix_heads):
    model, ids = projected(mix_heads=mix_heads), random_ids(2, 40, seed=1)
    model.save_pretrained(tmp_path)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    low = AutoInfiniModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16")
    assert gates_of(low)[0].key_projection.weight.dtype == torch.float32
    assert not any("memory_gate" in key for key in unpatch_model(model).state_dict())
    assert torch.equal(logits_of(patch_model(model, InfiniConfig(**OPTIONS)), ids), logits_of(build_fresh(), ids))


def build_fresh():
    return patch_model(build("llama"), InfiniConfig(**OPTIONS))


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("mix_heads", [False, True])
def test_an_adapter_brings_them_along(tmp_path, mix_heads, kv_heads):
    shape = {"num_key_value_heads": kv_heads}
    model, ids = projected(mix_heads=mix_heads, overrides=shape), random_ids(2, 40, seed=1)
    adapted = get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"])).eval()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("query_projection" in name for name in trained)
    expected = logits_of(adapted, ids)
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(build("llama", **shape), tmp_path).eval()
    assert torch.equal(logits_of(loaded, ids), expected)
    assert relative_error(logits_of(loaded.merge_and_unload(), ids), expected) < 1e-5


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_a_base_stays_what_it_was_beside_an_adapter_with_projections(tmp_path, calibrated, refused):
    adapted = get_peft_model(projected(), lora_config(projected(), r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    base, ids = build_patched("llama", **OPTIONS), random_ids(2, 40, seed=1)
    if calibrated:
        calibrate_memory(base, random_ids(1, 64, seed=5))
    before, names = logits_of(base, ids), set(base.state_dict())
    if refused:
        weights = load_file(tmp_path / "adapter_model.safetensors")
        weights["base_model.model.model.layers.7.nothing.weight"] = torch.zeros(1)
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="no place for"):
            load_adapter(base, tmp_path)
        assert set(base.state_dict()) == names
        assert torch.equal(logits_of(base, ids), before)
        return
    loaded = load_adapter(base, tmp_path).eval()
    assert relative_error(logits_of(loaded, ids), before) > 1e-2
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded, ids), before)


def test_an_adapter_without_them_is_refused_by_a_base_that_has_them(tmp_path):
    plain = build_patched("llama", **OPTIONS)
    get_peft_model(plain, lora_config(plain, r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    base, ids = projected(), random_ids(2, 40, seed=1)
    before = logits_of(base, ids)
    with pytest.raises(ValueError, match=r"trained without \['model.layers.0.self_attn.memory_gate.query_projection"):
        load_adapter(base, tmp_path)
    assert torch.equal(logits_of(base, ids), before)
    assert not any("lora" in name for name in base.state_dict())


def test_calibration_comes_first():
    with pytest.raises(ValueError, match="calibrate first, then call add_memory_projections"):
        calibrate_memory(projected(), random_ids(1, 64))


def test_projections_are_computed_in_float32_under_autocast():
    gate, states = gates_of(projected())[0], torch.randn(1, 6, 5, 8)
    expected = gate.query_projection(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.query_projection(states), expected)


def test_a_memory_that_was_read_through_others_is_refused(tmp_path):
    model, other = projected(), projected()
    gates_of(other)[0].key_projection.weight.data += 0.1
    prefill(model, random_ids(1, 20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other weights, gates or adapters"):
        InfiniCache.from_pretrained(tmp_path, model=other)


def test_a_run_is_resumed_with_them_or_not_at_all(tmp_path):
    def trainer(projections=True, folder="run", mix_heads=False, **options):
        model = tiny_model(feature_map="exp")
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
        return make_trainer(
            tmp_path / folder,
            model=add_memory_projections(model, mix_heads=mix_heads) if projections else model,
            **options,
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    mixed = trainer(mix_heads=True)
    with pytest.raises(ValueError, match=r"\[6, 9, 8\]\), and the model in 4 places, as .*\[6, 49, 8\]"):
        mixed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    rested = trainer()
    rested.model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameters, as model\.embed_tokens\.weight, are trained in one"):
        rested.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"own in 4 places, as \('model.*and the model in no place"):
        trainer(projections=False).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_every_parameter_has_a_gradient_wherever_the_gate_is_reached():
    model = projected().train()
    for length in (5, 8, 24):
        model.zero_grad()
        ids = random_ids(1, length)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), length
        moved = gates_of(model)[0].key_projection.weight.grad.abs().max() > 0
        assert moved == (length > 8)


def test_the_trainer_gives_them_a_learning_rate_of_their_own(tmp_path):
    model = add_memory_projections(tiny_model(feature_map="exp"))
    rates = {"memory_gate_learning_rate": 0.5, "memory_projection_learning_rate": 0.25, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, model=model, learning_rate=0.125, **rates)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        expected = 0.5 if name.endswith("memory_gate.bias") else 0.25 if "_projection" in name else 0.125
        assert group["lr"] == expected, name
        assert group["weight_decay"] == (0.1 if expected == 0.125 and "norm" not in name else 0.0), name
    before = gates_of(model)[0].query_projection.weight.clone()
    trainer.train()
    assert not torch.equal(gates_of(model)[0].query_projection.weight, before)


def test_a_plain_model_has_no_memory_to_project():
    with pytest.raises(ValueError, match="not patched"):
        add_memory_projections(build("llama"))


@pytest.mark.parametrize("mix_heads", [False, True])
def test_projections_begin_anew_as_random_maps_of_standardised_states(mix_heads):
    model = build_patched("llama", segment_length=8, overlap=3, feature_map="softmax").eval()
    add_memory_projections(model, mix_heads=mix_heads)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids, found = random_ids(1, 400), {}
    torch.manual_seed(1)
    renew_memory_projections(model, [1], ids, spread=1.5)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    names = [f"model.layers.1.self_attn.memory_gate.{name}_projection.weight" for name in ("query", "key")]
    assert changed == set(names)

    def note(layer, queries, keys):
        gate = layer.memory_gate
        found.setdefault("query", []).append(gate.center_queries(queries)[0])
        found.setdefault("key", []).append(gate.center_keys(keys)[0])

    with watched([model.model.layers[1].self_attn], note):
        prefill(model, ids)
    for parts in found.values():
        mapped = torch.cat(parts, dim=1)
        torch.testing.assert_close(mapped.mean(1), torch.zeros_like(mapped[:, 0]), atol=1e-4, rtol=0)
        # Of random directions among correlated channels: about, not exactly.
        assert mapped.std(1).square().mean().sqrt().item() == pytest.approx(1.5, rel=0.4)
    torch.manual_seed(2)
    again = model.state_dict()[names[0]].clone()
    renew_memory_projections(model, [1], ids, spread=1.5)
    assert not torch.allclose(model.state_dict()[names[0]], again)


def test_layers_without_projections_cannot_begin_anew():
    model = add_memory_projections(build_patched("llama", segment_length=8), layers=[1])
    with pytest.raises(ValueError, match=r"layers=\[0, 1\]: the memory of \[0\] has no projections; .* of \[1\]"):
        renew_memory_projections(model, [0, 1], random_ids(1, 20))
    with pytest.raises(ValueError, match=r"renewed_layers=\[1\] with calibration_tokens=0"):
        MemoryArguments(calibration_tokens=0, renewed_layers=[1])
