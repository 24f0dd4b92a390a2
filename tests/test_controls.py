"""The controls: a closed memory is block-local attention, tables are means, and the card tells both."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from huggingface_hub import ModelCard
from models import build, build_patched, gate_parameters, open_gates, random_ids, relative_error
from peft import get_peft_model
from reading import read, read_whole
from training import make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniConfig, patch_model, score
from infini_hf.callbacks import gate_values
from infini_hf.evaluation.controls import closed_memory, local_attention, local_start
from infini_hf.evaluation.perplexity import SpanTable, mean_by_span
from infini_hf.lora import lora_config
from infini_hf.model_card import evaluate_with_control, write_model_card

WINDOWS = [{}, {"overlap": 3, "sink_tokens": 2}]
KINDS = pytest.mark.parametrize("kind", ["tanh", "sigmoid"])


# A closed memory.


@KINDS
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("window", WINDOWS, ids=["blocks", "overlap"])
def test_a_closed_memory_is_a_fresh_patch_of_the_base_weights(kind, family, window):
    model = build_patched(family, segment_length=8, gate=kind, **window)
    # Gates of the tanh kind start at zero, which is local attention exactly.
    fresh = patch_model(build(family), InfiniConfig(8, **window))
    ids = random_ids(2, 29)
    with closed_memory(model) as inside:
        assert inside is model
        assert torch.equal(read_whole(model, ids), read_whole(fresh, ids))
        streamed, _ = read(model, ids, [5, 11, 13])
        assert relative_error(streamed, read_whole(fresh, ids)) <= 1e-5
    assert relative_error(read_whole(model, ids), read_whole(fresh, ids)) > 1e-2


@KINDS
def test_a_closed_memory_reads_every_block_as_the_stock_model_does(kind):
    model, stock = build_patched(segment_length=8, gate=kind), build()
    ids = random_ids(1, 24)
    with torch.no_grad():
        blocks = torch.cat([stock(block, use_cache=False).logits for block in ids.split(8, dim=1)], dim=1)
    with closed_memory(model):
        assert relative_error(read_whole(model, ids), blocks) <= 1e-5


@KINDS
def test_gates_open_again_whatever_happens(kind):
    model, ids = build_patched(segment_length=8, gate=kind), random_ids(1, 29)
    before = read_whole(model, ids)

    def fail_inside():
        with closed_memory(model):
            with closed_memory(model):
                closed = read_whole(model, ids)
            assert torch.equal(read_whole(model, ids), closed), "the inner one opened the outer one's gates"
            assert relative_error(closed, before) > 1e-2
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert torch.equal(read_whole(model, ids), before)


@KINDS
def test_gates_that_accelerate_keeps_elsewhere_close_too(kind):
    whole, ids = build_patched(segment_length=8, gate=kind), random_ids(1, 29)
    offloaded = cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    assert all(bias.device.type == "meta" for bias in gate_parameters(offloaded).values())
    with closed_memory(whole), closed_memory(offloaded):
        assert torch.equal(read_whole(offloaded, ids), read_whole(whole, ids))
    assert torch.equal(read_whole(offloaded, ids), read_whole(whole, ids))


@KINDS
def test_under_peft_the_gates_that_are_trained_close(kind):
    base = build_patched(segment_length=8, gate=kind)
    plain = copy.deepcopy(base)
    peft_model = get_peft_model(base, lora_config(base, r=2, target_modules=["q_proj"])).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, bias in peft_model.named_parameters():
            if "memory_gate.modules_to_save" in name:
                bias.copy_(torch.randn(bias.shape, generator=generator))
    ids, before = random_ids(1, 29), read_whole(peft_model, random_ids(1, 29))
    assert relative_error(before, read_whole(plain, ids)) > 1e-3, "the trained gates are others than the base's"
    with closed_memory(peft_model), closed_memory(plain):
        # The adapter starts as nothing, so that closed both are the same model.
        assert relative_error(read_whole(peft_model, ids), read_whole(plain, ids)) <= 1e-6
        with peft_model.disable_adapter():
            assert relative_error(read_whole(peft_model, ids), read_whole(plain, ids)) <= 1e-6
    assert torch.equal(read_whole(peft_model, ids), before)
    with peft_model.disable_adapter():
        assert relative_error(read_whole(peft_model, ids), read_whole(plain, ids)) <= 1e-6


def test_gates_can_be_trained_after_a_control():
    model = build_patched(segment_length=8)
    with closed_memory(model):
        pass
    model(random_ids(1, 24), labels=random_ids(1, 24), use_cache=False).loss.backward()
    assert all(bias.grad.abs().max() > 0 for bias in gate_parameters(model).values())


def test_a_stock_model_has_no_memory_to_close():
    with pytest.raises(ValueError, match="not patched"), closed_memory(build()):
        pass


# Baselines: the memory closed and another window.


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3_text"])
def test_a_window_as_long_as_the_text_is_full_attention(family):
    model, stock, ids = (
        build_patched(family, segment_length=8, overlap=3, sink_tokens=2),
        build(family),
        random_ids(2, 29),
    )
    with torch.no_grad():
        expected = stock(ids, use_cache=False).logits
    with local_attention(model, segment_length=40):
        streamed, _ = read(model, ids, [5, 11, 13])
        assert relative_error(streamed, expected) <= 1e-5
    assert relative_error(read_whole(model, ids), expected) > 1e-2


@KINDS
@pytest.mark.parametrize("overlap", [0, 8])
def test_another_window_is_a_fresh_patch_with_that_window(kind, overlap):
    model = build_patched(segment_length=8, gate=kind, overlap=3, sink_tokens=2)
    fresh, ids = patch_model(build(), InfiniConfig(8, overlap=overlap)), random_ids(2, 29)
    before, patch = read_whole(model, ids), dict(model.config.infini_attention)
    with local_attention(model, overlap=overlap):
        assert torch.equal(read_whole(model, ids), read_whole(fresh, ids))
    with pytest.raises(KeyError, match="inside"), local_attention(model, overlap=overlap):
        raise KeyError("inside")
    assert model.config.infini_attention == patch
    assert torch.equal(read_whole(model, ids), before)


@pytest.mark.parametrize("tokens", [7, 8, 120, 123])
@pytest.mark.parametrize("overlap", [0, 1, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_with_a_closed_memory_what_lies_out_of_reach_need_not_be_read(family, overlap, tokens):
    model, ids, question = build_patched(family, segment_length=8), random_ids(1, tokens), random_ids(1, 11, seed=1)
    with local_attention(model, overlap=overlap):
        start = local_start(model.config, tokens)
        assert start % 8 == 0
        assert start < tokens
        whole = read(model, torch.cat([ids, question], dim=1))[0][:, -11:]
        tail = read(model, torch.cat([ids[:, start:], question], dim=1))[0][:, -11:]
        assert relative_error(tail, whole) <= 1e-5
        if tokens == 123:
            # Something is saved, and what was left out cannot be much more.
            assert start >= 120 - (0 if family == "llama" and not overlap else 4 * 16)
            if overlap:
                short = read(model, torch.cat([ids[:, 120:], question], dim=1))[0][:, -11:]
                assert relative_error(short, whole) > 1e-3


def test_sinks_and_global_layers_that_stay_stock_reach_everything():
    assert local_start(build_patched(segment_length=8, sink_tokens=1).config, 100) == 0
    assert local_start(build_patched(segment_length=8, layers=[1]).config, 100) == 0
    assert local_start(build_patched(segment_length=8).config, 100) == 96


# Perplexity tables.


def test_spans_of_several_texts_count_every_token_once():
    texts = [torch.arange(10.0), torch.arange(6.0) + 100, torch.zeros(0)]
    means, counts = mean_by_span(texts, [0, 4, 8, 10, 16])
    assert counts == [8, 6, 2, 0]
    assert means[3] is None
    assert means[:3] == pytest.approx([(6 + 406) / 8, (4 + 5 + 6 + 7 + 104 + 105) / 6, 8.5])


def test_one_text_gives_the_means_of_its_spans():
    losses = score(build_patched(segment_length=8), random_ids(1, 41))
    edges = [0, 8, 16, 40]
    means, counts = mean_by_span([losses[0]], edges)
    assert means == pytest.approx([losses[:, start:stop].mean().item() for start, stop in pairwise(edges)])
    assert sum(mean * count for mean, count in zip(means, counts, strict=True)) == pytest.approx(losses.sum().item())


def test_a_table_shows_perplexities_and_what_a_way_to_read_does_not_reach():
    table = SpanTable([0, 1024, 2048], {"memory": [0.0, math.log(7.25)], "full": [math.log(2.0), None]}, [1024, 512])
    assert table.markdown() == [
        "| read with | 0–1,024 | 1,024–2,048 |",
        "|---|---|---|",
        "| memory | 1.00 | 7.25 |",
        "| full | 2.00 | – |",
        "| tokens | 1,024 | 512 |",
    ]


# The model card.


def trained(folder, model=None, **arguments):
    parts = {"eval_dataset": Dataset.from_list(tiny_rows(2))}
    trainer = make_trainer(folder, model, parts=parts, **arguments)
    trainer.train()
    return trainer


def test_the_control_is_the_same_evaluation_with_the_memory_closed(tmp_path):
    trainer = trained(tmp_path, tiny_model(gate="sigmoid"))
    results = evaluate_with_control(trainer)
    assert results["with memory"]["loss"] == trainer.evaluate()["eval_loss"]
    with closed_memory(trainer.model):
        assert results["memory closed"]["loss"] == trainer.evaluate()["eval_loss"]
    assert abs(results["memory closed"]["loss"] - results["with memory"]["loss"]) > 1e-3
    assert results["memory closed"]["tokens"] == results["with memory"]["tokens"]
    assert trainer.evaluate()["eval_loss"] == results["with memory"]["loss"]


def test_without_data_nothing_is_evaluated(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert evaluate_with_control(trainer) == {}
    card = write_model_card(trainer, tmp_path / "final", "base", "rows", "python train.py", {})
    assert "Not evaluated" in card.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "final" / "results.json").read_text(encoding="utf-8")) == {}


def test_the_card_has_patch_recipe_results_and_gates(tmp_path):
    trainer = trained(tmp_path / "recipe", tiny_model(overlap=3), weight_decay=0.25, hub_token="hf_secret")
    results = evaluate_with_control(trainer)
    path = write_model_card(trainer, tmp_path / "recipe" / "final", "some/base", "some rows", "the command", results)
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in (
        "base_model: some/base",
        "# recipe",
        "- `overlap`: 3",
        "- data: some rows",
        "- command: `the command`",
        "- steps: 2 of 2",
        "- `weight_decay`: 0.25",
        "- `memory_gate_learning_rate`: 0.01",
    ):
        assert line in lines
    for name in ("with memory", "memory closed"):
        assert f"| {name} | {results[name]['loss']:.4f} | {results[name]['tokens']:,} |" in lines
    for index, gates in gate_values(trainer.model).items():
        assert f"| {index} | {gates.mean():.3f} | {gates.min():.3f} | {gates.max():.3f} |" in lines
    assert "secret" not in "\n".join(lines)
    options = [line.split("`")[1] for line in lines[lines.index("## Training") : lines.index("## Evaluation")][5:-1]]
    assert {"max_steps", "learning_rate", "recompute_segments"} <= set(options)
    # Defaults of the stock go without saying, and so does where this machine keeps things.
    assert not {"adam_beta1", "max_grad_norm", "bptt_segments", "output_dir", "use_cpu", "debug"} & set(options)


def test_the_card_names_no_folder_as_its_base(tmp_path):
    """The hub refuses such a card, and all that is uploaded with it."""
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    bases = {"tiny-llama": None, "other/base": "other/base", "~/models": None, str(tmp_path / "run"): None}
    heads = {"some/base": "some/base", "runs/final": "runs/final", "/home/me/x": None, "tiny-llama": None, "[": None}
    for number, (head, named) in enumerate(heads.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text(f"---\nbase_model: {head}\n---\n# card\n", encoding="utf-8")
        bases[str(folder)] = named
    for base, named in bases.items():
        text = write_model_card(trainer, tmp_path, str(base), "rows", "command", {}).read_text(encoding="utf-8")
        assert ModelCard(text).data.base_model == named
        assert 'AutoInfiniModelForCausalLM.from_pretrained("FOLDER")' in text


def test_the_card_of_an_adapter_says_so(tmp_path):
    base = tiny_model()
    model = open_gates(get_peft_model(base, lora_config(base, r=2, target_modules=["q_proj"])))
    trainer = trained(tmp_path, model)
    text = write_model_card(trainer, tmp_path, "base", "rows", "command", {}).read_text(encoding="utf-8")
    assert "library_name: peft" in text
    assert "LoRA adapters and gates" in text


def test_a_trainer_works_on_after_its_card_is_written(tmp_path):
    trainer = trained(tmp_path)
    before = trainer.evaluate()["eval_loss"]
    write_model_card(trainer, tmp_path, "base", "rows", "command", {})
    assert trainer.accelerator.state.mixed_precision == "no"
    assert trainer.evaluate()["eval_loss"] == before


def test_one_process_writes_the_card_and_all_gather_its_gates(tmp_path, monkeypatch):
    """The gates of a sharded model are gathered from all processes: one that stayed away would leave the others."""
    trainer, asked = trained(tmp_path / "run"), []
    monkeypatch.setattr("infini_hf.model_card.gate_values", lambda model: asked.append(model) or gate_values(model))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    path = write_model_card(trainer, tmp_path / "final", "base", "rows", "command", {})
    assert asked == [trainer.model]
    assert not path.parent.exists()
