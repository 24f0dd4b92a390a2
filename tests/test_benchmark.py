"""The benchmark measures what its names say, in turns, once, and says what it leaves out."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_hf.evaluation.benchmark import runner
from infini_hf.evaluation.benchmark.contender import Missing
from infini_hf.evaluation.benchmark.contenders import check_contenders, make_contender, parse_contender
from infini_hf.evaluation.benchmark.peaks import measure_here, peak_of
from infini_hf.evaluation.benchmark.results import Cell, ResultFile
from infini_hf.evaluation.benchmark.runner import Benchmark
from infini_hf.evaluation.benchmark.settings import MEASURES, BenchmarkSettings

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "eval" / "benchmark_tiny_cpu.yaml"
SMALL = {
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "intermediate": 64,
    "vocab_size": 64,
    "segment_length": 16,
    "device": "cpu",
    "repeats": 2,
    "warmup_tokens": 16,
    "new_tokens": 2,
    "piece_tokens": 32,
}
CONDITIONS = {"machine": "a test"}


def small(**values):
    return BenchmarkSettings(**(SMALL | values))


def measured(settings, path=None):
    """The results of a benchmark, which go on in the file of a path."""
    results = ResultFile(path, CONDITIONS)
    Benchmark(settings, results, progress=False).run()
    return results


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("script_benchmark", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_contender(monkeypatch):
    """Fails a test that builds anything."""

    def refuse(*_):
        raise AssertionError("a contender was built")

    monkeypatch.setattr(runner, "make_contender", refuse)


# From the config to the files.


def test_the_tiny_config_measures_everything_and_writes_all_files(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "peak_of", measure_here)
    output = tmp_path / "speed.md"
    results = script.main(["--config", str(TINY), "--output", str(output)])
    text, settings = output.read_text(encoding="utf-8"), results.runs
    assert {run.measure for run in settings} == {*MEASURES, "machine"} - {"training_memory"}
    for measure in ("prefill", "decode", "training"):
        assert len(results.of(Cell(measure, "infini", 128))) == 2
    assert f"--config {TINY}" in text
    assert f"torch {torch.__version__}" in text
    assert "| prefill, `infini` / `blocks` |" in text
    assert output.with_suffix(".csv").is_file()
    if importlib.util.find_spec("matplotlib"):
        drawn = {path.name for path in tmp_path.glob("*.png")}
        assert drawn == {f"speed_{name}.png" for name in ("prefill", "read_on", "decode")}
    assert str(output) in capsys.readouterr().out


def test_arithmetic_is_printed_and_nothing_is_measured(script, no_contender, capsys):
    assert script.main(["--config", str(TINY), "--arithmetic"]) is None
    printed = capsys.readouterr().out
    assert "## 2 layers of width 64, segments of 32, 4 bytes a number" in printed
    assert "## Llama-3-8B, segments of 32, 2 bytes a number" in printed


def test_unknown_options_are_refused_by_name(script, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("segment_lenght: 32\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'segment_lenght' \(did you mean segment_length"):
        script.main(["--config", str(file)])
    with pytest.raises(ValueError, match="nothing to measure"):
        script.main([])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefill": ["blocs"]}, "'blocs' is no contender; there are blocks, infini"),
        ({"prefill": ["infini:overlab=3"]}, "'overlab=3' is no option; infini takes .*overlap"),
        ({"prefill": ["infini:overlap=x"]}, "overlap='x': must be a whole number"),
        ({"training": ["blocks:recompute=yes"]}, "recompute='yes': must be true or false"),
        ({"training": ["window"]}, "training: 'window' takes no part in it"),
        ({"prefill": ["full", "full"]}, "'full' is named twice"),
    ],
)
def test_contenders_that_are_none_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_contenders(small(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefill_tokens": [24]}, "prefill_tokens: 24 is not a multiple of segment_length=16"),
        ({"repeats": 0}, "repeats=0: must be at least 1"),
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"only": ["speed"]}, r"only: \['speed'\] are no measures"),
        ({"dtype": "float"}, "dtype='float': must be one of"),
        ({"clock": "sun"}, "clock='sun': must be wall, or processor"),
        (
            {"clock": "processor", "device": "cuda"},
            "clock='processor': must be wall, or processor where device is cpu",
        ),
    ],
)
def test_settings_that_are_wrong_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        small(**values)


@pytest.mark.parametrize("text", ["infini:order=rows", "infini:loop=fast", "quantized:backend=zip"])
def test_words_that_an_option_does_not_know_are_refused(text):
    with pytest.raises(ValueError, match="must be"):
        make_contender(text, small())


# What is run, and how often.


def test_a_second_call_measures_nothing_again(tmp_path, no_contender, monkeypatch):
    path = tmp_path / "runs.csv"
    settings = small(prefill=["blocks", "infini"], prefill_tokens=[32], decode=["infini"], decode_tokens=[32])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "make_contender", make_contender)
        first = measured(settings, path)
    before = path.read_text(encoding="utf-8")
    again = measured(settings, path)
    assert path.read_text(encoding="utf-8") == before
    assert again.runs == first.runs


def test_an_interrupted_benchmark_goes_on_with_the_runs_that_are_missing(tmp_path):
    path = tmp_path / "runs.csv"
    settings = small(prefill=["blocks", "infini"], prefill_tokens=[32, 64])
    whole = [run for run in measured(settings, path).runs if run.measure == "prefill"]
    lines = path.read_text(encoding="utf-8").splitlines()
    # The last line was cut off in the middle.
    path.write_text("\n".join([*lines[:-3], lines[-3][:9]]) + "\n", encoding="utf-8")
    gone_on = [run for run in measured(settings, path).runs if run.measure == "prefill"]
    assert sorted(map(str, {run.cell for run in gone_on})) == sorted(map(str, {run.cell for run in whole}))
    assert len(gone_on) == len(whole) == 8
    assert {run.session for run in gone_on} == {1, 2}


def test_results_of_other_conditions_are_not_mixed(tmp_path):
    path = tmp_path / "runs.csv"
    measured(small(prefill=["blocks"], prefill_tokens=[16]), path)
    with pytest.raises(ValueError, match=r"machine 'a test' there, 'another' here\); name another output"):
        ResultFile(path, {"machine": "another"})


def test_contenders_take_turns_in_both_directions(monkeypatch):
    order = []

    def timed(self, job, tokens):
        order.append(job.cell.contender)
        return {"seconds": 0.001, "processor": 0.001}

    monkeypatch.setattr(Benchmark, "timed", timed)
    measured(small(prefill=["blocks", "infini", "full"], prefill_tokens=[16], repeats=3))
    # Two runs of each to warm up, then there, back and there again.
    there = ["blocks", "infini", "full"]
    assert order == [*(name for name in there for _ in range(2)), *there, *reversed(there), *there]


def test_a_cell_that_would_take_too_long_is_left_out_by_name(monkeypatch):
    """Full attention is quadratic: what it took for 64 tokens says what 4,096 would take."""
    seconds = {16: 1.0, 64: 4.0, 4096: 256.0}
    monkeypatch.setattr(
        Benchmark, "timed", lambda self, job, tokens: dict.fromkeys(("seconds", "processor"), seconds[tokens])
    )
    settings = small(prefill=["infini", "full"], prefill_tokens=[64, 4096], most_seconds=300.0, cell_seconds=9.0)
    results = measured(settings)
    assert [len(results.of(Cell("prefill", "infini", tokens))) for tokens in (64, 4096)] == [2, 1]
    full = Cell("prefill", "full", 4096)
    assert not results.of(full)
    assert results.note(full).startswith("would take about ")
    assert results.note(full).endswith(" s, most_seconds=300")


def test_a_context_that_takes_too_much_memory_is_left_out_by_name():
    results = measured(small(decode=["full", "infini"], decode_tokens=[64], most_gib=1e-6))
    assert "GiB of keys and values, most_gib=1e-06" in results.note(Cell("decode", "full", 64))
    assert results.of(Cell("decode", "infini", 64))


def test_a_contender_without_its_package_is_left_out_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "infini_transformer_pytorch", None)
    results = measured(small(prefill=["package", "infini"], prefill_tokens=[16]))
    note = "infini-transformer-pytorch is not installed (pip install infini-transformer-pytorch)"
    assert results.note(Cell("prefill", "package", 16)) == note
    assert results.of(Cell("prefill", "infini", 16))
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(Missing, match="hqq is not installed"):
        make_contender("quantized:backend=hqq", small())


def test_a_contender_that_does_not_fit_is_left_out_and_the_others_go_on(monkeypatch):
    timed = Benchmark.timed

    def fail(self, job, tokens):
        if job.cell.contender == "full":
            raise torch.OutOfMemoryError
        return timed(self, job, tokens)

    monkeypatch.setattr(Benchmark, "timed", fail)
    results = measured(small(prefill=["full", "blocks"], prefill_tokens=[16]))
    assert results.note(Cell("prefill", "full", 16)) == "out of memory"
    assert len(results.of(Cell("prefill", "blocks", 16))) == 2


def test_a_context_is_read_once_for_all_that_go_on_from_it(monkeypatch):
    contender = parse_contender("infini")[0]
    read = []
    kind = type(make_contender(contender, small()))
    after = kind.after
    monkeypatch.setattr(
        kind, "after", lambda self, tokens, state=None: read.append(tokens) or after(self, tokens, state)
    )
    settings = small(
        read_on=["infini"],
        read_on_tokens=[32, 64],
        decode=["infini", "infini:loop=forward"],
        decode_tokens=[32, 64],
    )
    measured(settings)
    # 32 and 32 more for reading on; of decoding, half a segment for each of four cells.
    assert read == [32, 32, 8, 8, 8, 8]


@pytest.mark.slow
def test_a_peak_is_that_of_a_process_of_its_own():
    settings = small(memory=["infini"], memory_tokens=[32])
    found = peak_of(settings, Cell("memory", "infini", 32))
    assert 50 < found["mib"] < 2000
    assert found["seconds"] > 0


# What the contenders do.


def test_contenders_share_one_set_of_weights():
    settings = small()
    blocks = make_contender("blocks", settings)
    weights = blocks.model.state_dict()
    for text in ("infini", "full", "window"):
        model = make_contender(text, settings, weights).model
        found = dict(model.named_parameters())
        assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items()), text


def test_reading_goes_through_every_token():
    settings, ids = small(), torch.randint(64, (1, 48))
    with torch.no_grad():
        infini = make_contender("infini:overlap=4:sink_tokens=2", settings)
        assert infini.read(ids).seen == (48,)
        assert infini.config.carried_length(2) == 6
        window = make_contender("window", settings)
        assert window.model.config.sliding_window == 16
        assert window.read(ids).get_seq_length() == 48


def test_the_gates_of_the_patched_model_are_open():
    model = make_contender("infini", small()).model
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("memory_gate.bias")]
    assert len(gates) == 2
    assert all(gate.abs().min() > 0 for gate in gates)


@pytest.mark.parametrize("text", ["blocks", "infini", "full", "quantized:backend=fp8", "window"])
@pytest.mark.parametrize("loop", ["generate", "forward"])
def test_decoding_leaves_the_context_as_it_was(text, loop):
    contender = make_contender(f"{text}:loop={loop}", small())
    said = []
    inner = contender.model.forward
    contender.model.forward = lambda *args, **kwargs: said.append(1) or inner(*args, **kwargs)
    with torch.no_grad():
        state = contender.after(8, contender.after(32))
        before = state.get_seq_length()
        contender.decode(state, 3)
    assert before == (8 if text == "blocks" else 40)
    assert state.get_seq_length() == before
    assert len(said) >= 3


def test_every_way_to_train_learns_from_the_same_gradient():
    """Orders and recomputation change what a step costs, not what it computes."""
    settings, found = small(), {}
    for text in ("infini", "infini:recompute=false", "infini:order=layer", "blocks", "blocks:recompute=true"):
        contender = make_contender(text, settings)
        contender.train(contender.ids(48))
        found[text] = {name: parameter.grad.clone() for name, parameter in contender.model.named_parameters()}
        contender.clear()
        assert not contender.model.training
        assert all(parameter.grad is None for parameter in contender.model.parameters())
    for base, *others in (
        ("infini", "infini:recompute=false", "infini:order=layer"),
        ("blocks", "blocks:recompute=true"),
    ):
        for other in others:
            for name, gradient in found[base].items():
                error = (found[other][name] - gradient).abs().max()
                assert error <= 1e-4 * gradient.abs().max() + 1e-9, (other, name)


def test_the_package_has_equal_shapes():
    pytest.importorskip("infini_transformer_pytorch")
    settings = small(intermediate=88)
    package, stock = make_contender("package", settings), make_contender("infini:kv_heads=4", settings)
    attention, mlp = package.model.layers[0]
    ours = stock.model.model.layers[0]
    assert attention.to_qkv.weight.shape == (3 * 32, 32)
    assert attention.to_out.weight.shape == ours.self_attn.o_proj.weight.shape
    assert mlp.proj_in.weight.shape == (2 * 88, 32)
    assert mlp.proj_out.weight.shape == ours.mlp.down_proj.weight.shape
    with torch.no_grad():
        open_keys, memories = package.after(8, package.after(32))
        assert open_keys[0].shape[-2] == 8
        assert len(memories) == 2
        package.decode((open_keys, memories), 3)
        package.answer(package.ids(32))
    assert package.model.to_logits is package.head


def test_peaks_are_measured_of_reading_and_of_steps():
    settings = small()
    for measure in ("memory", "training_memory"):
        found = measure_here(settings, Cell(measure, "infini", 32))
        assert found["mib"] > 50
        assert found["seconds"] > 0


def test_a_model_has_positions_for_the_longest_input():
    settings = small(prefill=["full"], prefill_tokens=[256])
    assert make_contender("full", settings).model.config.max_position_embeddings >= 256
    assert replace(settings, prefill_tokens=[512]).longest >= 512
