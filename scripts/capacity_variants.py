"""Rules and feature maps that the memory does not have, beside the ones it has: how many random facts come back.

    python scripts/capacity_variants.py --output outputs/capacity_variants.md

Takes a minute on one CPU core.
"""

import argparse
import platform
from pathlib import Path

import torch
from tqdm.auto import tqdm

from infini_hf.cli.errors import run_script
from infini_hf.cli.tables import write_tables
from infini_hf.evaluation.capacity import random_facts, recall_of
from infini_hf.evaluation.variants import MAPS, RULES, recall_variant

COUNTS = (4, 8, 16, 32, 64)
# Of keys, their norm over √d.
NORMS = (1, 3)
# Fillers behind the facts: how many, and how many of them differ.
FILLERS = {
    "64 fillers": (64, 64),
    "1,024 fillers": (1024, 1024),
    "16 fillers, 4 times": (64, 16),
    "64 times": (1024, 16),
}


def shares(args, rule, feature_map, norm):
    """The shares recalled of each count of facts, and of a few facts behind each kind of filler."""
    norm = norm * args.dim**0.5
    for count in COUNTS:
        generator = torch.Generator().manual_seed(args.seed)
        facts = random_facts(args.seeds, count, args.dim, norm, codebook=args.codebook, generator=generator)
        yield facts, recall_variant(facts, rule, feature_map)
    for total, different in FILLERS.values():
        generator = torch.Generator().manual_seed(args.seed)
        facts = random_facts(args.seeds, args.dim // 8, args.dim, norm, codebook=args.codebook, generator=generator)
        others = random_facts(args.seeds, different, args.dim, norm, codebook=args.codebook, generator=generator)
        filler = tuple(states.repeat(1, 1, total // different, 1) for states in (others.keys, others.values))
        yield facts, recall_variant(facts, rule, feature_map, filler)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64, help="head dimension")
    parser.add_argument("--seeds", type=int, default=20, help="memories a cell")
    parser.add_argument("--codebook", type=int, default=1024, help="values to tell apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="markdown file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    options = f"--dim {args.dim} --seeds {args.seeds} --codebook {args.codebook} --seed {args.seed}"
    names = [f"{count} facts" for count in COUNTS] + list(FILLERS)
    lines = [
        f"`python scripts/capacity_variants.py {options}`: {platform.machine()}, torch {torch.__version__}.",
        "",
        "| keys | map | features | rule | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    cells = [(norm, feature_map, rule) for norm in NORMS for feature_map in MAPS for rule in RULES]
    for norm, feature_map, rule in tqdm(cells, desc="memories"):
        found = [recall_of(returned, facts) for facts, returned in shares(args, rule, feature_map, norm)]
        numbers = [f"{part.correct.double().mean() / part.facts:.2f}" for part in found]
        keys = "norm √d" if norm == 1 else f"norm {norm}√d"
        features = f"{MAPS[feature_map][2] * args.dim}"
        lines.append("| " + " | ".join([keys, feature_map, features, rule, *numbers]) + " |")
    write_tables(lines, args.output)


if __name__ == "__main__":
    run_script(main)
