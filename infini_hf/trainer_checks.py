"""What `InfiniTrainer` refuses before it begins, each by name and with a way out."""

import inspect

from accelerate.utils import DynamoBackend
from transformers.trainer_utils import has_length

from .cache import infini_config_of
from .streaming import require_head
from .training_args import SUPERVISION_WEIGHTS, check_recomputation


def refuse_what_cannot_work(trainer):
    """Raise for what cannot be trained segment after segment.

    Args:
        trainer ([`InfiniTrainer`]): made, and not begun.

    Raises:
        ValueError: when options exclude each other.
        NotImplementedError: for ways of dividing the work that know nothing of segments.
    """
    refuse_launch(trainer)
    refuse_options(trainer)
    if trainer.args.sequence_parallel_size > 1:
        refuse_beside_shared_rows(trainer)


def refuse_launch(trainer):
    """Raise for ways of dividing the work over devices."""
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"{trainer.args.n_gpu} GPUs in one process (DataParallel) copy the model without its memory: launch with "
            "accelerate launch or torchrun, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    plan = trainer.accelerator.parallelism_config
    if plan is not None and max(plan.cp_size, plan.sp_size) > 1:
        raise NotImplementedError(
            "context or sequence parallelism of accelerate splits rows for full attention: set "
            "sequence_parallel_size, or use data parallelism"
        )
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version == 1:
        raise NotImplementedError(
            "FSDP1 allows one forward for one backward, and a step reads many segments: set fsdp_version: 2"
        )
    if plugin is not None and plugin.activation_checkpointing:
        raise ValueError(
            "FSDP activation_checkpointing would write every segment twice: turn it off, InfiniTrainer recomputes "
            "whole segments (recompute_segments=True)"
        )


def refuse_options(trainer):
    """Raise for options that exclude each other, or that the model has no use for."""
    args, data = trainer.args, trainer.train_dataset
    if args.torch_compile:
        raise NotImplementedError(
            "torch_compile=True: a step reads segment after segment into a cache that it branches, and compiled "
            "training was not tried; leave it out"
        )
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        raise NotImplementedError(
            f"dynamo_backend={plugin.backend.value!r} of accelerate: compiled training was not tried; set it to no"
        )
    if args.neftune_noise_alpha:
        raise NotImplementedError(
            f"neftune_noise_alpha={args.neftune_noise_alpha}: its noise is scaled by the tokens that one call reads, "
            "which are a segment here and not the row; leave it out, or use the stock Trainer"
        )
    in_stream = data is not None and not has_length(data)
    if args.carry_memory and in_stream and args.save_strategy == "epoch" and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "save_strategy='epoch' with carry_memory=True, a stream and gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: a pass may end inside a step, whose rows a resumed run would read "
            "again into lanes that hold them; set save_strategy='steps'"
        )
    if args.carry_memory and args.accelerator_config.split_batches and args.world_size > 1:
        raise NotImplementedError(
            "accelerator_config.split_batches with carry_memory=True on several processes: lanes are dealt out for a "
            "batch of each process; leave it out, and set per_device_train_batch_size"
        )
    if args.carry_memory and getattr(args, "enable_jit_checkpoint", False):
        raise NotImplementedError(
            "enable_jit_checkpoint with carry_memory=True: it saves between a backward pass and its step, when the "
            "lanes have read the rows already that a resumed run would read again; leave it out, and save often"
        )
    rule = infini_config_of(trainer.lanes.config).memory_update
    if args.memory_dilution > 1 and rule != "linear":
        raise ValueError(
            f"memory_dilution={args.memory_dilution} with memory_update={rule!r}: a scaled write equals repeated ones "
            "under the linear rule alone; patch with memory_update='linear', or leave memory_dilution at 1"
        )
    for name in SUPERVISION_WEIGHTS:
        # A search over hyperparameters sets options on arguments that were made without them.
        check_recomputation(args, name)
        if getattr(args, name) and rule != "linear":
            raise ValueError(
                f"{name}={getattr(args, name)} with memory_update={rule!r}: what a memory returns is a mean of the "
                "values written under the linear rule alone; patch with memory_update='linear', or leave it at 0"
            )
    in_order = args.train_sampling_strategy == "sequential" or in_stream
    if args.carry_memory and args.auto_find_batch_size and in_order:
        raise ValueError(
            "auto_find_batch_size with carry_memory=True and rows in an order of their own: that order is made for "
            f"per_device_train_batch_size={args.per_device_train_batch_size}, which could change; leave one out"
        )
    if trainer.model is not None:
        refuse_losses(trainer.model)
        trainer.supervision.check(trainer.model)
    if trainer.distillation is None:
        if args.distillation_weight is not None:
            raise ValueError(
                f"distillation_weight={args.distillation_weight} without a teacher: pass InfiniTrainer(teacher=...)"
            )
        return
    if args.carry_memory:
        raise ValueError(
            "carry_memory=True with a teacher: the teacher sees a row alone, and would teach to forget what the "
            "memory brings from the rows before; use rows as long as the teacher can read, or leave one of them out"
        )
    trainer.distillation.check_student(trainer.lanes.config)


def refuse_losses(model):
    """Raise for a loss that is not that of the segments' targets, added up."""
    function = require_head(model).loss_function
    # What takes both, as the stock loss does, is asked with both.
    if not {"shift_labels", "num_items_in_batch"} <= inspect.signature(function).parameters.keys():
        raise NotImplementedError(
            f"model.loss_function is {getattr(function, '__qualname__', function)!r}: segments come with targets that "
            "are shifted already, and with the count of a whole step: take shift_labels and num_items_in_batch, or "
            "use the stock Trainer, which reads whole rows"
        )
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        # A PEFT type is a text of its own kind.
        if getattr(adapter, "peft_type", None) == "ADALORA":
            raise NotImplementedError(
                f"adapter {name!r} is an AdaLoRA, which adds its regulariser to the loss of every call: a row "
                "would get it once for each segment; use the stock Trainer, or LoRA (infini_hf.lora.lora_config)"
            )


def refuse_beside_shared_rows(trainer):
    """Raise for what is not there for rows that several ranks read together."""
    args, stock = trainer.args, trainer.lanes.cache.stock_layers
    size = f"sequence_parallel_size={args.sequence_parallel_size}"
    unsupported = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor parallelism": trainer.get_tp_size() > 1,
        "a model that was sharded when it was loaded": getattr(trainer, "is_distributed_loading_by_transformers", 0),
        f"layers {sorted(stock)} that the patch leaves stock": stock,
        "train_sampling_strategy='batch_rebalance'": args.train_sampling_strategy == "batch_rebalance",
        "dispatch_batches": args.accelerator_config.dispatch_batches,
        f"memory_dilution={args.memory_dilution}": args.memory_dilution > 1,
        **{f"{name}={getattr(args, name)}": getattr(args, name) for name in SUPERVISION_WEIGHTS},
        "a teacher": trainer.distillation is not None,
        # Lanes stand at different places of their documents.
        f"carry_memory and per_device_train_batch_size={args.per_device_train_batch_size}": (
            args.carry_memory and args.per_device_train_batch_size > 1
        ),
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise NotImplementedError(
            f"{size} with {found[0]}: rows that ranks read together know nothing of it; leave one of them out"
        )
    if args.bptt_segments and args.bptt_segments % args.sequence_parallel_size:
        raise ValueError(
            f"bptt_segments={args.bptt_segments} with {size}: the state is cut after a segment of every rank; take a "
            f"multiple of {args.sequence_parallel_size}"
        )
