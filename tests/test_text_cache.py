"""A cache of a text's hidden states against loops, and the script that measures with it."""

import json
import math

import pytest
import torch
from models import build_patched, random_ids
from test_scripts import prose, script
from torch.nn import functional as F

from infini_hf import score
from infini_hf.evaluation import error_memory, text_cache
from infini_hf.evaluation.error_memory import States, find_cells, with_cells, with_places
from infini_hf.evaluation.text_cache import cache_shares, read_states, with_cache


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("own", [True, False])
def test_shares_are_those_of_every_place_worked_out_one_by_one(window, own, monkeypatch):
    monkeypatch.setattr(text_cache, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    states, others = (torch.randn(40, 6, generator=generator) for _ in "ab")
    ids, other_ids = (torch.randint(0, 5, (40,), generator=generator) for _ in "ab")
    held, held_ids = (states, ids) if own else (others, other_ids)
    found = cache_shares(states, ids, held, held_ids, window, 3.0)
    assert found.shape == (39,)
    states, held = (torch.nn.functional.normalize(part, dim=-1) for part in (states, held))
    for now in range(39):
        places = range(now - window + 1)
        weights = [math.exp(3.0 * float(states[now] @ held[place])) for place in places]
        right = [weight for place, weight in zip(places, weights, strict=True) if held_ids[place + 1] == ids[now + 1]]
        if not weights:
            assert found[now].isnan()
        else:
            assert found[now].item() == pytest.approx(sum(right) / sum(weights), abs=1e-6)


def test_states_are_those_before_the_head_and_losses_those_of_a_stream():
    model = build_patched("llama", segment_length=8, overlap=3).eval()
    ids = random_ids(1, 29)
    states, losses = read_states(model, ids)
    torch.testing.assert_close(losses, score(model, ids)[0], rtol=1e-5, atol=1e-5)
    assert states.shape == (29, model.config.hidden_size)
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-4)


def test_a_mixture_counts_only_where_the_cache_holds_something():
    losses, shares = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([math.nan, 0.0, 0.5])
    mixed = [1.0, -math.log(0.9 * math.exp(-2.0)), -math.log(0.9 * math.exp(-3.0) + 0.05)]
    assert with_cache(losses, shares, 0.1).tolist() == pytest.approx(mixed)


def read_of(seed, length=40, width=6, vocab=9):
    generator = torch.Generator().manual_seed(seed)
    states, embeddings = (
        torch.randn(length, width, generator=generator),
        torch.randn(vocab, width, generator=generator),
    )
    return States(states, torch.randint(0, vocab, (length,), generator=generator), embeddings)


def plain_losses(read):
    return F.cross_entropy(read.states[:-1] @ read.embeddings.T, read.ids[1:], reduction="none")


def test_an_error_is_a_step_down_the_loss_and_the_head_is_held_to_the_model():
    read = read_of(0)
    states = read.states.clone().requires_grad_()
    F.cross_entropy(states[:-1] @ read.embeddings.T, read.ids[1:], reduction="sum").backward()
    torch.testing.assert_close(read.errors, -states.grad[:-1], rtol=1e-5, atol=1e-5)
    read.check(plain_losses(read))
    with pytest.raises(ValueError, match="from those of states and embeddings alone"):
        read.check(plain_losses(read) + 0.2)


