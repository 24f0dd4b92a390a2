"""Ratios, tables and arithmetic of the benchmark, against numbers made by hand and against torch's own counting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infini_hf import InfiniCache
from infini_hf import memory as memory_math
from infini_hf.evaluation.benchmark.arithmetic import (
    LLAMA_3_8B,
    Shape,
    forward_flops,
    head_flops,
    layer_parts,
    mean_keys,
    predicted_crossover,
    predicted_overhead,
    predicted_speedup,
    state_bytes,
    window_bytes,
)
from infini_hf.evaluation.benchmark.contenders import make_contender
from infini_hf.evaluation.benchmark.costs import projected_seconds, token_flops
from infini_hf.evaluation.benchmark.plots import draw_measures
from infini_hf.evaluation.benchmark.report import report_lines, write_report
from infini_hf.evaluation.benchmark.results import Cell, ResultFile, Run
from infini_hf.evaluation.benchmark.settings import BenchmarkSettings
from infini_hf.evaluation.benchmark.statistics import ratio
from infini_hf.evaluation.benchmark.summary import Summary
from infini_hf.evaluation.benchmark.tables import Tables

CONDITIONS = {"hardware": "a test", "torch": "2", "threads": 1}
CSV = """\
# hardware: "a test"
# torch: "2"
# threads: 1
measure,contender,tokens,session,repeat,seconds,processor,mib,note
prefill,blocks,2048,1,0,1.0,0.5,,
prefill,infini,2048,1,0,1.1,0.55,,
prefill,full,2048,1,0,0.9,0.45,,
prefill,blocks,2048,1,1,2.0,1,,
prefill,infini,2048,1,1,2.1,1.05,,
prefill,full,2048,1,1,1.9,0.95,,
prefill,blocks,2048,1,2,9.0,4.5,,
prefill,infini,2048,1,2,10.8,5.4,,
prefill,full,2048,1,2,9.9,4.95,,
prefill,blocks,8192,1,0,4.0,2,,
prefill,infini,8192,1,0,5.0,2.5,,
prefill,full,8192,1,0,10.0,5,,
prefill,window,2048,2,0,3.0,1.5,,
prefill,window,8192,1,0,,,,"would take about 700 s, most_seconds=600"
read_on,infini,2048,1,0,0.8,0.4,,
read_on,infini,8192,1,0,0.88,0.44,,
memory,infini,2048,1,0,3.0,1.5,400.0,
memory,infini,8192,1,0,9.0,4.5,404.0,
machine,product,0,1,0,0.05,0.025,,
"""


def settings_of(**values):
    lists = {"prefill": ["blocks", "infini", "full", "window"], "prefill_tokens": [2048, 8192]}
    lists |= {
        "read_on": ["infini"],
        "read_on_tokens": [2048, 8192],
        "memory": ["infini"],
        "memory_tokens": [2048, 8192],
    }
    return BenchmarkSettings(**({"device": "cpu", "repeats": 3} | lists | values))


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "speed.csv"
    path.write_text(CSV, encoding="utf-8")
    return ResultFile(path, CONDITIONS)


# Ratios.


def test_a_ratio_is_the_median_of_the_ratios_of_turns(results):
    """The ratio of the medians is 2.1 / 2.0 = 1.05; of the turns it is the median of 1.1, 1.05 and 1.2."""
    infini, blocks = (results.of(Cell("prefill", name, 2048)) for name in ("infini", "blocks"))
    found = ratio(infini, blocks)
    assert (found.value, found.lowest, found.highest) == pytest.approx((1.1, 1.05, 1.2))
    assert str(found) == "1.100 (1.050–1.200)"
    assert str(ratio(blocks, infini)) == "0.909 (0.833–0.952)"


def test_runs_of_other_sessions_share_no_turn(results):
    window, blocks = (results.of(Cell("prefill", name, 2048)) for name in ("window", "blocks"))
    assert str(ratio(window, blocks)) == "1.500 †"
    assert ratio(window, []) is None


def test_a_file_is_read_back_and_gone_on_with(results):
    assert results.session == 3
    cell = Cell("prefill", "infini", 8192)
    results.add(cell, repeat=1, seconds=0.125, processor=0.1)
    again = ResultFile(results.path, CONDITIONS)
    assert again.runs == results.runs
    assert again.runs[-1] == Run("prefill", "infini", 8192, 3, 1, 0.125, 0.1)
    assert again.seconds(cell) == pytest.approx((5.0 + 0.125) / 2)
    assert again.below(cell) == Cell("prefill", "infini", 2048)
    assert again.below(Cell("prefill", "infini", 2048)) is None


def test_a_row_that_was_cut_off_is_measured_again(results):
    """Whatever is left of it, and however often the file is gone on with."""
    cell, whole = Cell("prefill", "infini", 8192), results.path.read_text(encoding="utf-8")
    results.add(cell, repeat=1, seconds=0.125, processor=0.1)
    row = results.path.read_text(encoding="utf-8").removeprefix(whole)
    for kept in range(1, len(row)):
        results.path.write_text(whole + row[:kept], encoding="utf-8")
        again = ResultFile(results.path, CONDITIONS)
        assert again.runs == results.runs[:-1]
        again.add(cell, repeat=1, seconds=0.25, processor=0.2)
        assert ResultFile(results.path, CONDITIONS).runs == again.runs


def test_a_note_is_written_once_and_gives_way_to_a_run(results):
    cell = Cell("prefill", "window", 8192)
    before = len(results.runs)
    results.add(cell, note="would take about 700 s, most_seconds=600")
    assert len(results.runs) == before
    assert results.note(cell)
    results.add(cell, seconds=3.0, processor=3.0)
    assert results.note(cell) == ""


def test_the_clock_of_the_processor_replaces_that_of_the_wall(results):
    own = ResultFile(results.path, CONDITIONS, clock="processor")
    cell = Cell("prefill", "blocks", 8192)
    assert (results.seconds(cell), own.seconds(cell)) == (4.0, 2.0)
    assert own.share_of_processor == results.share_of_processor == pytest.approx(0.5)


# Tables.


def test_the_tables_show_medians_ratios_and_what_is_missing(results):
    text = "\n".join(Tables(settings_of(), results).lines())
    assert "| `blocks` | 1,024 | 2,048 |" in text
    assert "| `infini` | 1.100 (1.050–1.200) | 1.250 |" in text
    assert "- `window` at 8,192: would take about 700 s, most_seconds=600" in text
    assert "- fewer runs than 3: `blocks` at 8,192 (1), `infini` at 8,192 (1)" in text
    assert "- †: not taken in turns" in text
    # 8,192 tokens are read on in 0.8 and 0.88 seconds.
    assert "| `infini` | 0.0977 | 0.107 |" in text
    assert "| `infini` | 1 | 1.100 |" in text
    assert "| `infini` | 400 | 404 |" in text


def test_the_share_of_a_product_is_that_of_its_flops(results):
    text = "\n".join(Tables(settings_of(), results).lines())
    rate = 2 * 2048 * 512 * 1536 / 0.05
    share = 100 * 2048 * token_flops("blocks", settings_of(), 8192) / rate
    assert f"share of the {rate / 1e9:,.0f} GFLOP/s of a bare product" in text
    assert f"| {share:.0f} % |" in next(line for line in text.splitlines() if "`blocks`" in line and "%" in line)


def test_the_summary_says_where_full_attention_falls_behind(results):
    text = "\n".join(Summary(settings_of(), results).lines())
    assert "| prefill, `infini` / `blocks` | 1.250 | 8,192 |" in text
    assert "| prefill, `full` / `infini` | 2.000 | 8,192 |" in text
    assert "| prefill, `full` is slower | from 8,192 | 2,048 to 8,192 |" in text
    assert "| read on, time far / near, `infini` | 1.100" in text
    assert "| memory, peak far / near, `infini` | 1.010" in text
    assert Summary(settings_of(), ResultFile(None, CONDITIONS)).lines() == []


def test_the_report_names_the_command_and_the_conditions(results, tmp_path):
    settings = settings_of(output=str(tmp_path / "speed.md"))
    lines = report_lines(settings, results, "python scripts/benchmark.py --only prefill")
    assert "`python scripts/benchmark.py --only prefill`" in lines
    assert any("a test, cpu, 1 thread(s), float32; torch 2" in line for line in lines)
    assert write_report(settings, results, "")[0] == [
        *report_lines(settings, results, ""),
        *(
            line
            for measure in ("prefill", "read_on", "memory")
            for line in ("", f"![speed_{measure}](speed_{measure}.png)")
        ),
    ]


def test_figures_are_drawn_of_what_was_measured_at_two_lengths(results, tmp_path):
    pytest.importorskip("matplotlib")
    settings = settings_of(prefill_tokens=[2048])
    assert [path.name for path in draw_measures(settings, results, tmp_path / "a.md")] == [
        "a_read_on.png",
        "a_memory.png",
    ]
    assert (tmp_path / "a_memory.png").stat().st_size > 1000


# Arithmetic.


def test_a_shape_has_the_parameters_of_its_model():
    settings = settings_of(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab_size=50)
    model = make_contender("full", settings).model
    assert settings.shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert LLAMA_3_8B.parameters == pytest.approx(8.03e9, rel=1e-3)


def test_flops_are_those_that_torch_counts():
    """One token attends to itself alone, so that torch, which counts whole squares, counts the same."""
    settings = settings_of(layers=3, width=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, attention="eager")
    model = make_contender("full", settings).model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]), use_cache=False)
    # Its angles of RoPE are a product too.
    rope = counter.get_total_flops() - forward_flops(settings.shape, 1) - head_flops(settings.shape)
    assert 0 <= rope <= 2 * settings.head_dim


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_flops_of_the_memory_are_those_that_torch_counts(rule):
    """Products alone: what torch does not count are the element-wise steps, at most five a number."""
    shape, length = Shape(1, 64, 4, 2, 16, 96, 50), 32
    queries, keys, values = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
    state = memory_math.empty(keys)
    parts = layer_parts(shape, length, rule=rule)
    with FlopCounterMode(display=False) as counter:
        memory_math.retrieve(queries, *state)
    # Mapping (2 operations) and dividing are the rest.
    assert parts["retrieval"].flops * length - counter.get_total_flops() == 3 * 4 * 16 * length
    with FlopCounterMode(display=False) as counter:
        memory_math.update(keys, values, *state, rule=rule)
    rest = parts["write"].flops * length - counter.get_total_flops()
    # Mapping and summing; of the delta rule dividing and subtracting too.
    assert rest == (5 if rule == "delta" else 3) * 2 * 16 * length


def test_state_and_window_are_as_large_as_the_tensors():
    settings = settings_of(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, segment_length=2048)
    contender = make_contender("infini", settings)
    with torch.no_grad():
        cache = contender.read(contender.ids(2048 + 40))
    assert isinstance(cache, InfiniCache)
    assert cache.state_bytes() == state_bytes(settings.shape) + window_bytes(settings.shape, 40)


def test_predictions_agree_with_one_another():
    for shape in (settings_of().shape, LLAMA_3_8B):
        at = predicted_crossover(shape, 2048)
        assert predicted_speedup(shape, 2048, at) == pytest.approx(1, abs=1e-3)
        assert predicted_overhead(shape, 2048) == pytest.approx(1 / predicted_speedup(shape, 2048, 2048))
        assert predicted_overhead(shape, 2048, rule="delta") > predicted_overhead(shape, 2048) > 1


def test_the_time_of_a_longer_input_follows_from_its_flops():
    settings = settings_of()
    short, long = Cell("prefill", "full", 2048), Cell("prefill", "full", 131_072)
    linear = forward_flops(settings.shape, 0)
    slope = (forward_flops(settings.shape, 1) - linear) / 2
    expected = 64 * (linear + slope * 131_073) / (linear + slope * 2049)
    assert projected_seconds(1.0, short, long, settings) == pytest.approx(expected)
    far = [Cell("prefill", "infini", tokens) for tokens in (2048, 131_072)]
    # Of the first segment nothing is read.
    assert 64 < projected_seconds(1.0, *far, settings) < 64 * 1.01


def test_costs_follow_the_options_of_a_contender():
    settings = settings_of()
    base = token_flops("infini", settings, 8192)
    # Three of four segments have one in front of them.
    assert token_flops("infini:overlap=256", settings, 8192) - base == 4 * 4 * 512 * 256 * 3 / 4
    assert token_flops("infini:memory_update=delta", settings, 8192) > base
    assert token_flops("blocks", settings, 8192) == forward_flops(settings.shape, mean_keys(2048))
    assert token_flops("package", settings, 8192) == token_flops("infini:kv_heads=8", settings, 8192)


def test_a_first_segment_writes_the_memory_and_does_not_read_it():
    settings, write = settings_of(), layer_parts(settings_of().shape, 2048)["write"].flops
    blocks, infini = (token_flops(name, settings, 2048) for name in ("blocks", "infini:overlap=256"))
    assert infini - blocks == 4 * write


def test_the_keys_of_a_window_are_counted_one_by_one():
    settings = settings_of()
    seen = [min(token + 1, 300) for token in range(4096)]
    assert token_flops("window:width=300", settings, 4096) == pytest.approx(
        forward_flops(settings.shape, sum(seen) / len(seen))
    )
