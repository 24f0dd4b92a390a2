"""Store a model with a trained memory as it ships, in bfloat16 with gates in float32, and write its model card.

    python scripts/publish_memory.py --model outputs/tiny-llama-half-3 --output outputs/published
    infini-hf passkey outputs/published --haystack NOVELS/validation --lengths 32k --output outputs/passkey.jsonl
    python scripts/publish_memory.py --output outputs/published --samples outputs/passkey.jsonl --configs STAGES

STAGES are the YAML files of all stages, in order: the card says how the model was trained. The weights come first, as
what is measured has to be what ships: samples of other weights are refused. The card then shows the tables of the
sample files of `infini-hf passkey`, and those of `scripts/evaluate.py`.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from infini_hf import AutoInfiniModelForCausalLM
from infini_hf.cache import infini_config_of
from infini_hf.callbacks import gate_values
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_file, find_model
from infini_hf.data.memory_row_style import MemoryRowStyle
from infini_hf.evaluation.needles.samples import SampleFile
from infini_hf.evaluation.needles.tables import depth_table, result_table, token_table
from infini_hf.fingerprint import digest_weights

# Segments of the stages before one that says how long they are.
MISSING_LENGTH = 128
CARD = """---
language: en
license: apache-2.0
library_name: infini_hf
tags: [infini-attention, llama]
---

# {name}

A Llama of {parameters:,} parameters whose self-attention is Infini-attention: local attention over segments of
{segment_length} tokens (overlap {overlap}), and a compressive memory of {state} that holds everything before them
(rule {memory_update}, feature map {feature_map}, gate {gate}). A model of this size knows nothing; what it
remembers is measured below.

    infini-hf demo --model {name}

## Training

{recipe}

Share of the memory in the output, layer by layer (mean over the heads; least to greatest): {gates}

## Measured

