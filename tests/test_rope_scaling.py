"""Every kind of RoPE scaling: the window's angles do not depend on what was read, or on who else is reading."""

import logging

import pytest
import torch
from models import build, build_patched, random_ids, relative_error
from reading import read, read_whole

from infini_hf import InfiniConfig, patch_model

SCALINGS = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}


def scaled(kind):
    overrides = {"rope_parameters": SCALINGS[kind], "max_position_embeddings": 16}
    return build_patched("llama", overrides=overrides, segment_length=16)


@pytest.mark.parametrize("kind", SCALINGS)
def test_chunks_equal_the_whole(kind):
    model, ids = scaled(kind), random_ids(1, 90)
    chunked, _ = read(model, ids, [1, 15, 16, 30, 28])
    assert relative_error(chunked, read_whole(model, ids)) <= 1e-5


@pytest.mark.parametrize("segment_length", [16, 64])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_of_a_window_longer_than_short_inputs_are_said(kind, segment_length, caplog):
    """The window is read with those of the longest input that fits into it, the stock model with those of its own."""
    scaling = {**SCALINGS["yarn"], "rope_type": kind, "original_max_position_embeddings": 32}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    positions = 32 if kind == "dynamic" else 128
    model = build("llama", rope_parameters=scaling, max_position_embeddings=positions)
    ids = random_ids(1, 12)
    stock = read_whole(model, ids)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        patch_model(model, InfiniConfig(segment_length=segment_length))
    said = f"rope_type={kind} has other frequencies for inputs of more than 32 tokens, and the local window of 64"
    assert (said in caplog.text) == (segment_length == 64)
    assert torch.equal(read_whole(model, ids), stock) == (segment_length == 16)


@pytest.mark.parametrize("layers", ["full_attention", "sliding_attention"])
def test_frequencies_of_stock_layers_are_none_of_the_windows(layers, caplog):
    plain = {"rope_type": "default", "rope_theta": 1e4}
    scaling = {"full_attention": plain, "sliding_attention": plain, layers: SCALINGS["dynamic"]}
    model = build("gemma3_text", rope_parameters=scaling, max_position_embeddings=32)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        patch_model(model, InfiniConfig(segment_length=64))
    assert ("rope_type=dynamic has other frequencies" in caplog.text) == (layers == "full_attention")


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_long_conversation_leaves_another_as_it_was(kind):
    model, ids = scaled(kind), random_ids(1, 90)
    with torch.no_grad():
        before = read_whole(model, ids[:, :16])
        read_whole(model, ids)
        assert torch.equal(read_whole(model, ids[:, :16]), before)
