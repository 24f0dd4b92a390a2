"""How many independent facts one head's memory recalls, by update rule, feature map and size, against the bound.

    python scripts/capacity.py --output outputs/capacity.md

Random keys and random values, no model. Written are a markdown file of tables, a JSONL of all measurements, and a PNG
(with matplotlib) beside it. Takes about a minute on one CPU core.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
from tqdm.auto import tqdm

from infini_hf.cli.errors import run_script
from infini_hf.evaluation.capacity import feature_cosine, measure, random_facts
from infini_hf.evaluation.curves import draw_recall
from infini_hf.evaluation.intervals import jackknife_interval

RULES, MAPS = ("linear", "delta"), ("elu", "exp")
# Facts for each feature dimension.
LOADS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4)
SHOWN = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
# Of keys: their norm over √d, and the cosine of any two. None stands for unit keys.
KEYS = {
    "unit": (None, 0.0),
    "norm √d": (1.0, 0.0),
    "norm √d, cosine 0.5": (1.0, 0.5),
    "norm 3√d": (3.0, 0.0),
    "norm 3√d, cosine 0.5": (3.0, 0.5),
}
FILLERS = (0, 64, 256, 1024, 4096, 16384)


def key_options(kind, dim):
    size, correlation = KEYS[kind]
    return {"norm": 1.0 if size is None else size * math.sqrt(dim), "correlation": correlation}


def rows_of_sizes(args):
    """Every rule and map at every size, facts written one by one."""
    for dim in args.dims:
        for rule in (*RULES, "best"):
            for feature_map in MAPS:
                for facts in sorted({1, 2, 4, *(max(1, round(load * dim)) for load in LOADS)}):
                    yield {"dim": dim, "rule": rule, "map": feature_map, "keys": "norm √d", "facts": facts}


def rows_of_keys(args):
    """Every kind of keys at one size."""
    for kind in KEYS:
        for rule in RULES:
            for feature_map in MAPS:
                for load in SHOWN:
                    facts = max(1, round(load * args.dim))
                    yield {"dim": args.dim, "rule": rule, "map": feature_map, "keys": kind, "facts": facts}


def rows_of_writes(args):
    """The delta rule with several facts in one write; the linear rule adds up to the same whatever the write."""
    for per_write in (1, 8, 64):
        for feature_map in MAPS:
            for load in SHOWN:
                facts = max(1, round(load * args.dim))
                row = {"dim": args.dim, "rule": "delta", "map": feature_map, "keys": "norm √d", "facts": facts}
                yield {**row, "per_write": per_write}


def rows_of_fillers(args):
    """A few facts, and then many tokens that are none."""
    for rule in RULES:
        for feature_map in MAPS:
            for filler in FILLERS:
                row = {"dim": args.dim, "rule": rule, "map": feature_map, "keys": "norm 3√d", "facts": args.dim // 8}
                yield {**row, "per_write": 64, "filler": filler}


def measured(row, args):
    """A row with its recall, the interval of 95 % over seeds, and the error."""
    generator = torch.Generator().manual_seed(args.seed)
    options = {**key_options(row["keys"], row["dim"]), "codebook": args.codebook, "generator": generator}
    facts = random_facts(args.seeds, row["facts"], row["dim"], **options)
    filler = None
    if row.get("filler"):
        others = random_facts(args.seeds, row["filler"], row["dim"], **options)
        filler = (others.keys, others.values)
    found = measure(facts, row["rule"], row["map"], row.get("per_write", 1), filler)
    shares = (found.correct / found.facts).tolist()
    mean = sum(shares) / len(shares)
    interval = jackknife_interval(lambda part: sum(part) / len(part), shares)
    cosine = feature_cosine(facts.keys, row["map"]) if row["facts"] > 1 else None
    numbers = {"recall": mean, "interval": interval, "error": found.error, "feature_cosine": cosine}
    return {"per_write": 1, "filler": 0, **row, **numbers}


def cell(row):
    """`recall ± half of the interval`; recalls of all or nothing have none."""
    half = 0.0 if row["interval"] is None else (row["interval"][1] - row["interval"][0]) / 2
    return f"{row['recall']:.2f}" + (f" ± {half:.2f}" if half >= 0.005 else "")


def table(rows, heads, key, column, columns, names):
    """A markdown table: a line for each `key`, a column for each value of `column`."""
    lines = ["| " + " | ".join([*heads, *names]) + " |", "|---" * (len(heads) + len(names)) + "|"]
    groups = {}
    for row in rows:
        groups.setdefault(key(row), {})[row[column]] = row
    for name, cells in groups.items():
        found = [cell(cells[value]) if value in cells else "–" for value in columns]
        lines.append("| " + " | ".join([*map(str, name), *found]) + " |")
    return lines


def holds(rows):
    """The most facts with a recall of nine in ten, for that number and all smaller ones."""
    most = 0
    for row in sorted(rows, key=lambda row: row["facts"]):
        if row["recall"] < 0.9:
            break
        most = row["facts"]
    return most


def size_tables(rows, args):
    """Recall at each size, how much each memory holds, and the error where the bound shows."""
    lines = []
    for dim in args.dims:
        part = [row for row in rows if row["dim"] == dim]
        counts = [max(1, round(load * dim)) for load in SHOWN]
        heads, names = ["rule", "map"], [f"{count} facts" for count in counts]
        lines += ["", f"### Heads of {dim}", ""]
        lines += table(part, heads, lambda row: (row["rule"], row["map"]), "facts", counts, names)
    lines += ["", "### Most facts, of the numbers tried, with a recall of 0.9 for them and all fewer", ""]
    lines += [
        "| rule | map | " + " | ".join(f"d = {dim}" for dim in args.dims) + " |",
        "|---" * (2 + len(args.dims)) + "|",
    ]
    for rule in (*RULES, "best"):
        for feature_map in MAPS:
            own = [row for row in rows if (row["rule"], row["map"]) == (rule, feature_map)]
            most = [holds([row for row in own if row["dim"] == dim]) for dim in args.dims]
            lines.append(f"| {rule} | {feature_map} | " + " | ".join(map(str, most)) + " |")
    return lines


def error_table(rows, dim):
    """Distance between what is returned and the value, of norm 1: where exact retrieval ends."""
    lines = ["| rule | map | " + " | ".join(f"{load:g} d" for load in SHOWN[3:]) + " |", "|---" * 6 + "|"]
    for rule in (*RULES, "best"):
        for feature_map in MAPS:
            own = {
                row["facts"]: row for row in rows if (row["dim"], row["rule"], row["map"]) == (dim, rule, feature_map)
            }
            errors = [f"{own[round(load * dim)]['error']:.2f}" for load in SHOWN[3:]]
            lines.append(f"| {rule} | {feature_map} | " + " | ".join(errors) + " |")
    return lines


def key_table(rows, dim):
    counts = [max(1, round(load * dim)) for load in SHOWN]
    cosines = {(row["keys"], row["map"]): row["feature_cosine"] for row in rows if row["facts"] == counts[-1]}

    def key(row):
        return row["keys"], row["rule"], row["map"], f"{cosines[row['keys'], row['map']]:.2f}"

    names = [f"{count} facts" for count in counts]
    return table(rows, ["keys", "rule", "map", "feature cosine"], key, "facts", counts, names)


def report(rows, args):
    """The tables as lines of markdown."""
    options = (
        f"--seeds {args.seeds} --codebook {args.codebook} --dims {' '.join(map(str, args.dims))} --dim {args.dim}"
    )
    counts = [max(1, round(load * args.dim)) for load in SHOWN]
    return [
        f"`python scripts/capacity.py {options}`: {args.seeds} memories a row, values from a codebook of "
        f"{args.codebook}, chance {1 / args.codebook:.3f}; {platform.machine()}, torch {torch.__version__}.",
        "",
        "## By size, rule and feature map",
        "",
        "Keys of norm √d, one fact in a write.",
        *size_tables(rows["sizes"], args),
        "",
        f"### Distance of what is returned from the value, heads of {args.dims[-1]}",
        "",
        *error_table(rows["sizes"], args.dims[-1]),
        "",
        f"## By keys, heads of {args.dim}",
        "",
        *key_table(rows["keys"], args.dim),
        "",
        f"## By facts in one write, delta rule, heads of {args.dim}",
        "",
        *table(
            rows["writes"],
            ["facts in a write", "map"],
            lambda row: (row["per_write"], row["map"]),
            "facts",
            counts,
            [f"{count} facts" for count in counts],
        ),
        "",
        f"## With other tokens behind the facts, heads of {args.dim}",
        "",
        f"{args.dim // 8} facts, keys of norm 3√d, then tokens with random keys and values, 64 in a write.",
        "",
        *table(
            rows["fillers"],
            ["rule", "map"],
            lambda row: (row["rule"], row["map"]),
            "filler",
            FILLERS,
            [f"{filler:,} tokens" for filler in FILLERS],
        ),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128], help="head dimensions of the first part")
    parser.add_argument("--dim", type=int, default=64, help="head dimension of the other parts")
    parser.add_argument("--seeds", type=int, default=20, help="memories a row, each with keys and values of its own")
    parser.add_argument("--codebook", type=int, default=1024, help="values to tell apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="markdown file; a JSONL and a PNG are put beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    parts = {"sizes": rows_of_sizes, "keys": rows_of_keys, "writes": rows_of_writes, "fillers": rows_of_fillers}
    planned = [(name, row) for name, part in parts.items() for row in part(args)]
    rows = {name: [] for name in parts}
    for name, row in tqdm(planned, desc="memories"):
        rows[name].append(measured(row, args))
    text = "\n".join(report(rows, args)) + "\n"
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
        flat = [json.dumps({"part": name, **row}, ensure_ascii=False) for name in parts for row in rows[name]]
        args.output.with_suffix(".jsonl").write_text("\n".join(flat) + "\n", encoding="utf-8")
        try:
            draw_recall(rows["sizes"], args.output.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"no figure: {error}")
    print(text)
    return rows


if __name__ == "__main__":
    run_script(main)
