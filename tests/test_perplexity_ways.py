"""Ways to read, each against the stock model with a window of its own, and the script that measures them."""

import importlib.util
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from models import build, build_patched, gate_parameters, random_ids
from torch.nn import functional as F
from transformers import AutoTokenizer

from infini_hf import InfiniConfig, patch_model, prefill, score
from infini_hf.assets import resolve
from infini_hf.data.documents import load_documents
from infini_hf.data.local_parts import held_out_split
from infini_hf.evaluation import ways
from infini_hf.evaluation.ways import OPTIONS, Way, losses_of_texts, stock

ROOT = Path(__file__).parent.parent
LENGTH = 8
# An odd number of tokens, in no segment's or window's measure.
IDS = random_ids(1, 43)


def patched_model(family="llama", **options):
    return build_patched(family, segment_length=LENGTH, **{"overlap": 3, "sink_tokens": 2, **options})


def read_as(model, text, ids=IDS, *others):
    """The losses of one text in a way that is named."""
    return losses_of_texts(model, Way.parse(text), [ids, *others], progress=False)[0]


def fresh(family="llama", **options):
    """The scores of the base weights under a patch whose gates are still shut."""
    return score(patch_model(build(family), InfiniConfig(LENGTH, **options)), IDS)[0]


def loss_of(model, context, target):
    """What the last of a context's predictions costs, by the stock model."""
    with torch.no_grad():
        logits = model(context, use_cache=False).logits[0, -1].double()
    return F.cross_entropy(logits[None], target.view(1)).item()


def close(actual, expected):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=1e-4, atol=1e-4)


# The patch stays on.


def test_the_memory_is_that_of_score():
    model = patched_model()
    assert torch.equal(read_as(model, "memory"), score(model, IDS)[0])
    assert not torch.allclose(read_as(model, "memory")[LENGTH:], read_as(model, "closed")[LENGTH:], atol=1e-2)


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
@pytest.mark.parametrize(
    ("way", "window"),
    [
        ("closed", {"overlap": 3, "sink_tokens": 2}),
        ("closed:overlap=5", {"overlap": 5, "sink_tokens": 2}),
        ("hard", {}),
        ("overlap:overlap=5:sinks=1", {"overlap": 5, "sink_tokens": 1}),
        ("overlap:overlap=0:sinks=1", {"overlap": 0, "sink_tokens": 1}),
        ("txl", {"overlap": LENGTH}),
    ],
)
def test_with_the_gates_shut_it_is_a_fresh_patch_of_that_window(gate, way, window):
    close(read_as(patched_model(gate=gate), way), fresh(**window))


