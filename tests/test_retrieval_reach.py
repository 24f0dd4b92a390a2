"""How far the gradient of retrieval supervision goes."""

import pytest
import torch
from models import build_patched, random_ids
from test_retrieval_supervision import L, read_told, some_sources, told_rows
from training import make_trainer, tiny_model

from infini_hf import InfiniCache, InfiniTrainingArguments
from infini_hf.calibration import add_memory_projections
from infini_hf.retrieval_supervision import RetrievalSupervision


def gradients(model, reach, loss, contrast):
    """The loss of told tokens alone, and its gradients by name."""
    model.zero_grad()
    ids, sources = random_ids(2, 4 * L), some_sources(2, 4 * L)
    supervision, cache = (
        RetrievalSupervision(1.0, [1], loss=loss, contrast=contrast, reach=reach),
        InfiniCache(model.config),
    )
    with supervision.reading(model, ids, sources, None, cache.seen) as told:
        read_told(model, ids, None, cache, told)
    told.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return told.loss.detach(), found


@pytest.mark.parametrize(("loss", "contrast"), [("share", 0.0), ("votes", 0.7), ("tokens", 0.0)])
@pytest.mark.parametrize("mix_heads", [False, True])
def test_projections_learn_alike_and_nothing_else_does(loss, contrast, mix_heads):
    model = build_patched("llama", segment_length=L, overlap=3, feature_map="softmax").train()
    add_memory_projections(model, mix_heads=mix_heads)
    whole_loss, whole = gradients(model, "model", loss, contrast)
    near_loss, near = gradients(model, "projections", loss, contrast)
    assert torch.equal(near_loss, whole_loss)
    gate = "model.layers.1.self_attn.memory_gate"
    assert set(near) == {f"{gate}.query_projection.weight", f"{gate}.key_projection.weight"}
    for name, gradient in near.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7)
    assert whole["model.layers.0.self_attn.q_proj.weight"].abs().max() > 0


def test_the_trainer_takes_it_and_refuses_layers_without_projections(tmp_path):
    options = {"retrieval_weight": 3.0, "recompute_segments": False, "max_steps": 1, "retrieval_reach": "projections"}
    with pytest.raises(ValueError, match=r"layers \[0, 1\] has no projections"):
        make_trainer(tmp_path, rows=told_rows(), **options)
    model = add_memory_projections(tiny_model(), layers=[1])
    trainer = make_trainer(tmp_path, model=model, rows=told_rows(), retrieval_layers=[1], **options)
    assert trainer.supervision.retrieval.reach == "projections"
    with pytest.raises(ValueError, match="retrieval_reach='heads': must be one of 'model', 'projections'"):
        InfiniTrainingArguments("out", retrieval_reach="heads")
