"""Files of summaries are read line by line, whatever separators of lines the summaries hold themselves."""

import importlib.util
from pathlib import Path

import pytest

from infini_hf.evaluation.summary_file import SummaryFile, read_lines

SEPARATED = "A house.\u2028A lane.\u2029An end.\x85And more.\x0b\x1c"


def test_a_summary_with_separators_of_lines_is_read_again(tmp_path):
    path = tmp_path / "said.jsonl"
    for name in ("a", "b"):
        SummaryFile(path, {"model": "m"}).add(name, "text", SEPARATED, SEPARATED)
    assert [row["summary"] for row in SummaryFile(path, {"model": "m"}).rows] == [SEPARATED] * 2
    assert len(read_lines(path)) == 2


def test_scores_of_such_a_file_can_be_had(tmp_path):
    pytest.importorskip("rouge_score")
    path = tmp_path / "said.jsonl"
    SummaryFile(path, {}).add("a", "text", SEPARATED, SEPARATED)
    source = Path(__file__).parents[1] / "scripts" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("script_evaluate_said", source)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    numbers = script.main(["--task", "rouge", "--predictions", str(path)])
    assert numbers["said"]["rouge1"] == 100
