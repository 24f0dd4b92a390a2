"""Fit the memory's own projections to a model as it is, on rows of named facts whose sources are known.

    python scripts/fit_projections.py --config configs/pretrain/tiny_llama_facts_8_fit.yaml --train_folder NOVELS/train

The weights rest; what reads the memory has to learn afterwards what it now holds. Prints, for rows that were kept out,
how often the heads' votes find the source of an answer, and its token, before and after. Takes minutes on a CPU.
"""

from dataclasses import dataclass, field

from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.memory_arguments import MemoryArguments
from infini_hf.cli.names import check_target
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.base_rows import read_texts
from infini_hf.data.memory_row_style import MemoryRowStyle
from infini_hf.data.memory_rows import MemoryRows
from infini_hf.projection_fit import FitSettings, fit_memory_projections, layers_to_fit
from infini_hf.told_rows import tracked


@dataclass(frozen=True)
class FitArguments(MemoryRowStyle):
    """Where from and where to; the rows: see infini_hf.data.memory_row_style."""

    output_dir: str = field(default="outputs/fitted", metadata={"help": "folder of the model that comes out"})
    train_folder: str = field(default="novels/train", metadata={"help": "folder of plain-text novels"})
    rows: int = field(default=640, metadata={"help": "rows to read; one of sixteen is kept out of the fit"})
    layers: list[int] | None = field(default=None, metadata={"help": "layers to fit; by default all"})
    anew: list[int] = field(default_factory=list, metadata={"help": "those of them that begin anew"})


def table(report):
    """What the rows that were kept out show, a line for each layer."""
    lines = [f"{report['told']:,} told tokens of rows kept out", ""]
    names = ("votes", "tokens", "share")
    lines += ["| | " + " | ".join(f"{name} before | {name} after" for name in names) + " |", "|---|" + "---|" * 6]
    before, after = report["before"], report["after"]
    for index in before["layers"]:
        cells = [part["layers"][index][name] for name in names for part in (before, after)]
        lines.append(f"| layer {index} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    cells = [part[name] for name in names[:2] for part in (before, after)]
    return "\n".join([*lines, "| together | " + " | ".join(f"{cell:.3f}" for cell in cells) + " | | |"])


def main(argv=None):
    model_args, memory_args, args, settings = parse_arguments(
        (ModelArguments, MemoryArguments, FitArguments, FitSettings), __doc__, argv
    )
    if memory_args.resting_layers:
        raise ValueError(f"resting_layers={memory_args.resting_layers}: all weights rest in a fit; leave it out")
    if memory_args.memory_only:
        raise ValueError("memory_only=True: a fit is of the projections alone as it is; leave it out")
    if memory_args.closed_memory:
        raise ValueError("closed_memory=True: a fit is of what the memory reads; leave it out")
    check_target(args.output_dir, "output_dir=")
    model_args.check()
    texts = read_texts(args.train_folder)
    model, tokenizer = model_args.load()
    memory_args.prepare(model, tokenizer, texts)
    layers_to_fit(model, args.layers, args.anew)
    length = infini_config_of(model.config).segment_length
    rows = MemoryRows(texts, tokenizer, args.rows, length, args, settings.seed)
    drawn = list(tracked(rows, True, "drawing rows"))
    report = fit_memory_projections(model, drawn, args.layers, args.anew, settings)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(table(report))
    print(f"model: {args.output_dir}")
    return report


if __name__ == "__main__":
    run_script(main)
