"""LoRA: the gates train, save, load and merge with the adapter, whose folder says how to patch the base."""

import json
import shutil
import warnings

import pytest
import torch
from models import build, build_patched, random_ids
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from reading import assert_close, assert_same_state, read, read_whole
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GenerationConfig

from infini_hf import (
    AutoInfiniModelForCausalLM,
    InfiniCache,
    InfiniConfig,
    generate,
    is_patched,
    patch_model,
    prefill,
    score,
    unpatch_model,
)
from infini_hf.gate import MemoryGate
from infini_hf.lora import InfiniLoraConfig, load_adapter, lora_config
from infini_hf.lora_base import sample_base
from infini_hf.trainer import InfiniTrainer
from infini_hf.training_args import InfiniTrainingArguments

PATCH = {"segment_length": 8, "memory_update": "delta", "overlap": 2, "sink_tokens": 1}
FAMILIES = ("llama", "gemma2", "gemma3_text")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def adapt(model, seed=5, **options):
    """A PEFT model in evaluation mode whose LoRA weights and gates are all away from where they start."""
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    peft_model = get_peft_model(model, lora_config(model, **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in live_gates(peft_model):
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return peft_model


def adapted(family="llama", **options):
    return adapt(build_patched(family, **PATCH), **options)


def live_gates(peft_model):
    """The gate parameters that the adapter trains; PEFT keeps those of the base beside them."""
    return [bias for name, bias in peft_model.named_parameters() if "memory_gate.modules_to_save" in name]


def saved(tmp_path, model, name="adapter"):
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def plain_base(tmp_path, family="llama"):
    return saved(tmp_path, build(family), "base")


def loss_of(model, ids):
    return model(ids, labels=ids).loss


@pytest.fixture
def ids():
    """Two rows of five segments and a half."""
    return random_ids(2, 44)


@pytest.fixture
def folder(tmp_path):
    """The folder of an adapter of the `llama` base."""
    return saved(tmp_path, adapted())


# The configuration


def test_gates_are_added_once_to_what_the_caller_saves():
    model = build_patched(**PATCH)
    assert lora_config(model).modules_to_save == ["memory_gate"]
    assert lora_config(model, modules_to_save=["lm_head"]).modules_to_save == ["lm_head", "memory_gate"]
    assert lora_config(model, modules_to_save=["memory_gate", "lm_head"]).modules_to_save == ["memory_gate", "lm_head"]


def test_the_configuration_is_a_stock_one_for_causal_models_with_the_patch_written_in():
    model = build_patched(**PATCH)
    config = lora_config(model, r=3, lora_alpha=7)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.task_type) == (3, 7, "CAUSAL_LM")
    assert config.infini_attention == model.config.infini_attention
    assert lora_config(model, task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


def test_what_cannot_be_configured_is_refused():
    with pytest.raises(ValueError, match=r"not patched.*patch_model"):
        lora_config(build())
    with pytest.raises(TypeError, match="pass a patched model"):
        lora_config("llama")
    with pytest.raises(TypeError, match=r"modules_to_save='lm_head'.*\['lm_head'\]"):
        lora_config(build_patched(**PATCH), modules_to_save="lm_head")


@pytest.mark.parametrize("names", [["q_proj", "q_prj"], {"q_prj"}, ["self_attn.q_prj"]])
def test_a_layer_that_the_model_has_not_is_named_with_those_that_it_has(names):
    model = build_patched(**PATCH)
    with pytest.raises(ValueError, match=r"no layer called '[a-z._]*q_prj'; it has .*o_proj, q_proj, .*'all-linear'"):
        lora_config(model, r=2, target_modules=names)
    assert lora_config(model, target_modules=["self_attn.q_proj", "embed_tokens"]).r == 8
    with pytest.raises(ValueError, match=r"it has .*embed_tokens, gate_proj, .*o_proj, q_proj, up_proj, v_proj, and"):
        lora_config(adapt(model), target_modules=names)


def test_the_saved_configuration_comes_back_and_stock_peft_reads_it_too(folder):
    model = build_patched(**PATCH)
    assert json.loads((folder / CONFIG).read_text())["infini_attention"] == model.config.infini_attention
    ours = InfiniLoraConfig.from_pretrained(folder)
    assert ours.infini_attention == model.config.infini_attention
    assert (ours.r, ours.modules_to_save, ours.inference_mode) == (4, ["memory_gate"], True)
    with pytest.warns(UserWarning, match="infini_attention"):
        stock = LoraConfig.from_pretrained(folder)
    assert stock.to_dict().items() <= ours.to_dict().items()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_stock_peft_loads_the_folder_onto_a_patched_base(folder, ids):
    loaded = PeftModel.from_pretrained(build_patched(**PATCH), folder)
    assert torch.equal(read_whole(loaded, ids), read_whole(adapted(), ids))


# Training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_moves_and_nothing_else_does(family, ids):
    model = build_patched(family, **PATCH)
    # From the usual start, B at zero: A has no gradient before the second step.
    peft_model = get_peft_model(model, lora_config(model, r=4, target_modules="all-linear")).train()
    before = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        loss_of(peft_model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in peft_model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    patched_layers = len(InfiniCache(model.config).infini_layers)
    assert sum("memory_gate.modules_to_save" in name for name in moved) == patched_layers
    assert all("lora_" in name or "memory_gate.modules_to_save" in name for name in moved)


@pytest.mark.parametrize("read", [prefill, score, lambda *inputs: generate(*inputs, max_new_tokens=2)])
def test_virtual_tokens_are_refused_where_they_would_be_left_out(ids, read):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        read(get_peft_model(build_patched(segment_length=8), virtual), ids)


def test_the_gates_gradient_is_that_of_the_model_without_peft(ids):
    alone = build_patched(**PATCH)
    loss_of(alone, ids).backward()
    model = build_patched(**PATCH)
    peft_model = get_peft_model(model, lora_config(model))
    loss_of(peft_model, ids).backward()
    expected = [layer.self_attn.memory_gate.bias.grad for layer in alone.model.layers]
    for bias, gradient in zip(live_gates(peft_model), expected, strict=True):
        assert gradient.abs().max() > 1e-4
        assert torch.equal(bias.grad, gradient)


def sgd_step(model, ids):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_of(model, ids).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    model.zero_grad()


def test_training_goes_on_from_a_loaded_adapter(tmp_path, ids):
    straight = adapted()
    sgd_step(straight, ids)
    resumed = load_adapter(build(), saved(tmp_path, straight), is_trainable=True)
    before = read_whole(straight, ids)
    for model in (straight, resumed):
        sgd_step(model, ids)
    assert_close(read_whole(resumed, ids), read_whole(straight, ids), 1e-6)
    assert not torch.allclose(read_whole(resumed, ids), before, atol=1e-2)
    assert all(bias.requires_grad for bias in live_gates(resumed))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_of_the_trainer_is_an_adapter_that_loads(tmp_path, ids):
    model = adapted()
    args = InfiniTrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        plot_memory_gates=False,
    )
    start = [bias.detach().clone() for bias in live_gates(model)]
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 40).tolist()]
    InfiniTrainer(model=model, args=args, train_dataset=rows).train()
    assert all(not torch.equal(a, b) for a, b in zip(live_gates(model), start, strict=True))
    loaded = load_adapter(build(), tmp_path / "checkpoint-2")
    assert torch.equal(read_whole(loaded, ids), read_whole(model.eval(), ids))