`closed` shuts the gates, `other` reads the memory of another stream. At depth 1 a single key lies in the local window,
where closed gates may find it too. What the figures mean is said in docs/results.md and docs/language.md.
"""


@dataclass
class PublishArguments:
    """What to store, and what the card shows."""

    output: str = field(metadata={"help": "folder of the model as it ships"})
    model: str | None = field(
        default=None, metadata={"help": "the trained model; without it only the card is written"}
    )
    configs: list[str] = field(default_factory=list, metadata={"help": "YAML files of the stages, in order"})
    name: str | None = field(default=None, metadata={"help": "name on the card; by default that of the folder"})
    samples: list[str] = field(default_factory=list, metadata={"help": "JSONL files of `infini-hf passkey`"})
    tables: list[str] = field(default_factory=list, metadata={"help": "markdown files of scripts/evaluate.py"})


def store(model, output):
    """Weights in bfloat16, gates with their shifts or projections in float32 as always, and the tokenizer."""
    folder = find_model(model)
    loaded = AutoInfiniModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    for file in Path(output).iterdir():
        if file.is_file():
            file.chmod(0o644)


def recipe(configs):
    """How the model was trained, from the YAML files of its stages."""
    lines = ["`NOVELS/train` is a folder of plain-text novels; each stage goes on from the one before.", ""]
    rows = ["| stage | from | rows | steps | what |", "|---|---|---|---|---|"]
    stages = [yaml.safe_load(find_file(path, "configs").read_text(encoding="utf-8")) for path in configs]
    length = MISSING_LENGTH
    for path, stage, after in zip(configs, stages, [*stages, {}][1:], strict=True):
        script = script_of(stage)
        command = f"    python scripts/{script}.py --config {path}"
        if script == "average_weights":
            lines.append(command)
            what = f"mean of the weights: {stage['share']:.0%} of these, the rest of `{stage['other']}`"
            rows.append(f"| `{Path(path).stem}` | `{stage['model']}` | – | – | {what} |")
            continue
        lines += [f"{command} \\", "        --train_folder NOVELS/train"]
        style = {**asdict(MemoryRowStyle()), **stage}
        length = stage.get("segment_length", length)
        shortest, longest = (style[name] * length for name in ("least_segments", "most_segments"))
        lengths = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        batch, steps, what = (of_fit if script == "fit_projections" else of_training)(stage, style)
        what, left = "; ".join(what), re.fullmatch(rf"{stage['output_dir']}/checkpoint-(\d+)", after.get("model", ""))
        steps = f"{left[1]} of {steps}" if left else steps
        rows.append(f"| `{Path(path).stem}` | `{stage['model']}` | {batch} × {lengths} tokens | {steps} | {what} |")
    return "\n".join([*lines, "", *rows])


def script_of(stage):
    """The script of a stage: a mean has another model, training a number of steps, and a fit neither."""
    if "other" in stage:
        return "average_weights"
    return "finetune_memory" if "max_steps" in stage else "fit_projections"


def of_fit(stage, style):
    """Rows, steps and the words for a stage of `scripts/fit_projections.py`."""
    layers = ", ".join(map(str, stage.get("layers") or ["all"]))
    kind = ", of all heads together" if stage.get("mix_heads") else ""
    what = [f"the memory's projections of layers {layers}{kind}, with the weights at rest"]
    if "feature_map" in stage:
        what.append(f"feature map {stage['feature_map']} from here on")
    return stage.get("rows", 640), stage.get("steps", 1000), what


def of_training(stage, style):
    """Rows of a step, steps and the words for a stage of `scripts/finetune_memory.py`."""
    what = [
        f"dilution to {stage.get('memory_dilution', 1):,}",
        f"passkeys in {style['passkey_fraction'] * (1 - style['ruler_fraction']):.0%} of the rows with facts",
    ]
    if style["ruler_fraction"]:
        what.append(f"facts in the sentences of RULER in {style['ruler_fraction']:.0%}")
    if stage.get("lora_r"):
        what.append(f"a LoRA of rank {stage['lora_r']}, the gates and the memory's projections alone learn")
    if stage.get("memory_projections"):
        what.append("projections of the memory's own")
    if stage.get("memory_only"):
        what.append("the gates and the memory's projections alone learn")
    for name, told in (
        ("retrieval", "where answers were stated"),
        ("recall", "where what comes next came before"),
    ):
        if stage.get(f"{name}_weight"):
            layers = ", ".join(map(str, stage.get(f"{name}_layers") or ["all"]))
            what.append(f"layers {layers} told {told}")
    if style["novel_lanes"]:
        what.append(
            f"{style['novel_lanes']} rows read novels on with the memory carried from row to row, "
            f"{style['longest_reading']:,} tokens at most"
        )
    return stage["per_device_train_batch_size"], stage["max_steps"], what


def card(model, name, configs):
    """The card without its tables."""
    patch, shape = infini_config_of(model.config), model.config
    gates = [values for _, values in sorted(gate_values(model).items())]
    values = len(gates) * shape.num_key_value_heads * shape.head_dim * (shape.head_dim + 1)
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        state=f"{values * 4 / 1024:,.0f} KiB",
        recipe=recipe(configs),
        gates="; ".join(f"{gate.mean():.2f} ({gate.min():.2f} to {gate.max():.2f})" for gate in gates),
        **{key: getattr(patch, key) for key in ("segment_length", "overlap", "memory_update", "feature_map", "gate")},
    )


def sample_lines(path, known):
    """The tables of one evaluation, of weights with one of the `known` digests."""
    file = SampleFile(find_file(path, "samples"))
    if not file.samples:
        raise ValueError(f"samples={path!r}: holds no sample; let infini-hf passkey write one")
    if file.about.get("weights") not in known:
        raise ValueError(f"samples={path!r}: of other weights than the model in output; measure that one")
    task = dict(file.about["task"])
    options = ", ".join(
        f"{key} {value}" for key, value in {**task, "seed": file.about["seed"]}.items() if key != "name"
    )
    haystacks = " and ".join(dict.fromkeys(sample.haystack for sample in file.samples))
    lines = [f"### {task['name']} in {haystacks}, {options}", ""]
    lines += [*result_table(file.samples), "", *depth_table(file.samples)]
    return [*lines, "", *token_table(file.samples), ""]


def main(argv=None):
    (args,) = parse_arguments((PublishArguments,), __doc__, argv)
    if args.model is not None:
        store(args.model, args.output)
    output = Path(args.output)
    model = AutoInfiniModelForCausalLM.from_pretrained(output, dtype="auto")
    lines = [card(model, args.name or output.name, args.configs)]
    # As stored, and in float32: what it may have been measured in.
    known = [digest_weights(decoder) for decoder in (model.get_decoder(), model.float().get_decoder())]
    for path in args.samples:
        lines += sample_lines(path, known)
    for path in args.tables:
        lines += ["### Perplexity", "", find_file(path, "tables").read_text(encoding="utf-8")]
    (output / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{output}: model and card")


if __name__ == "__main__":
    run_script(main)
