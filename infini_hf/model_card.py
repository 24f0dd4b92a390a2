"""The model card of a run: what was trained how on what, where its gates stand, and what the controls say."""

import json
from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainingArguments
from yaml import YAMLError

from .assets import shipped
from .cache import infini_config_of
from .callbacks import gate_values
from .data.documents import HUB_NAME
from .evaluation.controls import closed_memory
from .streaming import require_patched
from .version import __version__

# What a card calls a model that has no name on the hub.
FOLDER = "FOLDER"
CARD, RESULTS = "README.md", "results.json"

# Options that say nothing about a run, or that every run gets from the machine or from the others.
SILENT = set("output_dir run_name report_to hub_token disable_tqdm use_cpu dataloader_pin_memory debug".split())
SILENT |= {"accelerator_config", "activation_checkpointing", "gradient_checkpointing", "include_for_metrics"}


def evaluate_with_control(trainer):
    """Evaluation losses of a trainer, with the memory and with it closed.

    Returns:
        `dict[str, dict[str, float]]`: the metrics under `"with memory"` and `"memory closed"`; empty without data.
    """
    if trainer.eval_dataset is None:
        return {}
    results = {"with memory": trainer.evaluate()}
    with closed_memory(trainer.model):
        results["memory closed"] = trainer.evaluate(metric_key_prefix="eval_closed")
    return {
        name: {key.removeprefix("eval_closed_").removeprefix("eval_"): value for key, value in metrics.items()}
        for name, metrics in results.items()
    }


def write_model_card(trainer, folder, base, data, command, results, steps_before=0):
    """Write `README.md` and `results.json` into the folder of a trained model.

    Every process has to call this, for the gates of a sharded model are gathered; the first one writes.

    Args:
        trainer ([`infini_hf.InfiniTrainer`]): after training.
        folder (`str` or `Path`): the folder of the model.
        base (`str`): name of the checkpoint that was trained from.
        data (`str`): what it was trained on.
        command (`str`): the command that does it again.
        results (`dict`): as from [`evaluate_with_control`].
        steps_before (`int`, *optional*, defaults to `0`): steps of an earlier run that this one went on from, and
            whose command and options are not told.

    Returns:
        `Path`: the card.
    """
    path = Path(folder) / CARD
    gates = gate_lines(trainer.model)
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        findings = [*result_lines(results), "", "## Gates", "", *gates]
        lines = card_lines(trainer, base, data, command, steps_before, findings)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def card_lines(trainer, base, data, command, steps_before, findings):
    """The lines of a card, of which the last are `findings`."""
    inner = require_patched(trainer.model)
    patch = infini_config_of(inner.config).to_dict()
    earlier = f", the first {steps_before} of them before this command went on with these options"
    adapted = inner is not trainer.model
    kind = "LoRA adapters and gates" if adapted else "all weights"
    origin = hub_base(base)
    return [
        "---",
        *([] if origin is None else [f"base_model: {origin}"]),
        "library_name: " + ("peft" if adapted else "transformers"),
        "tags: [infini-attention, infini_hf]",
        "---",
        f"# {Path(trainer.args.output_dir).resolve().name}",
        "",
        f"`{base}` with Infini-attention (arXiv 2404.07143), {kind} trained by infini_hf {__version__}.",
        "",
        *use_lines(base if adapted else None, trainer.hub_model_id),
        "",
        "## Patch",
        "",
        *(f"- `{name}`: {value}" for name, value in patch.items() if name != "version"),
        "",
        "## Training",
        "",
        f"- data: {data}",
        f"- command: `{command}`",
        f"- steps: {trainer.state.global_step} of {trainer.state.max_steps}{earlier if steps_before else ''}",
        *(f"- `{name}`: {value}" for name, value in changed_options(trainer.args).items()),
        "",
        "## Evaluation",
        "",
        *findings,
    ]


def hub_base(base):
    """The name on the hub of what a base is or comes from; `None` where that is not known.

    The hub takes no card whose `base_model` is a folder, nor what is uploaded beside it.
    """
    card = Path(base).expanduser() / CARD
    if card.is_file():
        try:
            base = ModelCard.load(card).data.base_model
        except (ValueError, YAMLError):
            return None
    named = isinstance(base, str) and HUB_NAME.fullmatch(base) is not None
    return base if named and not Path(base).exists() else None


def use_lines(base, name):
    """How to load the model with its memory: an adapter on its `base`; `name` is its own on the hub, if it has one."""
    name = repr(name or FOLDER).replace("'", '"')
    lines = ["## Use", "", "```python"]
    if base is None:
        lines += ["from infini_hf import AutoInfiniModelForCausalLM", ""]
        lines += [f"model = AutoInfiniModelForCausalLM.from_pretrained({name})", "```", ""]
        return [*lines, "`AutoModelForCausalLM` loads the weights without the gates, and no memory."]
    # A checkpoint of this package has a name that the hub does not know.
    is_ours = base in shipped()
    lines += ["from infini_hf.assets import resolve"] * is_ours
    source = f'resolve("{base}")' if is_ours else f'"{base}"'
    return [*lines, "from infini_hf.lora import load_adapter", "", f"model = load_adapter({source}, {name})", "```"]


def changed_options(args):
    """The options of a run that are not the stock defaults."""
    # The defaults of the class: to make an instance is to reset the state that all accelerators of the process share.
    stock = {field.name: field.default for field in fields(TrainingArguments)}
    ours = args.to_dict()
    return {name: value for name, value in ours.items() if name not in SILENT and stock.get(name) != value}


def result_lines(results):
    if not results:
        return ["Not evaluated: no evaluation data was given."]
    lines = ["| read with | loss, nats a token | tokens |", "|---|---|---|"]
    for name, metrics in results.items():
        lines.append(f"| {name} | {metrics['loss']:.4f} | {metrics['tokens']:,} |")
    return lines


def gate_lines(model):
    """A table of the gates by layer."""
    lines = ["| layer | mean | least | most |", "|---|---|---|---|"]
    for index, gates in sorted(gate_values(model).items()):
        lines.append(f"| {index} | {gates.mean():.3f} | {gates.min():.3f} | {gates.max():.3f} |")
    return lines
