"""Checkpoints of a training run: which are whole, and whether one can be continued by what is asked now."""

import json
import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .cache import infini_config_of
from .config import InfiniConfig
from .gate import HeadProjection

logger = logging.getLogger(__name__)

NAME = re.compile(PREFIX_CHECKPOINT_DIR + r"-(\d+)")
RECORD = "infini_training.json"
# What an adapter computes with its tensors, and which tensors it has.
ADAPTER_OPTIONS = "r lora_alpha use_rslora use_dora bias rank_pattern alpha_pattern".split()


def is_whole(folder):
    """Whether the checkpoint was written to its end: the trainer writes its state file last."""
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def resolve_checkpoint(asked, output_dir):
    """The folder to resume from, or `None`.

    Args:
        asked (`bool` or `str`, *optional*): what `train(resume_from_checkpoint=...)` was given.
        output_dir (`str`): where the run writes.

    Returns:
        `str` or `None`

    Raises:
        ValueError: when there is no such checkpoint, or it is not whole.
    """
    if not asked:
        return None
    if asked is not True:
        if not is_whole(asked):
            raise ValueError(f"{asked}: is no whole checkpoint ({TRAINER_STATE_NAME} is missing or broken)")
        return str(asked)
    found = last_whole_checkpoint(output_dir)
    if found is None:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds no whole checkpoint: start without resume_from_checkpoint, or name "
            "one"
        )
    return found