@pytest.mark.parametrize("own", [True, False])
def test_errors_in_cells_are_those_of_closed_segments_added_one_by_one(own):
    read, length = read_of(1), 8
    held = read if own else read_of(2)
    mean, cells = find_cells(read_of(3).states, 5)
    found = with_cells(read, held, mean, cells, length, 4.0, 1.5)

    def shares(state):
        direction = F.normalize(F.normalize(state, dim=-1) - mean, dim=-1)
        return (4.0 * cells @ direction).softmax(-1)

    for now in range(39):
        # Place i is written with the segment of token i + 1.
        places = [i for i in range(39) if (i + 1) // length < now // length]
        query, added = shares(read.states[now]), torch.zeros(6)
        if places:
            weights = torch.stack([query @ shares(held.states[i]) for i in places])
            added = 1.5 * (weights / weights.sum()) @ held.errors[places]
        logits = (read.states[now] + added) @ read.embeddings.T
        assert found[now].item() == pytest.approx(F.cross_entropy(logits, read.ids[now + 1]).item(), abs=1e-4)


def test_errors_of_all_places_are_a_cache_that_adds(monkeypatch):
    monkeypatch.setattr(error_memory, "BLOCK", 7)
    read, held = read_of(1), read_of(2)
    found = with_places(read, held, 3, 4.0, 1.5)
    states, keys = (F.normalize(part.states, dim=-1) for part in (read, held))
    for now in range(39):
        added = torch.zeros(6)
        if now >= 3:
            added = 1.5 * (4.0 * keys[: now - 2] @ states[now]).softmax(-1) @ held.errors[: now - 2]
        logits = (read.states[now] + added) @ read.embeddings.T
        assert found[now].item() == pytest.approx(F.cross_entropy(logits, read.ids[now + 1]).item(), abs=1e-4)


def test_cells_stand_where_states_are():
    generator = torch.Generator().manual_seed(0)
    corners = F.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    states = 3.0 * (corners.repeat(50, 1) + 0.01 * torch.randn(200, 16, generator=generator))
    mean, cells = find_cells(states, 4, seed=1)
    torch.testing.assert_close(mean, F.normalize(states, dim=-1).mean(0))
    # What k-means ends at: a cell is where the states that are nearest to it are on the average, and has some.
    directions = F.normalize(F.normalize(states, dim=-1) - mean, dim=-1)
    nearest = (directions @ cells.T).argmax(1)
    for index, cell in enumerate(cells):
        torch.testing.assert_close(
            cell, F.normalize(directions[nearest == index].mean(0), dim=-1), rtol=1e-4, atol=1e-5
        )
    # Each cell is next to a corner; corners that share one are next to none of their own.
    closeness = F.normalize(F.normalize(corners, dim=-1) - mean, dim=-1) @ cells.T
    assert (closeness.amax(0) > 0.9).sum() >= 3
    torch.testing.assert_close(cells.norm(dim=-1), torch.ones(4))
    with pytest.raises(ValueError, match="cells=201: 200 states to find them in"):
        find_cells(states, 201)


def test_the_script_measures_errors_and_holds_them_to_the_losses(tmp_path):
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        (tmp_path / f"{name}.txt").write_text(prose(3000, seed), encoding="utf-8")
    output = tmp_path / "errors.md"
    options = ["--model", "tiny-llama", "--segment_length", "64", "--source", str(tmp_path), "--max_tokens", "400"]
    losses = script("text_cache").main([*options, "--errors", "true", "--cells", "16", "--output", str(output)])
    held = [f"closed, with errors of {whose}, {how}" for whose in TEXTS for how in ("all places", "16 cells")]
    assert list(losses) == ["closed", *held]
    assert all(len(part) == 3 for part in losses.values())
    # Nothing is held in the first segment, and then something is.
    for name in held:
        torch.testing.assert_close(losses[name][0][:64], losses["closed"][0][:64], rtol=1e-4, atol=1e-4)
        assert (losses[name][0][128:] - losses["closed"][0][128:]).abs().max() > 1e-3
    assert "errors of another text, 16 cells" in output.read_text(encoding="utf-8")
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["cell_gain"] == 2.0


TEXTS = ("the text", "another text")


def test_the_script_measures_the_text_and_another(tmp_path, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.txt").write_text(prose(3000, seed), encoding="utf-8")
    options = ["--source", str(tmp_path), "--max_tokens", "600"]
    output = tmp_path / "tables" / "cache.md"
    losses = script("text_cache").main([*options, "--output", str(output)])
    names = [way + more for way in ("memory", "closed") for more in ("", *(f", with {what}" for what in WHAT))]
    assert list(losses) == names
    rows = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["comparison"]
    own = torch.cat([part[64:] for part in losses["closed, with a cache of the text"]]).double().mean().item()
    assert rows[4]["way"] == "closed, with a cache of the text"
    assert rows[4]["perplexity"] == pytest.approx(math.exp(own))
    assert "| closed, with one of another text |" in output.read_text(encoding="utf-8")
    stock = script("text_cache").main(["--model", "tiny-llama", "--segment_length", "64", *options])
    assert list(stock) == names[3:]
    assert "position 64 on" in capsys.readouterr().out


WHAT = ("a cache of the text", "one of another text")


def test_what_cannot_be_measured_is_said_before_a_model_is_read(tmp_path):
    (tmp_path / "one.txt").write_text("Once.", encoding="utf-8")
    main = script("text_cache").main
    with pytest.raises(ValueError, match="holds 1 text; the control needs another"):
        main(["--source", str(tmp_path)])
    with pytest.raises(ValueError, match=r"cell_gain=0.0: must be above 0"):
        main(["--source", str(tmp_path), "--cell_gain", "0"])
    with pytest.raises(ValueError, match=r"cells=\[64, 0\]: 0 is no number of cells"):
        main(["--source", str(tmp_path), "--cells", "64", "0"])
    with pytest.raises(ValueError, match=r"part=1.5: must be between 0 and 1"):
        main(["--source", str(tmp_path), "--part", "1.5"])
    (tmp_path / "two.txt").write_text("Twice.", encoding="utf-8")
    with pytest.raises(ValueError, match="tokens of each text, and it takes 66 at least"):
        main(["--source", str(tmp_path)])
