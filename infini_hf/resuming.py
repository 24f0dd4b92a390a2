"""Checkpoints of `InfiniTrainer`: whole ones, with the memory of the lanes beside the weights, and what goes on."""

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from .checkpoints import check_resume, disown, record_run, resolve_checkpoint
from .lora_base import check_same_base, samples_of
from .streaming import require_patched


class ResumableTrainer(Trainer):
    """The part of [`InfiniTrainer`] that begins, resumes and stores a run.

    It is that class's alone, which makes what is stored: `lanes`, `dilution`, `gates`, the tallies of a step,
    and what it takes from its arguments (`set_up`, `keep_float32`).
    """

    def train(self, resume_from_checkpoint=None, **kwargs):
        """[`transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            ValueError: when the checkpoint is incomplete, or belongs to another patch, adapter, base of an
                adapter or set of lanes.
        """
        resume_from_checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self.gates.start = self.resumed = None
        self.epoch_start = 0, 0, 0
        if resume_from_checkpoint is not None:
            record = check_resume(resume_from_checkpoint, self)
            check_same_base(resume_from_checkpoint, record.get("base_samples", {}), self.model)
            self.gates.start = {int(index): torch.tensor(gates) for index, gates in record["gates_at_start"].items()}
            self.resumed = resume_from_checkpoint, record
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _init_training_state(self, *args, **kwargs):
        epoch, batches = super()._init_training_state(*args, **kwargs)
        place = None if self.resumed is None else self.resumed[1].get("place")
        if place is None or has_length(self.train_dataset):
            return epoch, batches
        # The stock trainer takes a stream to have no end, and would look for its place in the first pass.
        if self.args.ignore_data_skip:
            return place["epoch"], 0
        # Whole steps, whose micro-batches may be others than they were.
        steps = place["rows"] // (self._rows_at_once() * self.args.gradient_accumulation_steps)
        return place["epoch"], steps * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args, epoch, epochs_trained=0, steps_trained_in_current_epoch=0, **kwargs):
        # A finished run that is resumed: the stock loop would take one step more before it counts them.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        skipped = steps_trained_in_current_epoch if self.resumed and epoch == epochs_trained else 0
        self.epoch_start = epoch, self.state.global_step, skipped
        kwargs |= {"epochs_trained": epochs_trained, "steps_trained_in_current_epoch": steps_trained_in_current_epoch}
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def place(self):
        """How often the data was read before, and the rows of it read since: where a stream goes on."""
        epoch, step, skipped = self.epoch_start
        steps = self.state.global_step - step
        batches = skipped + steps * self.args.gradient_accumulation_steps
        return {"epoch": epoch, "rows": batches * self._rows_at_once()}

    def _rows_at_once(self):
        """Rows of a micro-batch of all processes."""
        return self._train_batch_size * self.args.row_groups

    def _load_from_checkpoint(self, *args, **kwargs):
        # Before: what is loaded into bfloat16 is rounded to it.
        self.keep_float32()
        super()._load_from_checkpoint(*args, **kwargs)

    def begin_run(self, model):
        """Begin with empty lanes, no dilution and no count, or with those of the checkpoint that is resumed."""
        inner = require_patched(self.accelerator.unwrap_model(model))
        self.set_up(inner.config)
        folder, record = self.resumed or (None, {"dilution": None})
        self.answers.clear()
        self.divergences.clear()
        self.dilution.restore(record["dilution"])
        if self.args.carry_memory and folder is not None:
            self.lanes.load(self._lane_file(folder), inner.get_decoder())

    def _lane_file(self, folder):
        return f"{folder}/lanes_{self.args.process_index}.safetensors"

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            disown(self._get_output_dir(trial=trial), self.state.global_step)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.carry_memory:
            self.lanes.save(self._lane_file(output_dir))
        if self.args.should_save:
            record_run(output_dir, self, base_samples=samples_of(self.model))
        # The state file that makes a checkpoint whole comes after what every rank has to add.
        self.accelerator.wait_for_everyone()