# Loading


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("base", ["plain folder", "patched folder", "plain instance", "patched instance"])
def test_any_base_gets_the_adapter_with_its_gates(tmp_path, ids, family, base):
    expected = adapted(family)
    folder = saved(tmp_path, expected)
    kind, form = base.split()
    model = build(family) if kind == "plain" else build_patched(family, **PATCH)
    if form == "instance":
        loaded = load_adapter(model, folder)
        assert loaded.get_base_model() is model
    else:
        loaded = load_adapter(saved(tmp_path, model, "base"), str(folder), attn_implementation="eager")
    assert isinstance(loaded, PeftModel)
    assert is_patched(loaded)
    assert not any(module.training for module in loaded.modules())
    assert not any(
        parameter.requires_grad for parameter in loaded.parameters() if parameter in set(live_gates(loaded))
    )
    assert torch.equal(read_whole(loaded, ids), read_whole(expected, ids))


def test_loading_warns_of_nothing_and_saving_again_keeps_the_patch(tmp_path, folder, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_adapter(build(), folder)
    again = load_adapter(build(), saved(tmp_path, loaded, "again"))
    assert torch.equal(read_whole(again, ids), read_whole(loaded, ids))


def test_options_of_a_config_survive_the_folder(tmp_path, ids):
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "bias": "all", "modules_to_save": ["lm_head"]}
    expected = adapt(build_patched("qwen2", **PATCH), target_modules=["q_proj", "v_proj"], use_dora=True, **options)
    loaded = load_adapter(build("qwen2"), saved(tmp_path, expected))
    assert torch.equal(read_whole(loaded, ids), read_whole(expected, ids))


