"""Draw perplexity by position again, from the JSON of an evaluation, without a model.

    python scripts/plot_perplexity.py --numbers docs/results/perplexity_package.json --ways memory other closed \\
        --control docs/results/perplexity_package_control.json --output outputs/perplexity.png

Two panels: the perplexities, and how they compare with the closed memory, or with the control where one is named. The
control is the closed memory of another evaluation, of the same tokens; `scripts/evaluate.py` writes such files.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_file
from infini_hf.evaluation.curves import draw_by_position, new_figure
from infini_hf.evaluation.outputs import check_output
from infini_hf.evaluation.perplexity import curves_of_spans, ratios_of_spans


@dataclass(frozen=True)
class PlotArguments:
    """What is drawn, and where to."""

    numbers: str = field(metadata={"help": "JSON of an evaluation"})
    control: str | None = field(default=None, metadata={"help": "JSON of an evaluation of another model, with closed"})
    ways: list[str] = field(default_factory=list, metadata={"help": "ways in the figure; all by default"})
    output: str | None = field(default=None, metadata={"help": "PNG file; default: the JSON's name, with .png"})


def read(path, name, needed=()):
    """Edges and losses by span of an evaluation, and all that it was measured on.

    Raises:
        ValueError: names the file, and what it lacks.
    """
    numbers, file = None, find_file(path, name)
    with contextlib.suppress(ValueError):
        numbers = json.loads(file.read_text(encoding="utf-8"))
    losses = numbers.get("losses") if isinstance(numbers, dict) else None
    if not losses or "edges" not in numbers:
        raise ValueError(f"{name} {path}: is no JSON of an evaluation of perplexity; scripts/evaluate.py writes them")
    missing = [way for way in needed if way not in losses]
    if missing:
        raise ValueError(f"{name} {path}: has no {', '.join(missing)}, but {', '.join(losses)}")
    return numbers


def main(argv=None):
    (args,) = parse_arguments((PlotArguments,), __doc__, argv)
    numbers = read(args.numbers, "numbers", args.ways)
    losses = {way: numbers["losses"][way] for way in args.ways or numbers["losses"]}
    base, name = numbers["losses"].get("closed"), "closed"
    if args.control is not None:
        other = read(args.control, "control", ["closed"])
        for what in ("texts", "edges", "tokens"):
            if other.get(what) != numbers.get(what):
                raise ValueError(
                    f"control {args.control}: its {what} are {other.get(what)}, and {args.numbers} has "
                    f"{numbers.get(what)}: name evaluations of the same tokens, with the same first_edge"
                )
        base, name = other["losses"]["closed"], "the control"
    output = Path(args.output or args.numbers).with_suffix(".png")
    check_output(output)
    new_figure((1, 1))
    shown = losses if args.control is None else losses | {name: base}
    ratios = base and ratios_of_spans(numbers["edges"], losses, base)
    draw_by_position(curves_of_spans(numbers["edges"], shown), output, numbers.get("beyond"), ratios, name)
    print(output)


if __name__ == "__main__":
    run_script(main)
