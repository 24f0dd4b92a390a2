"""Checkpoints of `InfiniTrainer`: whole ones, with the memory of the lanes beside the weights, and what goes on."""

import torch
from transformers import Trainer

from .checkpoints import check_resume, disown, record_run, resolve_checkpoint
from .lanes import Lanes
from .streaming import require_patched


class ResumableTrainer(Trainer):
    """The part of [`InfiniTrainer`] that begins, resumes and stores a run.

    It is that class's alone, which makes what is stored: `lanes`, `dilution`, `gates`, and the tallies of a step.
    """

    def train(self, resume_from_checkpoint=None, **kwargs):
        """[`transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            ValueError: when the checkpoint is incomplete, or belongs to another patch or another set of lanes.
        """
        resume_from_checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self.gates.start = self.resumed = None
        if resume_from_checkpoint is not None:
            record = check_resume(resume_from_checkpoint, self)
            self.gates.start = {int(index): torch.tensor(gates) for index, gates in record["gates_at_start"].items()}
            self.resumed = resume_from_checkpoint, record
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # A finished run that is resumed: the stock loop would take one step more before it counts them.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def begin_run(self, model):
        """Begin with empty lanes and no dilution, or with those of the checkpoint that is resumed."""
        folder, record = self.resumed or (None, {"dilution": None})
        self.answers.clear()
        self.divergences.clear()
        self.supervision.restart()
        self.dilution.restore(record["dilution"])
        self.lanes = Lanes(self.lanes.config)
        if self.args.carry_memory and folder is not None:
            inner = require_patched(self.accelerator.unwrap_model(model))
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
            record_run(output_dir, self)
        # The state file that makes a checkpoint whole comes after what every rank has to add.
        self.accelerator.wait_for_everyone()
