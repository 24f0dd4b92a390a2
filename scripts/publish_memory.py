"""Store a model with a trained memory as it ships, in bfloat16 with gates in float32, and write its model card.

    python scripts/publish_memory.py --model outputs/tiny-llama-infini-3/final --output outputs/published
    infini-hf passkey outputs/published --haystack NOVELS/validation --lengths 32k --output outputs/passkey.jsonl
    python scripts/publish_memory.py --output outputs/published --samples outputs/passkey.jsonl

The weights come first, since what is measured has to be what ships. The card then shows the tables of the sample files
of `infini-hf passkey`, and those of `scripts/evaluate.py`, with the commands that made them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM
from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_file, find_model
from infini_hf.evaluation.needles.samples import SampleFile
from infini_hf.evaluation.needles.tables import depth_table, result_table, token_table
from infini_hf.gate import MemoryGate

CARD = """---
language: en
license: apache-2.0
library_name: infini_hf
tags: [infini-attention, llama]
---

# {name}

A Llama of {parameters:,} parameters whose self-attention is Infini-attention: local attention over segments of
{segment_length} tokens (overlap {overlap}), and a compressive memory of {state} that holds everything before them
(rule {memory_update}, feature map {feature_map}, gate {gate}). It finds what it was told a million tokens ago, and
knows nothing else.

    infini-hf demo

## Training

From `tiny-llama`, three stages of `scripts/finetune_memory.py` with the configs in `configs/pretrain`; each says which
checkpoint it goes on from, its launch command and its time. No input was longer than 768 tokens.

| stage | rows | steps | what it teaches |
|---|---|---|---|
| `tiny_llama_infini_1_names` | 32 × 256 tokens, one segment | 225 | facts told apart by name, by local attention |
| `tiny_llama_infini_2_memory` | 24 × 256 to 640 tokens, segments of 128 | 275 | the same through the memory |
| `tiny_llama_infini_3_dilution` | 24 × 256 to 768 tokens | 340 | dilution to 4,096; a quarter reads novels on |

Data: the 60 novels of `tiny-llama` and grass filler, with passkeys, keys and words that belong to names hidden in
them. One key in ten is kept for tests.

Gates, tanh of the trained value, from layer to layer (mean over heads, then the least and the greatest): {gates}

## Measured
"""


@dataclass
class PublishArguments:
    """What to store, and what the card shows."""

    output: str = field(metadata={"help": "folder of the model as it ships"})
    model: str | None = field(
        default=None, metadata={"help": "the trained model; without it only the card is written"}
    )
    name: str | None = field(default=None, metadata={"help": "name on the card; by default that of the folder"})
    samples: list[str] = field(default_factory=list, metadata={"help": "JSONL files of `infini-hf passkey`"})
    tables: list[str] = field(default_factory=list, metadata={"help": "markdown files of scripts/evaluate.py"})


def store(model, output):
    """Weights in bfloat16, gates and their shifts in float32 as always, and the tokenizer."""
    folder = find_model(model)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    for file in Path(output).iterdir():
        file.chmod(0o644)


def card(output, name):
    """The card without its tables."""
    model = AutoInfiniModelForCausalLM.from_pretrained(output, dtype="auto")
    patch, shape = infini_config_of(model.config), model.config
    gates = [gate.bias.detach().tanh() for gate in model.modules() if isinstance(gate, MemoryGate)]
    values = len(gates) * shape.num_key_value_heads * shape.head_dim * (shape.head_dim + 1)
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        state=f"{values * 4 / 1024:,.0f} KiB",
        gates="; ".join(f"{gate.mean():.2f} ({gate.min():.2f} to {gate.max():.2f})" for gate in gates),
        **{key: getattr(patch, key) for key in ("segment_length", "overlap", "memory_update", "feature_map", "gate")},
    )


def sample_lines(path):
    """The tables of one evaluation."""
    file = SampleFile(find_file(path, "samples"))
    task = dict(file.about["task"])
    options = ", ".join(
        f"{key} {value}" for key, value in {**task, "seed": file.about["seed"]}.items() if key != "name"
    )
    lines = [f"### {task['name']}, {options}", ""]
    lines += [*result_table(file.samples), "", *depth_table(file.samples)]
    return [*lines, "", *token_table(file.samples), ""]


def main(argv=None):
    (args,) = parse_arguments((PublishArguments,), __doc__, argv)
    if args.model is not None:
        store(args.model, args.output)
    output = Path(args.output)
    lines = [card(output, args.name or output.name)]
    for path in args.samples:
        lines += sample_lines(path)
    for path in args.tables:
        lines += [find_file(path, "tables").read_text(encoding="utf-8")]
    (output / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{output}: model and card")


if __name__ == "__main__":
    run_script(main)
