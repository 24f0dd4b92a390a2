"""`InfiniTrainer`: the stock `Trainer` over rows of any length, read segment after segment through the memory."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from .batch_columns import LANE_COLUMNS, NO_LABELS, ROW_COLUMNS, WEIGHTS, check_columns
from .cache import InfiniCache, infini_config_of
from .callbacks import MemoryGateCallback, RunCallback, quiet_console
from .data.collator import InfiniCollator
from .data.lane_order import LaneSampler, lane_column
from .data.whole_stream import filled_stream, whole_stream
from .dilution import MemoryDilution
from .distillation import Distillation
from .lanes import Lanes
from .parameter_groups import keep_float32, part_memory
from .resuming import ResumableTrainer
from .segment_step import (
    IGNORED,
    StepObserver,
    StepOptions,
    cut_segments,
    score_segments,
    segment_major_loss,
    shift_labels,
    shift_weights,
)
from .shared_rows import SharedRows
from .streaming import require_patched
from .supervision import MemorySupervision
from .trainer_checks import refuse_what_cannot_work
from .training_args import InfiniTrainingArguments

logger = logging.getLogger(__name__)


class InfiniTrainer(ResumableTrainer):
    """[`transformers.Trainer`] whose steps carry the memory through rows of any length.

    A row is read segment after segment; the gradient goes back through the whole memory at the activation cost of one
    segment. Evaluation streams too, and its loss is the mean over all tokens.

    Args:
        model (`PreTrainedModel`): a patched model, wrapped by PEFT or not.
        args ([`InfiniTrainingArguments`], *optional*): the arguments.
        data_collator (`Callable`, *optional*): [`infini_hf.data.collator.InfiniCollator`] by default.
        teacher (`PreTrainedModel`, *optional*): a stock causal model that reads each row with full attention, and that
            the loss holds this one to; see [`infini_hf.distillation`].
        kwargs: everything else that `Trainer` takes.

    Raises:
        TypeError: when `args` are of another kind.
        ValueError: when the model is not patched.
        NotImplementedError: for what cannot work segment by segment, by name.
    """

    def __init__(self, model=None, args=None, data_collator=None, *, teacher=None, **kwargs):
        args = InfiniTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, InfiniTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}: pass infini_hf.InfiniTrainingArguments")
        if kwargs.get("compute_loss_func") is not None:
            raise NotImplementedError(
                "compute_loss_func needs the logits of whole rows, and InfiniTrainer never holds them: use the stock "
                "Trainer, whose steps are layer-major"
            )
        # The stock trainer writes its own value into the config, which is saved with the model.
        use_cache = None if model is None else require_patched(model).config.use_cache
        if data_collator is None and kwargs.get("processing_class") is not None:
            data_collator = InfiniCollator(kwargs["processing_class"])
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        config = require_patched(self.model).config
        # A model of model_init is made anew, with its own value, when training begins.
        config.use_cache = True if use_cache is None else use_cache
        # Smoothing happens in each segment.
        self.label_smoother = None
        self.gates = MemoryGateCallback(plot=args.plot_memory_gates)
        self.add_callback(self.gates)
        self.add_callback(RunCallback(self))
        quiet_console(self)
        self.distillation = None if teacher is None else self._distillation(teacher)
        self.lane_sampler = self.resumed = self.scored = None
        # Since the last step: counts of the emphasised targets, `(2,)` int64 each, divergences, and micro-batches.
        self.answers, self.divergences, self.micro_batch = [], [], 0
        self.set_up(config)
        size = args.sequence_parallel_size
        self.shared_rows = None if size == 1 else SharedRows(self.accelerator, size, self.lanes.config)

    def set_up(self, config):
        """Take what a run needs from the arguments as they are now, and refuse what cannot work.

        A search over hyperparameters sets them on a trainer that is made, and has `model_init` make other models.

        Args:
            config (`PreTrainedConfig`): that of the patched model.
        """
        args = self.args
        if self.distillation is not None:
            self.distillation.weight = args.distillation_weight or 1.0
            self.distillation.temperature = args.distillation_temperature
        self.options = StepOptions(
            # A step over shared rows goes on by a segment of every rank.
            bptt_segments=args.bptt_segments and args.bptt_segments // args.sequence_parallel_size,
            recompute=args.recompute_segments,
            offload=args.offload_memory_states,
            label_smoothing=args.label_smoothing_factor,
            distillation=self.distillation,
        )
        self.dilution = MemoryDilution.from_args(args)
        self.supervision = MemorySupervision.from_args(args)
        self.lanes = Lanes(config)
        refuse_what_cannot_work(self)

    def _distillation(self, teacher):
        if isinstance(teacher, torch.nn.Module):
            self._move_model_to_device(teacher, self.args.device)
        return Distillation(teacher)

    # Data

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ROW_COLUMNS, WEIGHTS]))

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # A dataset in an order of its own is held to lane order when its rows are read.
        if not self.args.carry_memory or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        columns = [lane_column(dataset, name) for name in LANE_COLUMNS]
        # Smaller than that of the arguments where auto_find_batch_size has made it so.
        lanes = self._train_batch_size * self.args.row_groups
        self.lane_sampler = LaneSampler(*columns, lanes, seed)
        return self.lane_sampler

    def get_train_dataloader(self):
        with nullcontext() if self.shared_rows is None else self.shared_rows.dealing():
            return super().get_train_dataloader()

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        world = self.args.world_size
        dataset = whole_stream(dataset, world) if is_training else filled_stream(dataset, world, batch_size * world)
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def get_cp_size(self):
        # By what the stock trainer knows of processes that share rows, it counts tokens and rows.
        return super().get_cp_size() * self.args.sequence_parallel_size

    # Steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, read segment after segment; see [`infini_hf.segment_step`]."""
        read = partial(self._read_rows, model)
        return super().compute_loss(read, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def _read_rows(self, model, input_ids=None, labels=None, num_items_in_batch=None, **others):
        document, part, dilute, sources = (others.pop(name, None) for name in ROW_COLUMNS)
        if labels is None:
            raise ValueError(NO_LABELS)
        if self.shared_rows is None:
            segments, filling = self._cut(input_ids, labels, **others)
            longest = len(segments)
        else:
            check_columns(input_ids, others)
            segments, longest = self.shared_rows.cut(input_ids, labels, **others)
            filling = 0
        # Of processes that share rows, each has its part of a target.
        size = self.args.sequence_parallel_size
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORED).sum() / size
        # A batch in which nothing is learned has the loss 0, not 0 / 0.
        num_items = torch.as_tensor(num_items_in_batch, device=input_ids.device).clamp_min(1 / size)
        cache = self.lanes.open(document, part) if self.args.carry_memory else InfiniCache(self.lanes.config)
        if self.shared_rows is not None:
            cache = self.shared_rows.split(cache)
        self.gates.note_row(longest)
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=True)
        scale = self._write_scale(dilute, segments)
        options = replace(self.options, wrapper=model, filling=filling, write_scale=scale)
        if self.distillation is not None:
            segments = self.distillation.read(segments)
        # The gradient of a state that ranks exchange is on the one that sent it.
        watch = self.gates.watch if self._logs_this_step() and self.shared_rows is None else None
        mask = others.get("attention_mask")
        with self.supervision.reading(inner, input_ids, labels, sources, mask, cache.seen, scale, watch) as told:
            observer = StepObserver(told.begin, self.answers.append, self.divergences.append)
            loss, cache = segment_major_loss(inner, segments, cache, num_items, options, observer)
        cost = told.loss / num_items
        self.supervision.costs.append(cost.detach())
        if self._logs_this_step():
            self.gates.note_memory(cache)
        if self.args.carry_memory:
            self.lanes.close(document, part, cache if self.shared_rows is None else cache.to_infini_cache())
        return {"loss": loss + cost}

    def _write_scale(self, dilute, segments):
        """How many times the segments of a micro-batch are written, drawn for it alone; `None` for once."""
        self.dilution.advance(self.state.global_step / max(1, self.state.max_steps))
        place = (self.args.seed, self.args.process_index, self.state.global_step, self.micro_batch)
        self.micro_batch += 1
        scale = self.dilution.draw(segments[0].input_ids.shape[0], len(segments), *place)
        return scale if scale is None or dilute is None else torch.where(dilute.cpu()[:, None], scale, 1.0)

    def _cut(self, input_ids=None, labels=None, attention_mask=None, loss_weights=None, trim=True, **others):
        """Segments of a batch, and how many more calls of the model this rank owes to the others."""
        check_columns(input_ids, others)
        length = infini_config_of(self.lanes.config).segment_length
        targets = None if labels is None else shift_labels(labels)
        weights = None if loss_weights is None else shift_weights(loss_weights)
        segments = cut_segments(input_ids, attention_mask, targets, length, trim, weights)
        if self.args.world_size == 1:
            return segments, 0
        calls = torch.tensor([len(segments)], device=input_ids.device)
        return segments, int(self.accelerator.gather(calls).max()) - len(segments)

    def _logs_this_step(self):
        step = self.state.global_step + 1
        return self.args.logging_strategy != "steps" or step == 1 or step % max(1, self.state.logging_steps) == 0

    def keep_float32(self):
        """See [`infini_hf.parameter_groups.keep_float32`]; FSDP and DeepSpeed have a dtype for all of a layer."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            keep_float32(self.model)

    def create_optimizer(self, model=None):
        """The stock optimizer, with the gates and the memory's projections in parameter groups of their own."""
        self.keep_float32()
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        part_memory(optimizer, self.model if model is None else model, self.args)
        return optimizer

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self.dilution.metrics(), **self.gates.metrics(self.model), **self.supervision.metrics()}
            logs |= {} if self.distillation is None else self.distillation.metrics()
        super().log(logs, start_time)

    def note_step(self):
        """Gather what the last step has shown, of all ranks together: answers that were right, and the divergence."""
        # Every rank takes part, whether it met answers or not.
        counts = torch.stack([torch.zeros(2, dtype=torch.int64, device=self.args.device), *self.answers]).sum(0)
        self.dilution.note(*self.accelerator.gather(counts[None]).sum(0).tolist())
        # A loss is that of the tokens of all ranks, or of each rank's own.
        ranks = 1 if self.args.average_tokens_across_devices else self.args.world_size
        if self.distillation is not None:
            shares = torch.stack([torch.zeros((), device=self.args.device), *self.divergences]).sum(0)
            self.distillation.note(self.accelerator.gather(shares[None]).sum().item() / ranks)
        told = self.supervision.shares.to(self.args.device)
        self.supervision.note(self.accelerator.gather(told[None]).sum(0), ranks)
        self.answers.clear()
        self.divergences.clear()

    # Evaluation

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self.scored = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.scored.tolist()
        if tokens:
            # The stock value is a mean of means, in which tokens of short rows count for more.
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
            output.metrics[f"{metric_key_prefix}_tokens"] = int(tokens)
        elif f"{metric_key_prefix}_loss" in output.metrics:
            logger.warning("no label of the evaluation counts, all are masked: its loss is no number")
            output.metrics[f"{metric_key_prefix}_loss"] = float("nan")
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a batch, streamed with a memory of its own; logits of whole rows only where they are asked for."""
        inputs = self._prepare_inputs(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in ROW_COLUMNS}
        labels = inputs.get("labels")
        with self.compute_loss_context_manager():
            segments, filling = self._cut(**inputs, trim=prediction_loss_only)
            cache = InfiniCache(self.lanes.config)
            losses, counts, logits = score_segments(model, segments, cache, not prediction_loss_only, filling)
        # Rows that were repeated to fill the last batch are left out.
        gathered = self.accelerator.gather_for_metrics((losses, counts))
        if self.scored is not None:
            self.scored += torch.stack([part.cpu().double().sum() for part in gathered])
        loss = None if labels is None else losses.sum() / counts.sum().clamp_min(1)
        return loss, logits, labels
