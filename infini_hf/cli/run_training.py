"""A training run from its rows to its model card: what the training scripts end with."""

import json
from pathlib import Path

from huggingface_hub import upload_folder
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints import last_whole_checkpoint, resolve_checkpoint
from ..model_card import CARD, FOLDER, RESULTS, evaluate_with_control, write_model_card
from ..trainer import InfiniTrainer

# Written last: what it says of a folder holds.
SUMMARY = "training.json"


def train_and_report(args, model, tokenizer, rows, eval_rows, base, data, command):
    """Train or resume, save into `OUTPUT_DIR/final`, evaluate with the closed memory as control, write the card.

    With `push_to_hub` that folder is uploaded as it then is. A run that is complete already is neither saved nor
    described again: its card tells how it was trained.

    Args:
        args ([`infini_hf.InfiniTrainingArguments`]): the arguments of the run.
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        rows, eval_rows: the datasets; without `eval_rows` nothing is evaluated.
        base (`str`): name of the checkpoint that is trained from.
        data (`str`): what it is trained on.
        command (`str`): the command that does it again.

    Returns:
        `dict`: as from [`infini_hf.model_card.evaluate_with_control`].

    Raises:
        ValueError: when the data gave no step to train.
        KeyboardInterrupt: after Ctrl-C, with a sentence that says what goes on from where.
    """
    trainer = InfiniTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer
    )
    start = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if args.resume_from_checkpoint is None:
        start = last_whole_checkpoint(args.output_dir)
    elif start is None and (older := last_whole_checkpoint(args.output_dir)) is not None:
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint} with {older} of another run in output_dir: later "
            "nothing would tell its checkpoints from those of the new run; give another output_dir, or remove them"
        )
    before, final = steps_of(start), Path(args.output_dir) / "final"
    described = read_summary(final).get("steps")
    # Of a complete run the last checkpoint may be gone, where the best one or none is kept.
    goes_on = described == before or args.resume_from_checkpoint is None
    if described is not None and goes_on and described >= args.max_steps > 0:
        return keep_results(trainer, final, described, args.max_steps)
    if start is not None:
        say(trainer, f"resumed from {start}, after {before:,} steps")
    try:
        metrics = trainer.train(resume_from_checkpoint=start).metrics
        steps = trainer.state.global_step
        if steps == 0:
            why = "the data gave no batch" if args.max_steps else "give at least 1, or -1 for num_train_epochs"
            raise ValueError(f"max_steps={args.max_steps}: no step was trained: {why}, and {final} was not written")
        if described == before == steps:
            return keep_results(trainer, final, steps, trainer.state.max_steps)
        if trainer.is_world_process_zero():
            (final / SUMMARY).unlink(missing_ok=True)
        # The trainer would upload the whole output_dir here, without card and results.
        trainer.save_model(str(final), _internal_call=True)
        results = evaluate_with_control(trainer)
        card = write_model_card(trainer, final, base, data, command, results, steps_before=before)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(args.output_dir, trainer.state)) from None
    summary = {"steps": steps, "steps_before": before, "seconds": metrics["train_runtime"]}
    summary["loss"] = last_loss(trainer.state, before, metrics)
    if trainer.is_world_process_zero():
        (final / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    say(trainer, *report_lines(summary, trainer.state.max_steps, results, final, card))
    publish(trainer, final)
    return results


def publish(trainer, final):
    """Upload a folder as the model that a run's repository of the hub shows, where the run is to be pushed."""
    if not trainer.args.push_to_hub:
        return
    # Pushes of checkpoints go on in the background.
    trainer._finish_current_push()
    if trainer.is_world_process_zero():
        # A run that was not to be pushed at first did not know the name.
        card, name = final / CARD, f'"{trainer.hub_model_id}"'
        card.write_text(card.read_text(encoding="utf-8").replace(f'"{FOLDER}"', name), encoding="utf-8")
        options = {"token": trainer.args.hub_token, "revision": trainer.args.hub_revision}
        upload_folder(
            repo_id=trainer.hub_model_id, folder_path=final, commit_message="Trained, with its card", **options
        )
        say(trainer, f"hub         {trainer.hub_model_id}")


def say(trainer, *lines):
    """Print, once of all processes."""
    if trainer.is_world_process_zero():
        print(*lines, sep="\n", flush=True)


def steps_of(checkpoint):
    """The steps that a checkpoint was trained for; 0 for none."""
    if checkpoint is None:
        return 0
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def read_summary(final):
    """What the run that wrote a folder noted at its end; nothing when it did not come to it."""
    whole = all((final / name).is_file() for name in (SUMMARY, CARD, RESULTS))
    return json.loads((final / SUMMARY).read_text(encoding="utf-8")) if whole else {}


def keep_results(trainer, final, steps, asked):
    """Say that nothing is left to train, and return the results that are there."""
    say(
        trainer,
        f"already complete: {steps:,} of {asked:,} steps in {trainer.args.output_dir}; give another output_dir, or "
        f"more max_steps. Nothing was trained or written; {final / CARD} says how it was trained",
    )
    publish(trainer, final)
    return json.loads((final / RESULTS).read_text(encoding="utf-8"))


def how_to_go_on(output_dir, state):
    """What Ctrl-C leaves."""
    checkpoint = last_whole_checkpoint(output_dir)
    stopped = f"stopped after {state.global_step:,} of {state.max_steps:,} steps"
    if checkpoint is None:
        return f"{stopped}, before the first checkpoint (save_steps): the same command begins again"
    return f"{stopped}: the same command goes on from {checkpoint}"


def last_loss(state, before, metrics):
    """The training loss logged last, else the mean of the run; `None` where neither is that of this run."""
    logged = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["step"] > before]
    # The stock mean is over all steps, those before a resumption too, whose losses it does not know.
    return logged[-1] if logged else None if before else metrics["train_loss"]


def report_lines(summary, asked, results, final, card):
    """What a run has come to, a line for each thing that one wants to know."""
    steps, before, loss = (summary[name] for name in ("steps", "steps_before", "loss"))
    parts = [f"{steps:,} of {asked:,} steps" + (f", {before:,} of them before" if before else "")]
    parts += [f"{summary['seconds']:,.0f} s"] + ([] if loss is None else [f"last training loss {loss:.4f}"])
    losses = ", ".join(f"{metrics['loss']:.4f} {name}" for name, metrics in results.items())
    tokens = f" ({next(iter(results.values()))['tokens']:,} tokens)" if results else ""
    return [
        f"trained     {', '.join(parts)}",
        f"evaluation  {'loss ' + losses + tokens if results else 'none: no evaluation data was given'}",
        f"model       {final}",
        f"card        {card}",
    ]
