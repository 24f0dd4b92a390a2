"""Retrieval and gate in one step against the two steps, whose gradients autograd finds."""

import importlib.util
from pathlib import Path

import pytest
import torch
from models import build_patched, random_ids, relative_error

from infini_hf import memory as memory_math
from infini_hf.fast_paths import fast_paths
from infini_hf.gate import MemoryGate
from infini_hf.memory_read import Retrieval

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 3, 6, 3, 7, 8
NAMES = ("local", "queries", "memory", "memory_norm", "bias")


def tensors(dtype=torch.float32, seed=0):
    """What a gate mixes, by name; queries and local attention transposed, as layers hold them."""
    torch.manual_seed(seed)
    local, queries = (torch.randn(BATCH, LENGTH, HEADS, DIM).transpose(1, 2).to(dtype) for _ in range(2))
    # One channel large enough that queries differ, and a state as segments leave it.
    queries = queries * torch.linspace(0.2, 3.0, DIM).to(dtype)
    memory, norm = torch.randn(BATCH, KV_HEADS, DIM, DIM) * 20, torch.rand(BATCH, KV_HEADS, DIM) * 30 + 1
    return dict(zip(NAMES, (local, queries, memory, norm, torch.linspace(-1.5, 1.5, HEADS)), strict=True))


def mixed(parts, feature_map, fused, reads=None, trained=NAMES):
    """The output, and the gradients of a weighted sum by name."""
    parts = {name: part.detach().clone().requires_grad_(name in trained) for name, part in parts.items()}
    gate = MemoryGate(HEADS, "tanh")
    del gate.bias
    gate.bias = parts["bias"]
    read = Retrieval if fused else memory_math.retrieve
    retrieved = read(parts["queries"], parts["memory"], parts["memory_norm"], feature_map)
    output = gate(parts["local"], retrieved, reads)
    weights = torch.randn(BATCH, LENGTH, HEADS, DIM, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    (output.float() * weights).sum().backward()
    return output, {name: parts[name].grad for name in parts}


@pytest.mark.parametrize("reads", [None, [1.0, 0.0, 1.0]], ids=["all rows", "not the second"])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "softmax"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_one_step_gives_the_output_and_gradients_of_two(dtype, tolerance, feature_map, reads):
    reads = None if reads is None else torch.tensor(reads)
    parts = tensors(dtype)
    expected, gradients = mixed(parts, feature_map, False, reads)
    actual, ours = mixed(parts, feature_map, True, reads)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    for name in NAMES:
        assert gradients[name].abs().max() > 1e-3, name
        assert (ours[name].dtype, ours[name].shape) == (gradients[name].dtype, gradients[name].shape), name
        assert relative_error(ours[name], gradients[name]) <= tolerance, name


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_gradient_gets_none_and_the_others_theirs(name):
    parts = tensors()
    _, expected = mixed(parts, "elu", True)
    trained = [other for other in NAMES if other != name]
    _, gradients = mixed(parts, "elu", True, trained=trained)
    assert gradients[name] is None
    assert all(torch.equal(gradients[other], expected[other]) for other in trained)
    _, gradients = mixed(parts, "elu", True, trained=[name])
    assert torch.equal(gradients[name], expected[name])


@pytest.mark.parametrize("scale", [0.0, 1e-24], ids=["empty", "vanishing"])
def test_a_memory_of_next_to_nothing(scale):
    """The denominator is kept away from zero there, and is a constant."""
    parts = tensors()
    # The memory smaller still: what is retrieved stays finite, as it is where keys have vanished.
    parts |= {"memory": parts["memory"] * scale * 1e-3, "memory_norm": parts["memory_norm"] * scale}
    expected, gradients = mixed(parts, "elu", False)
    actual, ours = mixed(parts, "elu", True)
    assert torch.equal(actual, expected)
    for name in NAMES:
        assert torch.isfinite(ours[name]).all()
        torch.testing.assert_close(ours[name], gradients[name], rtol=2e-5, atol=1e-6)


def test_under_autocast_the_memory_stays_in_float32():
    parts = tensors()
    expected, gradients = mixed(parts, "elu", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, ours = mixed(parts, "elu", True)
    assert torch.equal(actual, expected)
    assert all(torch.equal(ours[name], gradients[name]) for name in NAMES)


def test_a_second_derivative_is_refused():
    parts = {name: part.requires_grad_() for name, part in tensors().items()}
    retrieval = Retrieval(parts["queries"], parts["memory"], parts["memory_norm"])
    output = retrieval.mixed_into(parts["local"], torch.full((1, HEADS, 1, 1), 0.3))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(output.sum(), parts["queries"], create_graph=True)


def test_where_the_refusal_sends_a_second_derivative_it_is_right():
    """Hessian times vector, of the whole model over three segments, against a difference of gradients."""
    model, ids = build_patched(segment_length=8, overlap=3), random_ids(1, 21)
    embeddings = model.get_input_embeddings()(ids).detach()
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))

    def gradient(inputs, graph=False):
        inputs = inputs.requires_grad_()
        loss = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
        return inputs, torch.autograd.grad(loss, inputs, create_graph=graph)[0]

    with fast_paths("never"):
        inputs, first = gradient(embeddings.clone(), graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), inputs)
        step = 1e-3
        ahead, behind = (gradient(embeddings + sign * step * direction)[1] for sign in (1, -1))
    assert relative_error(second, (ahead - behind) / (2 * step)) <= 2e-2


@pytest.mark.parametrize("graph", [False, True], ids=["once", "with a graph"])
def test_the_slope_of_elu_at_zero_and_far_from_it(graph):
    """Against the closed form: 1 from zero on, exp(x) below."""
    states = torch.tensor([-90.0, -20.0, -1.0, -0.0, 0.0, 1e-6, 1.0, 50.0], requires_grad=True)
    mapped = memory_math.map_keys(states)
    (slope,) = torch.autograd.grad(mapped, states, torch.full_like(states, 3.0), create_graph=graph)
    expected = 3.0 * torch.where(states >= 0, 1.0, states.exp())
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0.0)


def test_the_benchmark_measures_what_gives_the_same_gradients(tmp_path, monkeypatch, capsys):
    """Without a compiler: that it is left out is said."""
    path = Path(__file__).parent.parent / "scripts" / "benchmark_memory_read.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory_read", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def no_compiler(function):
        def fail():
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    sizes = "--segment 16 --heads 4 --kv_heads 2 --head_dim 8 --repeats 2".split()
    benchmark.main([*sizes, "--output", str(tmp_path / "table.md")])
    assert "compiled left out: no compiler here" in capsys.readouterr().out
    rows = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines() if "one step" in line]
    assert [row[1].strip() for row in rows] == ["elu", "exp"]
    assert all(0 < float(row[6]) < 1e-5 for row in rows)