def test_hard_segments_are_blocks_of_the_stock_model():
    model, expected = build(), []
    for length in (LENGTH, 16):
        expected = [
            loss_of(model, IDS[:, place // length * length : place + 1], IDS[0, place + 1])
            for place in range(IDS.shape[1] - 1)
        ]
        close(read_as(patched_model(), f"hard:segment={length}"), expected)


def test_the_memory_reads_under_another_window_too():
    other = build_patched(segment_length=16, overlap=4, sink_tokens=1)
    assert torch.equal(read_as(patched_model(), "memory:segment=16:overlap=4:sinks=1"), score(other, IDS)[0])


# The memory of another text.


def test_with_its_own_memory_lent_a_text_is_read_as_ever():
    model = patched_model()
    close(read_as(model, "other", IDS, IDS), score(model, IDS)[0])


def test_every_segment_meets_the_memory_of_the_other_text_after_as_many():
    model, other = patched_model(overlap=0, sink_tokens=0), random_ids(1, 60, seed=7)
    expected = []
    for start in range(0, IDS.shape[1] - 1, LENGTH):
        # Between segments there is nothing but the memory, so that another text's cache can be read on with.
        cache = prefill(model, other[:, :start], progress=False) if start else None
        expected.append(score(model, IDS[:, start : start + LENGTH + 1], cache=cache)[0, :LENGTH])
    actual = losses_of_texts(model, Way.parse("other"), [IDS, other], progress=False)
    close(actual[0], torch.cat(expected))
    assert actual[1].shape == (59,)
    # The texts are each other's, and the first segment has no memory yet.
    close(actual[0][:LENGTH], score(model, IDS)[0, :LENGTH])
    assert (actual[0] - score(model, IDS)[0])[LENGTH:].abs().max() > 1e-2


def test_the_last_memory_of_a_shorter_text_stays():
    model, short = patched_model(overlap=0, sink_tokens=0), random_ids(1, 12, seed=7)
    actual = read_as(model, "other", IDS, short)
    cache = prefill(model, short, progress=False)
    # Twelve tokens are a segment that is written and an open one, which nobody else can read.
    memory = [layer.memory for layer in cache.infini_layers.values()]
    alone = prefill(model, short[:, :LENGTH], progress=False)
    assert all(map(torch.equal, memory, (layer.memory for layer in alone.infini_layers.values())))
    expected = score(model, IDS[:, 24:33], cache=alone)[0, :LENGTH]
    close(actual[24:32], expected)


@pytest.mark.parametrize("others", [[], [5], [LENGTH - 1, 3]])
def test_a_text_without_another_of_a_segment_is_refused(others):
    with pytest.raises(ValueError, match=f"of {1 + len(others)} none other has the {LENGTH} tokens"):
        read_as(patched_model(), "other", IDS, *(random_ids(1, count) for count in others))


@pytest.mark.parametrize(("segment", "length"), [(16, LENGTH + 2), (4, 3)])
def test_who_lends_a_memory_is_decided_by_the_window_of_the_way(segment, length):
    """A text with a segment of the patch and none of the way lent an empty memory, without a word."""
    model = patched_model()
    with pytest.raises(ValueError, match=f"none other has the {segment} tokens"):
        read_as(model, f"other:segment={segment}:overlap=2", IDS, random_ids(1, length))


def test_a_segment_of_the_way_is_enough_to_lend_a_memory():
    model = patched_model()
    actual = read_as(model, "other:segment=4:overlap=2:sinks=1", IDS, random_ids(1, 5, seed=7))
    assert actual.isfinite().all()
    assert not torch.allclose(actual[4:], read_as(model, "closed:segment=4:overlap=2:sinks=1")[4:], atol=1e-2)


def test_a_text_too_short_for_a_memory_lends_none():
    model, other = patched_model(), random_ids(1, 60, seed=7)
    actual = read_as(model, "other", IDS, other, random_ids(1, LENGTH - 1))
    close(actual[0], read_as(model, "other", IDS, other)[0])


# Full attention of the stock model.


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(("window", "stride"), [(10, 5), (10, 3), (12, 12), (7, 1), (100, 50)])
def test_full_attention_slides_and_every_token_is_counted_once(family, window, stride):
    total, stock_model, expected = IDS.shape[1] - 1, build(family), []
    for place in range(total):
        steps = max(0, math.ceil((place + 1 - window) / stride))
        end = min(total, window + steps * stride)
        start = max(0, end - window)
        assert start == 0 or place + 1 - start >= min(window - stride, place)
        expected.append(loss_of(stock_model, IDS[:, start : place + 1], IDS[0, place + 1]))
    close(read_as(patched_model(family), f"full:window={window}:stride={stride}"), expected)


@pytest.mark.parametrize(("window", "stride"), [(10, 5), (10, 3), (12, 12), (7, 1), (2, 1), (1, 1), (100, 50)])
def test_a_beginning_of_text_stays_in_front_of_every_window(window, stride):
    total, stock_model, expected = IDS.shape[1] - 1, build(), []
    begun = torch.cat([torch.tensor([[stock_model.config.bos_token_id]]), IDS[:, 1:]], dim=1)
    for place in range(total):
        steps = max(0, math.ceil((place + 1 - window) / stride))
        end = min(total, window + steps * stride)
        # It takes the place of the oldest token; where every token of a window counts, it comes on top.
        oldest = min(end - window + 1, window + (steps - 1) * stride)
        kept = range(oldest if steps else 1, place + 1)
        assert len(kept) + 1 >= min(window - stride, place)
        expected.append(loss_of(stock_model, begun[:, [0, *kept]], begun[0, place + 1]))
    close(read_as(patched_model(), f"full:window={window}:stride={stride}", begun), expected)


def test_logits_are_made_some_positions_at_a_time(monkeypatch):
    model, made = patched_model("gemma2"), []
    expected = read_as(model, "full_past")
    monkeypatch.setattr(ways, "PIECE", 5)
    model.get_output_embeddings().register_forward_hook(lambda *call: made.append(len(call[-1])))
    close(read_as(model, "full_past"), expected)
    assert made == [5] * 8 + [2]


def test_what_nobody_named_is_no_longer_than_machines_can_take():
    model = build_patched(segment_length=LENGTH, overrides={"max_position_embeddings": 131_072})
    assert Way.parse("full").slide(model.config) == (8192, 4096, None)
    assert Way.parse("full:window=131072").slide(model.config) == (131_072, 65_536, None)
    with pytest.raises(ValueError, match="prefix would be 524,288 tokens in one forward; name it, as in full_past:le"):
        read_as(model, "full_past")
    assert len(read_as(model, "full_past:length=20")) == 20


def test_its_window_is_that_of_training_and_its_stride_half_of_it():
    model = build_patched(segment_length=LENGTH, overrides={"max_position_embeddings": 10})
    assert torch.equal(read_as(model, "full"), read_as(model, "full:window=10:stride=5"))
    assert len(read_as(model, "full_past")) == 40


def test_past_its_window_full_attention_is_one_prefix():
    stock_model, model = build(), patched_model()
    with torch.no_grad():
        logits = stock_model(IDS[:, :30], use_cache=False).logits[0]
    close(read_as(model, "full_past:length=30"), F.cross_entropy(logits, IDS[0, 1:31], reduction="none"))
    assert len(read_as(model, "full_past:length=400")) == IDS.shape[1] - 1


# What holds for all.


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_after_every_way_the_model_is_what_it_was(gate, caplog):
    model = patched_model(gate=gate)
    caplog.set_level(logging.INFO, logger="infini_hf")
    before, gates, patch = score(model, IDS), gate_parameters(model), dict(model.config.infini_attention)
    config = model.config
    for name in OPTIONS:
        losses_of_texts(model, Way.parse({"overlap": "overlap:sinks=1"}.get(name, name)), [IDS, IDS], progress=False)
        assert torch.equal(score(model, IDS), before), name
    # Nothing is said of a patch that was there before.
    assert not caplog.records
    with pytest.raises(KeyError, match="inside"), stock(model):
        raise KeyError("inside")
    assert torch.equal(score(model, IDS), before)
    assert all(parameter is gates[name] for name, parameter in gate_parameters(model).items())
    assert model.config.infini_attention == patch
    # The very object: a trainer's lanes and caches hold it.
    assert all(part.config is config for part in model.modules() if "config" in vars(part))


def test_a_calibrated_memory_comes_back_calibrated():
    model = patched_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        queries, keys = torch.randn(6, 8), torch.randn(3, 8)
        attention.memory_gate.set_shifts(queries, keys)
    before = score(model, IDS)
    read_as(model, "full")
    assert torch.equal(score(model, IDS), before)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("way", ["memory", "hard", "other", "full", "full_past"])
def test_short_texts_have_as_many_losses_as_tokens_to_predict(way, length):
    assert len(read_as(patched_model(), way, IDS[:, :length], IDS, IDS)) == length - 1


def test_inside_the_first_segment_all_ways_agree():
    model = patched_model()
    for way in ("closed", "hard", "txl", "full", "full_past", "overlap:sinks=1"):
        close(read_as(model, way)[:LENGTH], read_as(model, "memory")[:LENGTH])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local", "'local': must be one of memory, closed, hard"),
        ("hard:overlap=4", "'overlap=4' is no option of 'hard'; it takes segment=TOKENS"),
        ("closed:segment", "'segment' is no option"),
        ("full:window=-4", "'window=-4' is no option"),
        ("full:stride=0", "at least 1"),
        ("full:window=²", "'window=²' is no option"),
        ("overlap", "name the overlap or the sinks, as in overlap:overlap=128"),
    ],
)
def test_a_way_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Way.parse(text)


