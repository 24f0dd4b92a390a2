"""A training run from its rows to its model card: what the training scripts end with."""

from pathlib import Path

from ..checkpoints import last_whole_checkpoint
from ..model_card import evaluate_with_control, write_model_card
from ..trainer import InfiniTrainer


def train_and_report(args, model, tokenizer, rows, eval_rows, base, data, command):
    """Train or resume, save into `OUTPUT_DIR/final`, evaluate with the closed memory as control, write the card.

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
    """
    trainer = InfiniTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last_whole_checkpoint(args.output_dir))
    final = Path(args.output_dir) / "final"
    trainer.save_model(str(final))
    results = evaluate_with_control(trainer)
    card = write_model_card(trainer, final, base, data, command, results)
    if trainer.is_world_process_zero():
        print(card)
    return results
