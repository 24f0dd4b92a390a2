"""Passkeys in streams: exact lengths and places, questions under every control, and runs that go on."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from infini_hf import InfiniCache, InfiniConfig, patch_model, prefill
from infini_hf.cli.main import app
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.memory_rows import MemoryRows, MemoryRowStyle
from infini_hf.data.needles import GRASS, is_test_key
from infini_hf.evaluation import passkey
from infini_hf.evaluation.passkey import Haystacks, PasskeyCell, run_passkeys, swapped

PROSE = "".join(
    f"Chapter {n}. The house at the end of the lane had {n * 7} windows, and nobody lived there. " for n in range(200)
)
SEGMENT = 16


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROSE, GRASS, "What is the pass key? The pass key is 12345. Remember it."], vocab_size=320)


@pytest.fixture(scope="module")
def haystacks(tokenizer):
    return Haystacks(tokenizer, SEGMENT, [PROSE])


@pytest.mark.parametrize("kind", ["grass", "novel"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, "straddling"])
def test_a_stream_has_its_length_and_the_needle_at_its_depth(haystacks, tokenizer, kind, depth):
    places = set()
    for number in range(6):
        ids, key = haystacks.stream(PasskeyCell(kind, 1500, depth), number)
        assert len(ids) == 1500
        assert is_test_key(key)
        text = tokenizer.decode(ids)
        statement = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert text.count(statement) == 1
        needle = haystacks.encode(f"\n{statement}\n")
        start = next(i for i in range(len(ids)) if np.array_equal(ids[i : i + len(needle)], needle))
        places.add(start)
        header = len(haystacks.encode(passkey.PASSKEY_HEADER + "\n"))
        if depth == "straddling":
            boundary = -(-start // SEGMENT) * SEGMENT if start % SEGMENT else start + SEGMENT
            assert start < boundary < start + len(needle)
            assert abs(start - 750) < 200
        else:
            assert start == header + round(depth * (1500 - header - len(needle)))
    again, _ = haystacks.stream(PasskeyCell(kind, 1500, depth), 5)
    assert np.array_equal(again, ids)


def test_streams_longer_than_the_texts_go_on_with_them(haystacks):
    ids, _ = haystacks.stream(PasskeyCell("novel", 40_000, 0.5), 0)
    assert len(ids) == 40_000


def test_a_stream_too_short_for_its_needle_is_refused(haystacks, tokenizer):
    with pytest.raises(ValueError, match="a stream of 20 tokens has no room"):
        haystacks.stream(PasskeyCell("grass", 20, 0.5), 0)
    with pytest.raises(ValueError, match="haystack='novel': name a folder"):
        Haystacks(tokenizer, SEGMENT).stream(PasskeyCell("novel", 1000, 0.5), 0)


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.4, **shape)
    model = patch_model(LlamaForCausalLM(config).eval(), InfiniConfig(SEGMENT))
    for layer in model.model.layers:
        layer.self_attn.memory_gate.bias.data.fill_(1.0)
    return model


def test_each_control_asks_another_state(model, tokenizer, haystacks, monkeypatch):
    """What reaches the question: the memory, no memory through shut gates, and the memory of the row before."""
    met = []

    def note(asked, tokenizer, cache, question):
        gate = asked.model.layers[0].self_attn.memory_gate.bias[0].item()
        met.append((gate, cache.infini_layers[0].memory.clone(), cache.infini_layers[0].keys.clone()))
        return "0"

    monkeypatch.setattr(passkey, "ask", note)
    cell = PasskeyCell("grass", 200, 0.5)
    samples = passkey.ask_batch(model, tokenizer, cell, [0, 1], haystacks, passkey.CONTROLS, progress=False)
    assert [(s.number, s.control) for s in samples] == [(n, c) for n in (0, 1) for c in passkey.CONTROLS]
    alone = []
    for number in (0, 1):
        ids = torch.from_numpy(haystacks.stream(cell, number)[0])[None]
        alone.append(prefill(model, ids, cache=InfiniCache(model.config)).infini_layers[0])
    for row in (0, 1):
        for control, (gate, memory, keys) in enumerate(met[3 * row : 3 * row + 3]):
            assert gate == (0.0 if passkey.CONTROLS[control] == "closed" else 1.0)
            expected = alone[1 - row if passkey.CONTROLS[control] == "other" else row].memory
            torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(keys, alone[row].keys, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0].memory, alone[1].memory, rtol=1e-2)


def test_swapping_a_memory_leaves_both_caches_alone(model):
    one, two = (prefill(model, torch.randint(0, 300, (1, 40)), cache=InfiniCache(model.config)) for _ in range(2))
    before = one.infini_layers[0].memory
    assert swapped(one, two).infini_layers[0].memory is two.infini_layers[0].memory
    assert one.infini_layers[0].memory is before


def test_a_run_goes_on_where_it_was_cut(model, tokenizer, haystacks, tmp_path, monkeypatch):
    cells = [PasskeyCell("grass", 200, depth) for depth in (0.0, "straddling")]
    whole = run_passkeys(model, tokenizer, cells, 3, haystacks, tmp_path / "a.jsonl", batch_size=3, progress=False)
    assert len(whole) == 2 * 3 * 3
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert all(
        json.loads(line)["correct"] == (json.loads(line)["expected"] == json.loads(line)["answered"]) for line in lines
    )
    # The last cell is gone, but for a line that a kill cut short.
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:9]) + "\n" + lines[9][:20] + "\n")
    read = []
    original = passkey.ask_batch
    monkeypatch.setattr(
        passkey, "ask_batch", lambda *args, **kwargs: read.append(args[2]) or original(*args, **kwargs)
    )
    again = run_passkeys(model, tokenizer, cells, 3, haystacks, tmp_path / "b.jsonl", batch_size=3, progress=False)
    assert read == cells[1:]
    assert sorted(map(str, again)) == sorted(map(str, whole))
    table = "\n".join(passkey.passkey_table(again))
    assert table.count("| grass | 200 |") == 3
    assert "of 6" in table


def test_the_command_writes_its_samples_and_prints_the_table(tmp_path):
    arguments = ["passkey", "tiny-llama", "--lengths", "300", "--depths", "0.5,straddling", "--samples", "2"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "p.jsonl"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2 * 2 * 3
    assert "| grass | 300 | memory |" in done.output
    for option, value in (("--depths", "2"), ("--depths", "deep"), ("--lengths", "4q")):
        refused = CliRunner().invoke(app, [*arguments, option, value])
        assert isinstance(refused.exception, ValueError)
        assert option in str(refused.exception)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_memory_rows_are_whole_segments_that_end_with_the_answers(tokenizer, fraction):
    style = MemoryRowStyle(
        least_segments=8, most_segments=20, passkey_fraction=fraction, rows_alike=4, answer_weight=3.0
    )
    rows = MemoryRows([PROSE], tokenizer, 40, 32, style)
    lengths = []
    for index in range(40):
        row = rows[index]
        length = len(row["input_ids"])
        lengths.append(length)
        assert length % 32 == 0
        assert 8 * 32 <= length <= 20 * 32
        assert torch.equal(row["labels"], row["input_ids"])
        marked = row["loss_weights"] > 1
        text, answers = tokenizer.decode(row["input_ids"]), tokenizer.decode(row["input_ids"][marked]).split()
        assert answers
        for answer in answers:
            assert text.count(answer) >= (3 if fraction else 2), (answer, text)
        # All answers together count `answer_weight` times the whole row beside it.
        assert (row["loss_weights"] - 1).sum().item() == pytest.approx(3.0 * length, rel=1e-4)
        assert torch.equal(row["input_ids"], rows[index]["input_ids"])
    groups = [set(lengths[start : start + 4]) for start in range(0, 40, 4)]
    assert all(len(group) == 1 for group in groups)
    assert len(set(lengths)) > 3
