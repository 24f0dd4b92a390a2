"""A patch changes the instance it is given, all of what it should, and nothing when it is taken off again."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models import FAMILIES, HYBRID, build, build_patched, gate_parameters, open_gates, random_ids, relative_error
from peft import LoraConfig, get_peft_model
from reading import assert_close, read, read_whole
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from infini_hf import InfiniCache, InfiniConfig, is_patched, patch_model, patched, unpatch_model
from infini_hf.attention import InfiniAttention

SEGMENT = 8
CONFIG = InfiniConfig(segment_length=SEGMENT, overlap=3, sink_tokens=1)


def description(model):
    """Everything about a model that a patch may touch, as plain values."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [
                len(vars(module)[kind]) for kind in sorted(vars(module)) if kind.endswith(("_hooks", "_with_kwargs"))
            ]
            for name, module in model.named_modules()
        },
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    }


def assert_same_model(before, after):
    state, other = before.pop("state"), after.pop("state")
    assert before == after
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


# Undo.


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_restores_the_model_exactly(family):
    model, ids = build(family), random_ids(2, 30)
    before, logits = description(model), read_whole(model, ids)
    open_gates(patch_model(model, CONFIG))
    assert not torch.equal(read_whole(model, ids), logits)
    assert unpatch_model(model) is model
    assert_same_model(before, description(model))
    assert not model.get_decoder()._forward_pre_hooks
    assert torch.equal(read_whole(model, ids), logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False),
        build(family).generate(ids, max_new_tokens=12, do_sample=False),
    )


def test_hooks_of_others_stay():
    model, calls = build(), []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    unpatch_model(patch_model(model, CONFIG))
    read_whole(model, random_ids(1, 5))
    assert (len(model.model._forward_pre_hooks), len(calls)) == (1, 1)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_context_undoes_the_patch_whatever_happens(error):
    model = build()
    before = description(model)
    if error is None:
        with patched(model, CONFIG) as inside:
            assert inside is model
            assert is_patched(model)
    else:
        with pytest.raises(error), patched(model, CONFIG):
            raise error
    assert not is_patched(model)
    assert_same_model(before, description(model))


def test_a_model_can_be_patched_again_with_other_options():
    model, ids = build(), random_ids(2, 30)
    first = read_whole(open_gates(patch_model(model, CONFIG)), ids)
    unpatch_model(model)
    other = InfiniConfig(segment_length=5, memory_update="delta")
    second = read_whole(open_gates(patch_model(model, other)), ids)
    assert torch.equal(second, read_whole(open_gates(patch_model(build(), other)), ids))
    unpatch_model(model)
    assert torch.equal(read_whole(open_gates(patch_model(model, CONFIG)), ids), first)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refused_patch_leaves_the_model_as_it_was(family):
    model = build(family)
    before = description(model)
    with pytest.raises(ValueError, match="layers"):
        patch_model(model, InfiniConfig(layers=[99]))
    assert_same_model(before, description(model))