def test_a_window_that_is_none_is_refused():
    model = patched_model()
    with pytest.raises(ValueError, match="overlap=9: must be at most segment_length=8"):
        read_as(model, "overlap:overlap=9")
    with pytest.raises(ValueError, match="a stride of 20 passes over tokens; at most window=10"):
        read_as(model, "full:window=10:stride=20")


# The script.


def script(name="evaluate"):
    spec = importlib.util.spec_from_file_location(f"script_{name}_ways", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_texts(folder, words=(200, 300)):
    for number, count in enumerate(words):
        text = " ".join(f"The river {'rose' if place % 3 else 'fell'} again." for place in range(count // 4 + number))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def test_the_script_reads_in_the_ways_that_are_named(tmp_path):
    (tmp_path / "novels").mkdir()
    write_texts(tmp_path / "novels")
    output = tmp_path / "out" / "ways.md"
    ways = [
        "memory",
        "closed:overlap=0",
        "hard:segment=32",
        "other",
        "full:window=64:stride=16",
        "full_past:length=80",
    ]
    options = ["--source", tmp_path / "novels", "--segment_length", 64, "--dtype", "float32", "--device", "cpu"]
    # The first edge is the model's segment.
    options += ["--overlap", 8, "--output", output, "--ways", *ways]
    figure = ["--figure_ways", "memory", "full_past:length=80"] if importlib.util.find_spec("matplotlib") else []
    numbers = script().main(list(map(str, [*options, *figure])))
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == numbers
    assert list(numbers["losses"]) == ways
    assert numbers["edges"][:4] == [0, 64, 80, 128]
    past = numbers["losses"]["full_past:length=80"]
    assert None not in past[:2]
    assert set(past[2:]) == {None}
    assert numbers["beyond"] == 64
    rows = {row["way"]: row for row in numbers["comparison"]}
    # Roles go to whatever options a way has; gates that are still shut have a memory that says nothing.
    assert rows["closed:overlap=0"]["ratio"] is None
    assert rows["memory"]["perplexity"] == pytest.approx(rows["other"]["perplexity"], rel=1e-5)
    means = numbers["documents"]["memory"]
    assert len(means) == 2
    assert "ratio to closed:overlap=0" in output.read_text(encoding="utf-8")
    assert "Beyond the first segment: memory" in output.read_text(encoding="utf-8")
    if figure:
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    later = [*options[: options.index("--output")], "--output", tmp_path / "later.md", "--ways", "closed"]
    assert script().main(list(map(str, [*later, "--beyond", 100])))["beyond"] == 100
    assert "\nBeyond the first 100 tokens (position 100 on, " in (tmp_path / "later.md").read_text(encoding="utf-8")
    # Of two ways with the gates shut the plain one is the control.
    plain = [*options[: options.index("--output")], "--ways", "memory", "closed:overlap=0", "closed"]
    rows = {row["way"]: row for row in script().main(list(map(str, plain)))["comparison"]}
    assert rows["closed"]["ratio"] is None
    assert rows["closed:overlap=0"]["ratio"] > 1


def test_the_script_holds_a_model_against_another(tmp_path, monkeypatch):
    (tmp_path / "novels").mkdir()
    write_texts(tmp_path / "novels")
    options = ["--source", tmp_path / "novels", "--segment_length", 64, "--dtype", "float32", "--device", "cpu"]
    control, output = tmp_path / "control.md", tmp_path / "model.md"
    module = script()
    main = module.main
    main(list(map(str, [*options, "--ways", "closed", "--output", control])))
    options += ["--control", control.with_suffix(".json"), "--output", output]
    ways = ["--ways", "memory", "hard:segment=32", "full_past:length=80"]
    # Gates at zero: the same as the control, and smaller blocks are worse.
    ratios = main(list(map(str, [*options, "--overlap", 0, *ways])))["control"]["ratios"]
    assert list(ratios) == ["memory", "hard:segment=32"]
    assert ratios["memory"][0] == pytest.approx(1.0, abs=1e-6)
    assert ratios["hard:segment=32"][0] > 1.01
    assert "| memory | 1.0000 (1.0000 to 1.0000) |" in output.read_text(encoding="utf-8")
    # As many texts of as many words.
    (tmp_path / "others").mkdir()
    for path in (tmp_path / "novels").iterdir():
        text = path.read_text(encoding="utf-8").replace("fell", "sank")
        (tmp_path / "others" / path.name).write_text(text, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(module, "losses_of_texts", None)
        with pytest.raises(ValueError, match=r"with texts=(\w{16}), and this would be with texts=(?!\1)\w{16}: "):
            main(list(map(str, [*options, "--source", tmp_path / "others"])))
    # Before a text is read.
    monkeypatch.setattr(module, "texts_of", None)
    with pytest.raises(
        ValueError, match="control: was measured with max_tokens=None, and this would be with max_tokens=100"
    ):
        main(list(map(str, [*options, "--max_tokens", 100])))
    control.write_text("no JSON", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON of an evaluation with the way closed"):
        main(list(map(str, [*options, "--control", control])))


def test_a_text_without_another_is_refused_before_any_is_read(tmp_path, monkeypatch):
    (tmp_path / "novels").mkdir()
    write_texts(tmp_path / "novels", words=(200,))
    module, read = script(), []
    monkeypatch.setattr(module, "losses_of_texts", lambda *args: read.append(args))
    options = ["--source", tmp_path / "novels", "--segment_length", 64, "--device", "cpu"]
    with pytest.raises(ValueError, match="way 'other': reads text 0 with the memory of another"):
        module.main(list(map(str, [*options, "--ways", "memory", "other"])))
    assert not read


def test_texts_that_are_nowhere_are_refused_before_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("infini_hf.cli.script_arguments.ModelArguments.load", None)
    with pytest.raises(ValueError, match="source 'NOVELS/validation': there is no such file or folder"):
        script().main(["--model", "tiny-llama", "--source", "NOVELS/validation"])


def test_the_script_measures_the_part_that_was_held_out(tmp_path):
    for part, word in (("train", "rose"), ("validation", "fell")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.txt").write_text(f"The river {word}.", encoding="utf-8")
    assert held_out_split(tmp_path) == "validation"
    assert held_out_split(tmp_path / "train") == held_out_split(tmp_path / "train" / "0.txt") == "train"
    for number, names in enumerate((("train.jsonl", "dev.jsonl"), ("data/train.jsonl", "data/validation.jsonl"))):
        for name in names:
            path = tmp_path / f"lines{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
        folder = tmp_path / f"lines{number}"
        (text,) = load_documents(folder, held_out_split(folder))
        assert text["text"] == names[1]
    (folder / "data" / "validation.jsonl").rename(folder / "data" / "validation.log")
    with pytest.raises(ValueError, match=r"lines1': cannot be read as one dataset .*; name the file or folder"):
        held_out_split(folder)
    module, tokenizer = script(), AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    (ids,) = module.texts_of(tokenizer, module.EvaluationArguments(source=str(tmp_path)))
    assert "fell" in tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "memory", "mem"], "way 'mem': must be one of"),
        (["--figure_ways", "hard", "--output", "out.md"], r"figure_ways: \['hard'\] are not among"),
        (["--figure", "true"], "figure: name an output"),
        (["--model", "tiny-llama", "--segment_length", "64", "--ways", "overlap:overlap=65"], "overlap=65"),
        (["--first_edge", "0"], "first_edge=0: must be at least 1"),
        (["--max_tokens", "-5"], "max_tokens=-5: must be at least 2"),
        (["--device", "nonsense", "--split", "train"], "--device nonsense: is not to be had here"),
        (["--output", "."], "output='.': is a folder"),
        (["--output", "out.json"], "output='out.json': a .json file is written beside the output"),
    ],
)
def test_the_script_refuses_before_it_reads(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        script().main(["--source", str(tmp_path / "nothing"), *options])


def test_figures_are_drawn_again_from_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    edges, losses = [0, 64, 128], {"memory": [3.0, 2.0], "closed": [3.0, 2.1], "other": [3.0, 2.2]}
    numbers = {"edges": edges, "losses": losses, "tokens": [64, 64], "texts": "a", "beyond": 64}
    control = numbers | {"losses": {"closed": [3.0, 2.05]}}
    paths = {name: tmp_path / f"{name}.json" for name in ("numbers", "control", "others", "open", "none")}
    for name, content in {
        "numbers": numbers,
        "control": control,
        "others": control | {"texts": "b"},
        "open": numbers | {"losses": {"memory": [3.0, 2.0]}},
        "none": [1],
    }.items():
        paths[name].write_text(json.dumps(content), encoding="utf-8")
    draw, given = script("plot_perplexity").main, ["--numbers", str(paths["numbers"])]
    drawn = tmp_path / "out" / "drawn.png"
    draw([*given, "--control", str(paths["control"]), "--ways", "memory", "other", "--output", str(drawn)])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    draw(given)
    assert paths["numbers"].with_suffix(".png").read_bytes() != drawn.read_bytes()
    # Without a memory that is closed there is nothing to compare with, and a picture all the same.
    draw(["--numbers", str(paths["open"])])
    assert paths["open"].with_suffix(".png").is_file()
    for options, message in (
        (["--numbers", str(paths["none"])], "none.json: is no JSON of an evaluation of perplexity"),
        (["--numbers", str(tmp_path / "missing.json")], "numbers"),
        ([*given, "--ways", "hard"], "numbers.json: has no hard, but memory, closed, other"),
        ([*given, "--control", str(paths["open"])], "open.json: has no closed, but memory"),
        ([*given, "--control", str(paths["others"])], "others.json: its texts are b, and .*numbers.json has a"),
        ([*given, "--output", str(tmp_path / "none.json" / "a.png")], "is no folder; name a file elsewhere"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            draw(options)