def test_an_adapter_on_the_hub_is_found_by_name(tmp_path, folder, ids):
    """The cache of a hub download, which is what is looked at offline."""
    repository = tmp_path / "cache" / "models--someone--adapter"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    base = plain_base(tmp_path)
    loaded = load_adapter(base, "someone/adapter", cache_dir=tmp_path / "cache", attn_implementation="eager")
    assert torch.equal(read_whole(loaded, ids), read_whole(adapted(), ids))
    with pytest.raises(ValueError, match="someone/other: no adapter can be read there"):
        load_adapter(build(), "someone/other", cache_dir=tmp_path / "cache")


def test_an_adapter_of_another_name_is_a_subfolder(tmp_path, ids):
    model = build_patched(**PATCH)
    expected = get_peft_model(model, lora_config(model, init_lora_weights=False), adapter_name="books").eval()
    loaded = load_adapter(build(), saved(tmp_path, expected), subfolder="books", adapter_name="novels")
    assert loaded.active_adapter == "novels"
    assert torch.equal(read_whole(loaded, ids), read_whole(expected, ids))


# Refusals


def rewrite(folder, drop=None, **config):
    """Take tensors whose name holds `drop` out of an adapter's file, and change its configuration."""
    if drop is not None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: tensor for name, tensor in tensors.items() if drop not in name}, folder / WEIGHTS)
    values = {**json.loads((folder / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def refused(message, folder, base=None, error=ValueError, **options):
    """Loading fails with `message`, and an instance is what it was."""
    base = build() if base is None else base
    patched_before, names = is_patched(base), list(base.state_dict())
    logits = read_whole(base, random_ids(1, 20))
    with pytest.raises(error, match=message):
        load_adapter(base, folder, **options)
    assert is_patched(base) == patched_before
    assert list(base.state_dict()) == names
    assert torch.equal(read_whole(base, random_ids(1, 20)), logits)


def test_a_stock_adapter_is_refused(tmp_path):
    stock = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    refused(r"no infini_attention.*lora_config\(model\)", saved(tmp_path, stock))


@pytest.mark.parametrize("drop", ["memory_gate", "layers.1.self_attn.memory_gate"])
def test_a_missing_gate_is_named(folder, drop):
    refused(r"holds no gate for \[.*'model\.layers\.1\.self_attn\.memory_gate\.bias'", rewrite(folder, drop))


def test_an_adapter_saved_without_gates_is_refused(folder):
    refused("holds no gate for", rewrite(folder, "memory_gate", modules_to_save=["lm_head"]))


def test_a_gate_that_would_be_dropped_is_named(folder):
    record = {**InfiniConfig(**PATCH).to_dict(), "layers": [0]}
    refused(r"no place for \['.*layers\.1\.self_attn\.memory_gate\.bias'\]", rewrite(folder, infini_attention=record))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_lora_weight_that_is_not_in_the_file_is_named(folder):
    refused(r"nothing in the file for \['.*1\.mlp\.up_proj\.lora_B", rewrite(folder, "1.mlp.up_proj.lora_B"))


def test_a_base_with_fewer_or_more_layers_is_refused(folder):
    refused(r"no place for .*layers\.1\.mlp", folder, build(num_hidden_layers=1))
    refused(r"holds no gate for \['model\.layers\.2\.", folder, build(num_hidden_layers=3))


@pytest.mark.filterwarnings("ignore:Some weights", "ignore:Found missing adapter keys")
def test_a_base_of_another_width_is_refused(folder):
    for wide in (build(intermediate_size=80), build_patched(overrides={"intermediate_size": 80}, **PATCH)):
        refused(r"another size in .*\(4, 64\) where \(4, 80\) goes", folder, wide)


def test_a_base_that_is_patched_differently_is_refused_with_both_patches(tmp_path, folder):
    other = build_patched(**{**PATCH, "segment_length": 16})
    both = r"trained under InfiniConfig\(segment_length=8.*patched with InfiniConfig\(segment_length=16.*unpatch_model"
    refused(both, folder, other)
    with pytest.raises(ValueError, match=both):
        load_adapter(saved(tmp_path, other, "base"), folder)


def merged_elsewhere(tmp_path):
    """The base with another adapter merged in, on two kinds of weights alone."""
    other = adapt(build_patched(**PATCH), seed=9, target_modules=["q_proj", "v_proj"])
    return saved(tmp_path, unpatch_model(other.merge_and_unload()), "merged")


@pytest.mark.parametrize("other", [lambda tmp_path: build(seed=1), merged_elsewhere])
def test_other_weights_than_those_that_it_was_trained_on_are_warned_of(other, tmp_path, folder, caplog):
    """They fit in shape, and nothing said that the adapter meant others."""
    load_adapter(other(tmp_path), folder)
    (said,) = caplog.messages
    assert "was trained on other weights than those of this base" in said
    assert str(folder) in said


def test_the_base_that_it_was_trained_on_is_named(tmp_path, folder, caplog):
    path = tmp_path / "named"
    shutil.copytree(folder, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/base"}))
    load_adapter(build(seed=1), path)
    assert "pass the base that it was trained on, someone/base" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_own_base_in_any_dtype_is_not_warned_of(dtype, tmp_path, folder, caplog):
    load_adapter(plain_base(tmp_path), folder, dtype=dtype)
    assert caplog.messages == []


def test_codes_of_a_quantized_base_are_no_weights(folder, caplog):
    """FP8 layers keep theirs in parameters like any other."""
    base = patch_model(build(seed=1), InfiniConfig(**PATCH))
    assert sample_base(base)
    for name, weight in list(base.get_decoder().named_parameters()):
        module = base.get_decoder().get_submodule(name.rpartition(".")[0])
        codes = torch.nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        setattr(module, name.rpartition(".")[2], codes)
    assert sample_base(base) == {}


def test_an_adapter_of_an_earlier_version_says_nothing_of_its_base(folder, caplog):
    load_adapter(build(seed=1), rewrite(folder, base_sample=None))
    assert caplog.messages == []


def test_a_folder_that_is_no_adapter_is_refused(tmp_path, folder):
    refused("no adapter can be read there", tmp_path / "nothing")
    refused("no adapter can be read there", plain_base(tmp_path))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-20])
    refused("weights are not there or cannot be read", folder)
    (folder / WEIGHTS).unlink()
    refused("weights are not there or cannot be read", folder)
    (folder / CONFIG).write_text("{")
    refused("no adapter can be read there", folder)


def test_wrong_kinds_are_refused(folder):
    refused(r"\['dtype'\] say how a base is loaded", folder, error=TypeError, dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"adapter_name='default': the model has an adapter of that name; give another"
    ):
        load_adapter(adapted(), folder)
    with pytest.raises(TypeError, match="base is a int"):
        load_adapter(3, folder)


# Reading


@pytest.fixture(params=["llama", "gemma3_text"])
def loaded(request, tmp_path):
    model = load_adapter(build(request.param), saved(tmp_path, adapted(request.param)))
    model.get_base_model().generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def test_an_adapter_reads_in_chunks_what_it_reads_whole(loaded, ids):
    whole = read_whole(loaded, ids)
    chunked, cache = read(loaded, ids, [3, 20, 1, 20])
    assert_close(chunked, whole)
    assert_same_state(prefill(loaded, ids, chunk_size=7, progress=False), cache)
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert_close(score(loaded, ids, chunk_size=7, progress=False), expected)


def test_an_adapter_generates_the_same_with_and_without_a_cache(loaded, ids):
    expected = loaded.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12, do_sample=False), expected)
    cache = prefill(loaded, ids[:, :30], progress=False)
    continued = generate(loaded, ids[:, 30:], cache=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(continued[:, 14:], expected[:, 44:])
    assert cache.seen == (56, 56)


def test_an_adapter_switched_off_is_the_base_with_its_own_gates(ids):
    model = adapted()
    expected = read_whole(build_patched(**PATCH), ids)
    with model.disable_adapter():
        assert torch.equal(read_whole(model, ids), expected)
    assert not torch.allclose(read_whole(model, ids), expected, atol=0.1)


def test_a_snapshot_belongs_to_the_adapter_that_read_the_text(tmp_path, folder, ids):
    loaded = load_adapter(build(), folder)
    prefill(loaded, ids[:, :30], progress=False).save_pretrained(tmp_path / "on")
    again = load_adapter(plain_base(tmp_path), folder, attn_implementation="eager")
    cache = InfiniCache.from_pretrained(tmp_path / "on", model=again)
    assert_close(read(again, ids[:, 30:], cache=cache)[0], read_whole(loaded, ids)[:, 30:])
    with loaded.disable_adapter():
        with pytest.raises(ValueError, match="adapters"):
            InfiniCache.from_pretrained(tmp_path / "on", model=loaded)
        prefill(loaded, ids, progress=False).save_pretrained(tmp_path / "off")
    with pytest.raises(ValueError, match="adapters"):
        InfiniCache.from_pretrained(tmp_path / "off", model=loaded)


def test_a_snapshot_knows_the_gates_of_the_adapter(tmp_path, folder, ids):
    loaded = load_adapter(build(), folder)
    prefill(loaded, ids, progress=False).save_pretrained(tmp_path / "memory")
    with torch.no_grad():
        live_gates(loaded)[0][0] += 0.5
    with pytest.raises(ValueError, match="gates"):
        InfiniCache.from_pretrained(tmp_path / "memory", model=loaded)


# Merging


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_a_patched_model_with_the_trained_gates(tmp_path, ids, family):
    expected = adapted(family)
    logits, gates = read_whole(expected, ids), [bias.detach().clone() for bias in live_gates(expected)]
    merged = load_adapter(build(family), saved(tmp_path, expected)).merge_and_unload()
    assert type(merged) is type(build(family))
    assert is_patched(merged)
    assert not any("lora_" in name or "modules_to_save" in name for name in merged.state_dict())
    modules = [module for module in merged.modules() if isinstance(module, MemoryGate)]
    assert all(torch.equal(gate.bias, bias) for gate, bias in zip(modules, gates, strict=True))
    assert_close(read_whole(merged, ids), logits)
    again = AutoInfiniModelForCausalLM.from_pretrained(saved(tmp_path, merged, "merged"), attn_implementation="eager")
    assert torch.equal(read_whole(again.eval(), ids), read_whole(merged, ids))


def test_a_merged_model_reads_generates_and_remembers(tmp_path, folder, ids):
    merged = load_adapter(build(), folder).merge_and_unload()
    merged.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    cache = prefill(merged, ids[:, :30], progress=False)
    cache.save_pretrained(tmp_path / "memory")
    cache = InfiniCache.from_pretrained(tmp_path / "memory", model=merged)
    continued = generate(merged, ids[:, 30:], cache=cache, max_new_tokens=12, do_sample=False)
    expected = merged.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(continued[:, 14:], expected[:, 44:])


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_unpatching_a_merged_model_leaves_the_merged_weights(folder, ids):
    merged = load_adapter(build(), folder).merge_and_unload()
    assert unpatch_model(merged) is merged
    assert type(merged.model.layers[0].self_attn) is type(build().model.layers[0].self_attn)
    # Stock PEFT drops the gates on a plain base without a word, which is the model wanted here.
    assert_close(read_whole(merged, ids), read_whole(PeftModel.from_pretrained(build(), folder), ids))


def gate_dtypes(model):
    return {parameter.dtype for name, parameter in model.named_parameters() if "memory_gate" in name}


@pytest.mark.parametrize("autocast", [True, False])
def test_gates_stay_float32_from_adapter_to_merged_checkpoint_of_a_bfloat16_base(tmp_path, ids, autocast):
    base = plain_base(tmp_path)
    options = {"dtype": "bfloat16", "attn_implementation": "eager"}
    model = AutoInfiniModelForCausalLM.from_pretrained(base, infini_config=InfiniConfig(**PATCH), **options)
    expected = adapt(model)
    assert gate_dtypes(expected) == {torch.float32}
    folder = saved(tmp_path, expected)
    stored = {name: tensor.dtype for name, tensor in load_file(folder / WEIGHTS).items() if "memory_gate" in name}
    assert set(stored.values()) == {torch.float32}
    loaded = load_adapter(base, folder, autocast_adapter_dtype=autocast, **options)
    assert loaded.dtype == torch.bfloat16
    assert gate_dtypes(loaded) == {torch.float32}
    if autocast:
        assert torch.equal(read_whole(loaded, ids), read_whole(expected, ids))
    merged = loaded.merge_and_unload()
    assert gate_dtypes(merged) == {torch.float32}
    again = AutoInfiniModelForCausalLM.from_pretrained(saved(tmp_path, merged, "merged"), **options).eval()
    assert (again.dtype, gate_dtypes(again)) == (torch.bfloat16, {torch.float32})
    assert torch.equal(read_whole(again, ids), read_whole(merged, ids))


# Quantized bases


def freeze_as_for_quantized_training(model):
    """What `prepare_model_for_kbit_training` does with the parameters of any model, without its checkpointing."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_gates_train_on_a_base_that_was_frozen_before(ids):
    model = freeze_as_for_quantized_training(build_patched(**PATCH))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    peft_model = adapt(model)
    start = [bias.detach().clone() for bias in live_gates(peft_model)]
    sgd_step(peft_model, ids)
    assert all(not torch.equal(a, b) for a, b in zip(live_gates(peft_model), start, strict=True))


@pytest.fixture
def four_bit(tmp_path):
    """The folder of a base, and the options that load it with 4-bit weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # The weights are quantized in blocks of 64.
    base = saved(tmp_path, build(hidden_size=64, num_attention_heads=8, num_key_value_heads=4), "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": config, "dtype": "float32", "attn_implementation": "eager"}
    model = AutoInfiniModelForCausalLM.from_pretrained(base, infini_config=InfiniConfig(**PATCH), **options)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    return base, model, options


@pytest.mark.filterwarnings("ignore")
def test_a_four_bit_base_trains_saves_and_loads_its_adapter_and_gates(tmp_path, four_bit, ids):
    base, model, options = four_bit
    assert gate_dtypes(model) == {torch.float32}
    peft_model = adapt(freeze_as_for_quantized_training(model)).train()
    before = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    sgd_step(peft_model, ids)
    for name, parameter in peft_model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    peft_model.eval()
    loaded = load_adapter(base, saved(tmp_path, peft_model), **options)
    assert gate_dtypes(loaded) == {torch.float32}
    assert torch.equal(read_whole(loaded, ids), read_whole(peft_model, ids))
    assert_close(read(loaded, ids, [3, 20, 21])[0], read_whole(loaded, ids))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_four_bit_base_merges_into_the_base_at_full_precision(tmp_path, four_bit, ids):
    base, model, _ = four_bit
    folder = saved(tmp_path, adapt(model))
    loaded = load_adapter(base, folder, attn_implementation="eager")
    logits = read_whole(loaded, ids)
    assert_close(read_whole(loaded.merge_and_unload(), ids), logits)
