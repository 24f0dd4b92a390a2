"""Every kind of RoPE scaling: the window's angles do not depend on what was read, or on who else is reading."""

import pytest
import torch
from models import build_patched, random_ids, relative_error
from reading import read, read_whole

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


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_long_conversation_leaves_another_as_it_was(kind):
    model, ids = scaled(kind), random_ids(1, 90)
    with torch.no_grad():
        before = read_whole(model, ids[:, :16])
        read_whole(model, ids)
        assert torch.equal(read_whole(model, ids[:, :16]), before)