class Packed(torch.nn.Module):
    """A projection whose weights are buffers of another name, as those of some quantised layers are."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("qweight", layer.weight.detach().clone())

    def forward(self, states):
        return states @ self.qweight.T


def test_a_model_of_packed_weights_reads_and_is_kept(tmp_path):
    packed, plain, ids = build(), build(), random_ids(2, 30)
    for layer in packed.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    for model in (packed, plain):
        open_gates(patch_model(model, CONFIG))
    assert relative_error(read_whole(packed, ids), read_whole(plain, ids)) <= 1e-5
    _, cache = read(packed, ids)
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model=packed)
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(ours.memory, theirs.memory)


def test_a_patch_refused_at_a_later_layer_leaves_the_model_as_it_was():
    class Wrapped(LlamaAttention):
        pass

    model = build()
    model.model.layers[1].self_attn.__class__ = Wrapped
    before = description(model)
    with pytest.raises(NotImplementedError, match="Wrapped"):
        patch_model(model, CONFIG)
    assert_same_model(before, description(model))
    assert not is_patched(model)


# Nothing else is touched.


def test_other_models_and_the_classes_of_transformers_stay_stock():
    other, ids = build(), random_ids(2, 30)
    before, logits = description(other), read_whole(other, ids)
    attributes = {cls: dict(vars(cls)) for cls in (LlamaForCausalLM, LlamaAttention)}
    build_patched(segment_length=SEGMENT)
    assert_same_model(before, description(other))
    assert torch.equal(read_whole(other, ids), logits)
    assert {cls: dict(vars(cls)) for cls in attributes} == attributes
    assert not is_patched(other)


def twins(first, second):
    """Two models with equal weights, made from one config object and patched differently."""
    config = build().config
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, options in zip(models, (first, second), strict=True):
        open_gates(patch_model(model, InfiniConfig(**options)))
    return models


def test_models_made_from_one_config_keep_their_own_options():
    ids = random_ids(2, 30)
    model, _ = twins({"segment_length": 4}, {"segment_length": 16})
    alone = LlamaForCausalLM(build().config).eval()
    alone.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "memory_gate" not in name})
    expected = read_whole(open_gates(patch_model(alone, InfiniConfig(segment_length=4))), ids)
    assert torch.equal(read_whole(model, ids), expected)


def test_unpatching_one_of_two_models_made_from_one_config_leaves_the_other_patched():
    ids = random_ids(2, 30)
    first, second = twins({"segment_length": 8}, {"segment_length": 8})
    expected = read_whole(second, ids)
    unpatch_model(first)
    assert is_patched(second)
    assert torch.equal(read_whole(second, ids), expected)


@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_a_deep_copy_is_patched_and_independent(family):
    model, ids = build_patched(family, segment_length=SEGMENT, overlap=2), random_ids(2, 30)
    logits = read_whole(model, ids)
    twin = copy.deepcopy(model)
    assert is_patched(twin)
    assert torch.equal(read_whole(twin, ids), logits)
    assert torch.equal(read(twin, ids, [9, 21])[0], read(model, ids, [9, 21])[0])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert twin._prepare_cache_for_generation.args[0] is twin
    open_gates(twin, seed=7)
    assert not torch.equal(read_whole(twin, ids), logits)
    unpatch_model(twin)
    assert is_patched(model)
    assert torch.equal(read_whole(model, ids), logits)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


# What the patch leaves behind.


def test_is_patched_sees_through_wrappers():
    model = build_patched(segment_length=SEGMENT)
    assert is_patched(model)
    assert is_patched(torch.nn.ModuleList([model]))
    assert is_patched(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert not is_patched(build())
    assert not is_patched(torch.nn.Linear(2, 2))
    assert not is_patched(None)
    # The config of a patched checkpoint on a stock model is not a patch.
    stock = build()
    stock.config.infini_attention = CONFIG.to_dict()
    assert not is_patched(stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "layers"), [("llama", [0, 1]), ("gemma2", [1, 3]), ("gemma3_text", [2, 3])])
def test_the_state_dict_holds_a_float32_gate_for_each_patched_layer(family, layers, dtype):
    model = build(family).to(dtype)
    before = set(model.state_dict())
    patch_model(model, CONFIG)
    gates = [f"model.layers.{index}.self_attn.memory_gate.bias" for index in layers]
    assert set(model.state_dict()) - before == set(gates)
    for name in gates:
        gate = model.state_dict()[name]
        assert (gate.dtype, gate.shape) == (torch.float32, (6,))
        assert not gate.any()
    assert list(gate_parameters(model)) == gates
    assert model.config.infini_attention == CONFIG.to_dict()
    assert type(model) is type(build(family))


def test_only_the_named_layers_are_patched():
    model = build_patched(segment_length=SEGMENT, layers=[1])
    assert [isinstance(layer.self_attn, InfiniAttention) for layer in model.model.layers] == [False, True]
    assert list(gate_parameters(model)) == ["model.layers.1.self_attn.memory_gate.bias"]


# Refusals.


def test_a_patched_model_is_not_patched_twice():
    model = build_patched(segment_length=SEGMENT)
    with pytest.raises(ValueError, match="unpatch_model"):
        patch_model(model, CONFIG)
    assert len(model.model._forward_pre_hooks) == 1


def test_unpatching_a_stock_model_is_refused():
    for model in (build(), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="not patched"):
            unpatch_model(model)


def gpt2():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=9))


def t5():
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **shape))


@pytest.mark.parametrize("make", [gpt2, t5])
def test_unsupported_models_are_refused_with_the_list_of_supported_ones(make):
    with pytest.raises(NotImplementedError, match=r"llama.*mistral.*qwen2.*qwen3.*gemma.*gemma2.*gemma3_text"):
        patch_model(make(), CONFIG)


def test_objects_of_another_kind_are_refused():
    for model in ("llama", torch.nn.Linear(2, 2), get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(TypeError, match=type(model).__name__):
            patch_model(model, CONFIG)
    with pytest.raises(TypeError, match="InfiniConfig"):
        patch_model(build(), {"segment_length": 8})


def test_layers_that_cannot_be_patched_are_refused():
    with pytest.raises(ValueError, match="the model has 2 layers, so 2 is not one"):
        patch_model(build(), InfiniConfig(layers=[0, 2]))
    with pytest.raises(ValueError, match=r"layer 0 has a sliding window.*\[1, 3\]"):
        patch_model(build("gemma2"), InfiniConfig(layers=[0, 1]))
    with pytest.raises(ValueError, match="sliding_window=None"):
        patch_model(build("mistral", sliding_window=6), CONFIG)


def test_a_patched_layer_called_around_the_decoder_is_refused():
    model = build_patched(segment_length=SEGMENT)
    with pytest.raises(RuntimeError, match="segment plan"):
        model.model.layers[0].self_attn(torch.randn(1, 3, 48))


def test_a_window_longer_than_the_trained_positions_is_warned_of(caplog):
    build_patched(segment_length=250, overlap=6)
    assert not caplog.records
    build_patched(segment_length=250, overlap=7)
    assert "257 tokens" in caplog.text


# accelerate, checkpointing, PEFT.


class CountingHook(AlignDevicesHook):
    """A hook as a multi-device `device_map` puts on every module, counting its calls."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return super().pre_forward(module, *args, **kwargs)


