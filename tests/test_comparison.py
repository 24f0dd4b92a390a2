"""Ways to read held against each other: sums, intervals and shares against closed forms, and the lines that say so."""

import math
import statistics

import pytest
import torch

from infini_hf.evaluation.comparison import beside_control, compare, comparison_lines
from infini_hf.evaluation.curves import LEAST_RANGE, draw_curves, new_figure
from infini_hf.evaluation.perplexity import curve_of, curves_of_spans, ratios_of_spans


def losses_of(**means):
    """Texts of 10, 20, 8 and 4 tokens beyond a first segment of 4; losses constant in a text, alike in the segment."""
    lengths = (14, 24, 12, 4)
    return {
        name: [
            torch.cat([torch.ones(4), torch.full((length - 4,), value)])
            for length, value in zip(lengths, values, strict=True)
        ]
        for name, values in means.items()
    }


MEANS = {"memory": (2.0, 3.0, 2.5, 0.0), "closed": (2.5, 3.25, 2.6, 0.0), "full": (1.5, 2.5, 2.0, 0.0)}


def test_a_comparison_counts_every_token_beyond_the_first_segment_once():
    memory, closed, full = compare(losses_of(**MEANS), 4)
    assert (memory.tokens, memory.documents) == (38, 3)
    assert memory.perplexity == pytest.approx(math.exp((10 * 2.0 + 20 * 3.0 + 8 * 2.5) / 38))
    gain = (10 * 0.5 + 20 * 0.25 + 8 * 0.1) / 38
    assert memory.ratio == pytest.approx(math.exp(-gain))
    assert memory.ratio == pytest.approx(memory.perplexity / closed.perplexity)
    assert memory.share == pytest.approx(gain * 38 / (10 * 1.0 + 20 * 0.75 + 8 * 0.6))
    low, high = memory.ratio_interval
    assert low < memory.ratio < high
    assert (closed.ratio, closed.share, full.share) == (None, None, None)


def test_texts_of_one_length_have_the_interval_of_their_paired_differences():
    base, gains = [3.0, 1.0, 4.0, 2.0], [0.3, -0.1, 0.4, 0.2]
    losses = {
        "closed": [torch.full((10,), value) for value in base],
        "memory": [torch.full((10,), value - gain) for value, gain in zip(base, gains, strict=True)],
    }
    row = compare(losses, 0)[1]
    reach = 3.1824 * statistics.stdev(gains) / 2
    assert row.ratio == pytest.approx(math.exp(-0.2), rel=1e-6)
    assert row.ratio_interval == pytest.approx((math.exp(-0.2 - reach), math.exp(-0.2 + reach)), rel=1e-4)


def test_half_of_every_gap_is_half_for_sure():
    rows = compare(losses_of(closed=(2.5, 3.5, 2.0, 0), memory=(2.0, 3.0, 1.5, 0), full=(1.5, 2.5, 1.0, 0)), 4)
    assert rows[1].share == pytest.approx(0.5)
    assert rows[1].share_interval == pytest.approx((0.5, 0.5))


def test_where_full_attention_is_not_surely_better_there_is_no_gap_to_share():
    for full in ((2.6, 3.3, 2.7, 0.0), (2.4, 3.3, 2.5, 0.0)):
        assert compare(losses_of(**{**MEANS, "full": full}), 4)[0].share is None


def test_a_way_that_ends_early_is_compared_where_it_reaches():
    losses = losses_of(**MEANS)
    losses["full_past"] = [text[:6] + 1 for text in losses["full"]]
    row = compare(losses, 4)[-1]
    assert (row.way, row.tokens) == ("full_past", 6)
    assert row.ratio == pytest.approx(math.exp((2 * 0.0 + 2 * 0.25 + 2 * 0.4) / 6))
    losses["nowhere"] = [text[:3] for text in losses["full"]]
    assert [row.way for row in compare(losses, 4)] == [*MEANS, "full_past"]


def test_one_text_says_nothing_of_others():
    one = {name: texts[:1] for name, texts in losses_of(**MEANS).items()}
    row = compare(one, 4)[0]
    assert (row.ratio_interval, row.share_interval) == (None, None)
    assert row.share == pytest.approx(0.5)