def last_whole_checkpoint(output_dir):
    """The folder of the last checkpoint in `output_dir` that was written to its end, or `None`."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(folder.name)]
    for folder in sorted(folders, key=lambda folder: int(NAME.fullmatch(folder.name)[1]), reverse=True):
        if is_whole(folder):
            return str(folder)
        logger.warning("%s was not written to its end: going back to the one before", folder)
    return None


def disown(output_dir, step):
    """Before a checkpoint is written over an older one, take away what says that the older one is whole."""
    (Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / TRAINER_STATE_NAME).unlink(missing_ok=True)


def record_run(folder, trainer, **more):
    """Note beside a checkpoint what its continuation must have in common with it, and what else is given."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = {**describe(trainer), **more}
    (Path(folder) / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def describe(trainer):
    args = trainer.args
    return {
        "infini_attention": infini_config_of(trainer.lanes.config).to_dict(),
        "carry_memory": args.carry_memory,
        "adapters": adapters_of(trainer.model),
        "adapted": adapted_places(trainer.model),
        "projection_sizes": projections_of(trainer.model),
        # Buffers that a model has or has not, which loading a state dict does not hold it to.
        "centered": sorted(name for name, _ in trainer.model.named_buffers() if name.endswith("_shift")),
        "resting": sorted(name for name, part in trainer.model.named_parameters() if not part.requires_grad),
        # What auto_find_batch_size has made of the value in the arguments.
        "lanes": trainer._train_batch_size,
        "processes": args.world_size,
        "micro-batches a step": args.gradient_accumulation_steps,
        "row groups": args.row_groups,
        "dilution": trainer.dilution.state(),
        "place": trainer.place(),
        "gates_at_start": {index: gates.tolist() for index, gates in (trainer.gates.start or {}).items()},
    }


def projections_of(model):
    """The sizes of the memory's own projections, by their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, HeadProjection)}
    return {name: list(module.weight.shape) for name, module in found.items()}


def adapters_of(model):
    """The adapters of PEFT on a model, each in a few words, by their names."""
    found = {}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        targets = config.target_modules
        layers = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        options = [f"{option}={vars(config)[option]}" for option in ADAPTER_OPTIONS if vars(config).get(option)]
        found[name] = f"{kind} of {layers}" + (f" ({', '.join(options)})" if options else "")
    return found


def adapted_places(model):
    """What the adapters of PEFT do to each layer that has some: neither their names nor how it was asked for count."""
    places = {}
    for path, module in model.named_modules():
        state = vars(module)
        if "merged_adapters" in state:
            ranks, doras = state.get("r", {}), state.get("use_dora", {})
            places[path] = sorted(
                f"r={ranks.get(name)}, scaling={scale:g}, dora={doras.get(name, False)}"
                for name, scale in state.get("scaling", {}).items()
            )
    return places


def said(projections):
    """Projections in a few words."""
    return f"{len(projections)} places, as {next(iter(projections.items()))}" if projections else "no place"


def check_resume(folder, trainer):
    """Refuse a checkpoint of another patch or adapter, or of other lanes; the record of the run otherwise.

    Raises:
        ValueError: names what differs.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise ValueError(
            f"{folder}: was not written by InfiniTrainer ({RECORD} is missing), or with "
            "save_only_model=True: load its weights with AutoInfiniModelForCausalLM and start a new run"
        )
    theirs, ours = json.loads(path.read_text(encoding="utf-8")), describe(trainer)
    was, now = (InfiniConfig.from_dict(side["infini_attention"]) for side in (theirs, ours))
    if was != now:
        raise ValueError(
            f"{folder}: was trained as {was}, and the model is patched as {now}: patch with the same values to "
            "resume, or load the weights and start a new run"
        )
    was, now = (side.get("adapted", ours["adapted"]) for side in (theirs, ours))
    if was != now:
        # The same words may adapt other layers.
        apart = [place for place in sorted({*was, *now}) if was.get(place) != now.get(place)]
        was, now = (
            " and ".join(side["adapters"].values()) or "all weights, without an adapter" for side in (theirs, ours)
        )
        raise ValueError(
            f"{folder}: what was trained there is {was}, and here it is {now}: {len(apart)} layers, as {apart[0]}, "
            "differ; resume with the same, or start a new run in another output_dir"
        )
    was, now = (side.get("projection_sizes", ours["projection_sizes"]) for side in (theirs, ours))
    if was != now:
        raise ValueError(
            f"{folder}: the checkpoint has projections of the memory's own in {said(was)}, and the model in "
            f"{said(now)}: resume with the same "
            "(infini_hf.calibration.add_memory_projections), or start a new run from its weights"
        )
    was, now = (side.get("centered", ours["centered"]) for side in (theirs, ours))
    if was != now:
        raise ValueError(
            f"{folder}: the memory of the checkpoint is calibrated in {len(was) // 2} layers, that of the model in "
            f"{len(now) // 2}: resume with the same (infini_hf.calibration.calibrate_memory; calibration_tokens), or "
            "start a new run from its weights"
        )
    if theirs.get("resting", ours["resting"]) != ours["resting"]:
        other = sorted(set(theirs["resting"]) ^ set(ours["resting"]))
        raise ValueError(
            f"{folder}: {len(other)} parameters, as {other[0]}, are trained in one of the checkpoint and this run and "
            "rest in the other: resume with the same, or start a new run from its weights"
        )
    if theirs["carry_memory"] != ours["carry_memory"]:
        raise ValueError(
            f"{folder}: was trained with carry_memory={theirs['carry_memory']}, and this run has "
            f"carry_memory={ours['carry_memory']}: resume with the same, or start a new run from its weights"
        )
    options = {
        "lanes": "per_device_train_batch_size",
        "processes": "number of processes",
        "row groups": "sequence_parallel_size",
        "micro-batches a step": "gradient_accumulation_steps",
    }
    # What an earlier version did not note.
    missing = {"row groups": theirs["processes"], "micro-batches a step": ours["micro-batches a step"]}
    for name, option in options.items():
        # A run that finds its batch size takes that of the checkpoint.
        found = name == "lanes" and trainer.args.auto_find_batch_size
        if ours["carry_memory"] and not found and theirs.get(name, missing.get(name)) != ours[name]:
            raise ValueError(
                f"{folder}: carries the memory of {theirs[name]} {name}, and this run has {ours[name]}: resume "
                f"with the same {option}"
            )
    return theirs
