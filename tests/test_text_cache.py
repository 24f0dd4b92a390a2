"""A cache of a text's hidden states against loops, and the script that measures with it."""

import json
import math

import pytest
import torch
from models import build_patched, random_ids
from test_scripts import prose, script

from infini_hf import score
from infini_hf.evaluation import text_cache
from infini_hf.evaluation.text_cache import cache_shares, read_states, with_cache


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("own", [True, False])
def test_shares_are_those_of_every_place_worked_out_one_by_one(window, own, monkeypatch):
    monkeypatch.setattr(text_cache, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    states, others = (torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=-1) for _ in "ab")
    ids, other_ids = (torch.randint(0, 5, (40,), generator=generator) for _ in "ab")
    held, held_ids = (states, ids) if own else (others, other_ids)
    found = cache_shares(states, ids, held, held_ids, window, 3.0)
    assert found.shape == (39,)
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
    torch.testing.assert_close(states, torch.nn.functional.normalize(whole, dim=-1), rtol=1e-4, atol=1e-5)


def test_a_mixture_counts_only_where_the_cache_holds_something():
    losses, shares = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([math.nan, 0.0, 0.5])
    mixed = [1.0, -math.log(0.9 * math.exp(-2.0)), -math.log(0.9 * math.exp(-3.0) + 0.05)]
    assert with_cache(losses, shares, 0.1).tolist() == pytest.approx(mixed)


def test_the_script_measures_the_text_and_another(tmp_path, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.txt").write_text(prose(3000, seed), encoding="utf-8")
    options = ["--source", str(tmp_path), "--max_tokens", "600"]
    output = tmp_path / "tables" / "cache.md"
    losses = script("text_cache").main([*options, "--output", str(output)])
    names = [way + more for way in ("memory", "closed") for more in ("", *(f", with {what}" for what in WHAT))]
    assert list(losses) == names
    rows = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["comparison"]
    own = torch.cat([part[128:] for part in losses["closed, with a cache of the text"]]).double().mean().item()
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
    with pytest.raises(ValueError, match=r"part=1.5: must be between 0 and 1"):
        main(["--source", str(tmp_path), "--part", "1.5"])
    (tmp_path / "two.txt").write_text("Twice.", encoding="utf-8")
    with pytest.raises(ValueError, match="tokens of each text, and it takes 130 at least"):
        main(["--source", str(tmp_path)])