def test_the_lines_say_what_the_memory_does():
    losses = losses_of(**MEANS)
    rows = compare(losses, 4)
    lines = comparison_lines(rows, 4)
    row = rows[0]
    ends = f"({row.ratio_interval[0]:.4f} to {row.ratio_interval[1]:.4f})"
    assert f"| memory | {row.perplexity:.2f} | {row.ratio:.4f} {ends} | 38 |" in lines
    assert f"| closed | {rows[1].perplexity:.2f} | 1 | 38 |" in lines
    said = f"memory {row.perplexity:.2f}, closed {rows[1].perplexity:.2f}, ratio {row.ratio:.4f} {ends}; of the gap"
    assert said in lines[-1]
    assert f"the memory closes {100 * row.share:.1f} (" in lines[-1]
    other = compare({**losses, "other": losses["full"]}, 4)
    last = comparison_lines(other, 4)[-1]
    assert f"{ends}; memory of another text {rows[2].perplexity:.2f}; of the gap" in last
    later = comparison_lines(rows, 4, first="4 tokens")
    assert later[0].startswith("Beyond the first 4 tokens (position 4 on, ")
    assert later[-1].startswith("Beyond the first 4 tokens: memory ")
    assert comparison_lines(compare(losses, 30), 30) == ["No text reaches beyond the first segment (position 30)."]
    assert "memory" not in comparison_lines(compare({"hard": losses["memory"]}, 4), 4)[-1]


def test_a_curve_is_the_perplexity_of_its_steps():
    losses = [torch.arange(10.0), torch.arange(6.0)]
    points = curve_of(losses, first=4, per_doubling=1)
    means = [1.5, (4 + 5 + 6 + 7 + 4 + 5) / 6, 8.5]
    assert [value for _, value in points] == pytest.approx([math.exp(mean) for mean in means])
    assert [place for place, _ in points] == pytest.approx([2.0, 32**0.5, 80**0.5])


def test_steps_below_a_token_are_left_out():
    points = curve_of([torch.arange(4.0)], first=1, per_doubling=2)
    assert [value for _, value in points] == pytest.approx([math.exp(mean) for mean in (0.0, 1.0, 2.0, 3.0)])


def test_spans_are_drawn_at_their_middles_and_beside_a_base():
    edges, rows = [0, 4, 16, 64], {"memory": [2.0, 1.5, 1.0], "closed": [2.0, 1.75, 1.5], "past": [2.0, 3.0, None]}
    curves = curves_of_spans(edges, rows)
    assert [place for place, _ in curves["memory"]] == [2.0, 8.0, 32.0]
    assert curves["past"] == [(2.0, math.exp(2.0)), (8.0, math.exp(3.0))]
    ratios = ratios_of_spans(edges, rows, rows["closed"])
    # The base would be a line at 1, and a way that ends early means other tokens.
    assert list(ratios) == ["memory"]
    assert [ratio for _, ratio in ratios["memory"]] == pytest.approx([1.0, math.exp(-0.25), math.exp(-0.5)])
    # Of another model with the very same losses the line is drawn.
    assert list(ratios_of_spans(edges, rows, list(rows["closed"]))) == ["memory", "closed"]


@pytest.mark.parametrize("most", [102.0, 300.0, 90_000.0])
def test_what_differs_little_is_drawn_so(most):
    pytest.importorskip("matplotlib")
    _, (axis,) = new_figure((4, 3))
    draw_curves(axis, {"blocks": [(1024, 100.0), (2048, most)], "none": []})
    low, high = axis.get_ylim()
    assert low < 100.0
    assert high > most
    assert high / low >= LEAST_RANGE * (1 - 1e-9)
    shown = [value for value in axis.yaxis.get_majorticklocs() if low <= value <= high]
    assert 2 <= len(shown) <= 10
    assert all(axis.yaxis.get_major_formatter()(value, 0) for value in shown)
    assert not any(axis.yaxis.get_minor_formatter()(value, 0) for value in axis.yaxis.get_minorticklocs())


def test_two_models_are_held_against_each_other_text_by_text():
    documents = {"memory": [3.0, 3.2, None, 3.4], "closed": [3.1, 3.1, None, 3.6]}
    found = beside_control(documents, [3.1, 3.3, None, 3.6])
    differences = [-0.1, -0.1, -0.2]
    mean = sum(differences) / 3
    error = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2 / 3)
    ratio, interval = found["memory"]
    assert ratio == pytest.approx(math.exp(mean))
    # Student's quantile for two degrees of freedom.
    assert interval == pytest.approx((math.exp(mean - 4.3027 * error), math.exp(mean + 4.3027 * error)), rel=1e-4)
    assert found["closed"][0] == pytest.approx(math.exp(-0.2 / 3))
    assert beside_control({"memory": [3.0]}, [3.1])["memory"] == (pytest.approx(math.exp(-0.1)), None)
    for control in ([3.1, 3.3], [3.1, None, 3.0, 3.6]):
        with pytest.raises(ValueError, match="measure both on the same texts"):
            beside_control(documents, control)