def hook_attention(model):
    hooks = []
    for layer in model.model.layers:
        hooks.append(CountingHook(execution_device="cpu", io_same_device=True))
        add_hook_to_module(layer.self_attn, hooks[-1])
    return hooks


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_and_the_patch_work_together(family, hooked_first):
    ids = random_ids(2, 30)
    expected = read_whole(open_gates(patch_model(build(family), CONFIG)), ids)
    model = build(family)
    stock = read_whole(model, ids)
    if hooked_first:
        hooks = hook_attention(model)
        patch_model(model, CONFIG)
    else:
        patch_model(model, CONFIG)
        hooks = hook_attention(model)
    open_gates(model)
    assert torch.equal(read_whole(model, ids), expected)
    assert all(hook.calls == 1 for hook in hooks)
    unpatch_model(model)
    assert torch.equal(read_whole(model, ids), stock)
    assert all(hook.calls == 2 for hook in hooks)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(read_whole(model, ids), stock)


@pytest.mark.parametrize("patched_first", [True, False])
def test_weights_offloaded_to_the_cpu_give_the_same_logits(patched_first):
    ids = random_ids(2, 30)
    expected = read_whole(open_gates(patch_model(build(), CONFIG)), ids)
    model = build()
    if patched_first:
        cpu_offload(open_gates(patch_model(model, CONFIG)), execution_device=torch.device("cpu"))
    else:
        open_gates(patch_model(cpu_offload(model, execution_device=torch.device("cpu")), CONFIG))
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert_close(read_whole(model, ids), expected, 1e-6, "logits")
    assert_close(read(model, ids, [9, 21])[0], expected, 1e-5, "logits of chunks")


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_dispatched_model_gives_the_same_logits(patched_first):
    ids = random_ids(2, 30)
    expected = read_whole(open_gates(patch_model(build(), CONFIG)), ids)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = build()
    if patched_first:
        dispatch_model(open_gates(patch_model(model, CONFIG)), places, force_hooks=True)
    else:
        open_gates(patch_model(dispatch_model(model, places, force_hooks=True), CONFIG))
    assert "_hf_hook" in vars(model.model.layers[0].self_attn)
    assert torch.equal(read_whole(model, ids), expected)


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(family, rule):
    model = build_patched(family, segment_length=SEGMENT, memory_update=rule, overlap=3).train()
    ids, results = random_ids(2, 30), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=True)
        loss = output.loss
        # Layers under checkpointing drop a cache; handing an empty one back would look like a memory.
        assert (output.past_key_values is None) == checkpointing
        loss.backward()
        results.append((loss.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}))
    assert_close(results[1][0], results[0][0], 1e-6, "loss")
    for name, gradient in results[1][1].items():
        assert bool(gradient.any()), name
        assert_close(gradient, results[0][1][name], 1e-5, name)


def test_unpatching_a_model_inside_peft_leaves_the_adapter():
    model, ids = build(), random_ids(2, 30)
    peft_model = get_peft_model(
        patch_model(model, CONFIG), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    open_gates(peft_model)
    unpatch_model(peft_model)
    assert not is_patched(peft_model)
    with torch.no_grad(), peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, read_whole(build(), ids))
    with torch.no_grad():
        assert not torch.equal(peft_model(ids).logits, read_whole(build(), ids))
