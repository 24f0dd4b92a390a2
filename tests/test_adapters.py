"""Adapters of PEFT beside LoRA's usual ones: what works segment by segment works, and the rest refuses by name."""

import math

import pytest
import torch
from models import add_moved_projections, build, build_patched, random_ids
from peft import AdaLoraConfig, AdaptionPromptConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from reading import assert_close
from safetensors.torch import load_file, save_file
from training import make_trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from infini_hf import InfiniConfig, generate, patch_model, prefill, score
from infini_hf.lora import InfiniLoraConfig, load_adapter, lora_config

PATCH = {"segment_length": 8, "overlap": 2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def patched(**options):
    return build_patched(**{**PATCH, **options})


def saved(tmp_path, model, name, seed):
    """The folder of an adapter whose weights and gates are away from where they start, and its logits."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, lora_config(model, **LORA)).eval()
    with torch.no_grad():
        for parameter, bias in peft_model.named_parameters():
            if "memory_gate.modules_to_save" in parameter and parameter.endswith("bias"):
                bias.normal_()
    peft_model.save_pretrained(tmp_path / name)
    return tmp_path / name


@pytest.fixture
def ids():
    return random_ids(2, 44)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


# Another adapter for a model that has one


@pytest.mark.parametrize("projections", [False, True])
def test_a_second_adapter_has_its_own_gates_and_projections(tmp_path, ids, projections):
    one = saved(tmp_path, patched(), "one", seed=1)
    two = saved(tmp_path, add_moved_projections(patched(), 0.5) if projections else patched(), "two", seed=2)
    first, second = logits(load_adapter(patched(), one), ids), logits(load_adapter(patched(), two), ids)
    model = load_adapter(patched(), one)
    assert load_adapter(model, two, adapter_name="second") is model
    assert_close(logits(model, ids), first)
    model.set_adapter("second")
    assert_close(logits(model, ids), second)
    assert (first - second).abs().max() > 0.1
    model.set_adapter("default")
    assert_close(logits(model, ids), first)
    # Saved again it says which patch it is of.
    model.save_pretrained(tmp_path / "again")
    assert isinstance(model.peft_config["second"], InfiniLoraConfig)
    assert_close(logits(load_adapter(patched(), tmp_path / "again" / "second"), ids), second)


def test_a_second_adapter_may_be_trained(tmp_path, ids):
    one, two = (saved(tmp_path, patched(), name, seed) for name, seed in (("one", 1), ("two", 2)))
    model = load_adapter(patched(), one)
    load_adapter(model, two, adapter_name="second", is_trainable=True)
    assert model.active_adapters == ["second"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("memory_gate" in name for name in trained)
    assert all(".second" in name for name in trained)


def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone(tmp_path, ids):
    one = saved(tmp_path, patched(), "one", seed=1)
    other = saved(tmp_path, patched(segment_length=16), "other", seed=2)
    wide = saved(tmp_path, build_patched("gemma3_text", **PATCH), "wide", seed=2)
    model = load_adapter(patched(), one)
    before = logits(model, ids)
    for folder, message in ((other, "the base is patched with"), (wide, "holds no gate for|does not fit")):
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder, adapter_name="second")
        assert list(model.peft_config) == ["default"]
        assert_close(logits(model, ids), before)
    with pytest.raises(ValueError, match="'default': the model has an adapter of that name; give another"):
        load_adapter(model, one)
    with pytest.raises(ValueError, match="not patched"):
        load_adapter(get_peft_model(build(), LoraConfig(**LORA)), one, adapter_name="second")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_that_is_not_whole_is_taken_out_again(tmp_path, ids, is_trainable):
    one, two = (saved(tmp_path, patched(), name, seed) for name, seed in (("one", 1), ("two", 2)))
    model = load_adapter(patched(), one, is_trainable=True)
    load_adapter(model, two, adapter_name="second", is_trainable=True)
    weights = load_file(two / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_A" in name)]
    save_file(weights, two / "adapter_model.safetensors")
    before, trained = logits(model, ids), trainable(model)
    with pytest.raises(ValueError, match="does not fit this base: nothing in the file for"):
        load_adapter(model, two, adapter_name="third", is_trainable=is_trainable)
    assert list(model.peft_config) == ["default", "second"]
    assert model.active_adapters == ["second"]
    assert trainable(model) == trained
    assert not any("third" in name for name, _ in model.named_parameters())
    assert_close(logits(model, ids), before)


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_projections_come_after_adapters_without_them(tmp_path):
    one = saved(tmp_path, patched(), "one", seed=1)
    two = saved(tmp_path, add_moved_projections(patched(), 0.5), "two", seed=2)
    model = load_adapter(patched(), two)
    with pytest.raises(ValueError, match=r"trained without .*query_projection.* load this one first"):
        load_adapter(model, one, adapter_name="second")
    assert list(model.peft_config) == ["default"]


# Kinds that know nothing of segments


def with_invocation(ids):
    model = patched()
    return get_peft_model(model, lora_config(model, **LORA, alora_invocation_tokens=ids[0, 10:12].tolist()))


@pytest.mark.parametrize("read", [prefill, score, lambda *inputs: generate(*inputs, max_new_tokens=2)])
def test_an_adapter_that_tokens_switch_on_is_refused_where_they_would_be_left_out(ids, read):
    with pytest.raises(NotImplementedError, match=r"'default' has alora_invocation_tokens: .* \(its own generate"):
        read(with_invocation(ids), ids)
    # The ways out.
    model = with_invocation(ids)
    assert model(ids).logits.isfinite().all()
    model.add_adapter("plain", lora_config(patched(), **LORA))
    model.set_adapter("plain")
    read(model, ids)


def test_what_needs_whole_rows_is_not_trained_segment_by_segment(tmp_path, ids):
    with pytest.raises(NotImplementedError, match=r"alora_invocation_tokens: .* the stock Trainer"):
        make_trainer(tmp_path, with_invocation(ids), None)
    adaptive = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)
    with pytest.raises(NotImplementedError, match=r"'default' is an AdaLoRA, .* use the stock Trainer, or LoRA"):
        make_trainer(tmp_path, get_peft_model(patched(), adaptive), None)
    model = patched()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(NotImplementedError, match=r"model.loss_function is '.*lambda.*use the stock Trainer"):
        make_trainer(tmp_path, model, None)
    headless = patch_model(type(model.model)(build().config), InfiniConfig(segment_length=8))
    with pytest.raises(TypeError, match="a LlamaModel predicts no tokens"):
        make_trainer(tmp_path, headless, None)


def test_a_loss_that_takes_shifted_labels_is_that_of_the_row(tmp_path, ids):
    def twice(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **options):
        return 2 * ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels)

    model, batch = patched(), {"input_ids": ids, "labels": ids}
    model.loss_function = twice
    found = make_trainer(tmp_path, model, None).compute_loss(model, batch)
    assert_close(found, model(ids, labels=ids, use_cache=False).loss)
    assert_close(found, 2 * patched()(ids, labels=ids, use_cache=False).loss)


def test_an_attention_that_is_wrapped_is_refused(ids):
    prompt = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    model = get_peft_model(patched(), prompt)
    for use_cache in (True, False):
        with pytest.raises(NotImplementedError, match="attention of layer 1 is wrapped in a AdaptedAttention"):
            model(ids, use_cache=use_cache)


def test_the_cache_of_prefix_tuning_is_refused_with_its_name(ids):
    model = get_peft_model(patched(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"is a DynamicCache.*PEFT's prefix tuning makes a cache of its own"):
        model(input_ids=ids, labels=ids)


def test_a_batch_of_embeddings_and_an_evaluation_of_nothing_are_named(tmp_path, ids, caplog):
    trainer = make_trainer(tmp_path, patched())
    embeds = trainer.model.get_input_embeddings()(ids)
    for call in (trainer.compute_loss, lambda model, batch: trainer.prediction_step(model, batch, True)):
        with pytest.raises(ValueError, match=r"the batch has \['inputs_embeds'\].*use the stock Trainer"):
            call(trainer.model, {"inputs_embeds": embeds, "labels": ids})
        with pytest.raises(ValueError, match="the batch has no input_ids"):
            call(trainer.model, {"labels": ids})
    metrics = trainer.evaluate([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])
    assert math.isnan(metrics["eval_loss"])
    assert "no label of the evaluation counts" in caplog.text
    assert trainer.evaluate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])["eval_loss"] > 0
