"""What training watches: the gates, the memory, the gradient that reaches the writes; and where the lanes stand."""

import logging
from collections import defaultdict
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .attention import InfiniAttention
from .gate import ACTIVATIONS
from .sharding import gathered

logger = logging.getLogger(__name__)

PREFIX = "memory_gate/"
# An optimizer of Adam's kind moves a logit by about the learning rate a step.
FAR_ENOUGH = 4.0
FEWEST_SEGMENTS = 4
# A head has moved when its gate has left its start by this much, of 1.
MOVED = 0.01


class MemoryGateCallback(TrainerCallback):
    """Watches the gates of a run, warns when they cannot move, and draws them at the end.

    For each layer: the mean and the extremes of the gates `g`, the share of heads whose gate has moved by more than
    0.01, and, from [`InfiniTrainer`], the norm of the memory (the mean over the rows of the last micro-batch) and that
    of the gradient reaching the writes (the sum over the rows and segments of the step, on this rank).

    Args:
        plot (`bool`, *optional*, defaults to `True`): draw `memory_gates.png` into the output folder at the end.
    """

    def __init__(self, plot=True):
        self.plot = plot
        self.start = None
        self.memory_norms = {}
        self.write_gradients = defaultdict(float)
        # Segments of the longest row before the first log.
        self.longest = 0
        self.warned = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.write_gradients.clear()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        # A resumed run measures from where it began first.
        self.start = gate_values(model) if self.start is None else self.start
        gates = {id(parameter) for gate in live_gates(model).values() for parameter in gate.parameters(False)}
        # The rate that a schedule leads to: it begins at zero when it warms up.
        rates = [
            group.get("initial_lr", group["lr"])
            for group in optimizer.param_groups
            if any(id(parameter) in gates for parameter in group["params"])
        ]
        self.warn_of_gates_at_rest(model)
        # A wrapped optimizer may hold copies of the parameters: then there is nothing to say.
        rate = max(rates, default=None)
        if rate is not None and rate * state.max_steps < FAR_ENOUGH:
            logger.warning(
                "the gates can hardly move: learning rate %g × %d steps = %.2g, and a gate has to travel about %g. "
                "Raise memory_gate_learning_rate, or train for more steps",
                rate,
                state.max_steps,
                rate * state.max_steps,
                FAR_ENOUGH,
            )

    def warn_of_gates_at_rest(self, model):
        """Say when no memory can ever be read: gates at zero that nobody trains, and nobody closed on purpose."""
        gates = live_gates(model).values()
        trained = any(gate.bias.requires_grad or gate.closed for gate in gates)
        if not trained and not any(values.any() for values in self.start.values()):
            logger.warning(
                "no gate is trained, and all are at zero: the memory is written and never read. Make adapters with "
                "infini_hf.lora.lora_config or add_lora, or give LoraConfig modules_to_save=['memory_gate']"
            )

    def note_row(self, segments):
        """Count the segments of a micro-batch."""
        self.longest = max(self.longest, segments)

    def warn_of_short_rows(self):
        """Say, once, when none of the rows before the first log was long enough to learn a memory from."""
        if 0 < self.longest < FEWEST_SEGMENTS and not self.warned:
            logger.warning(
                "rows of at most %d segments: a memory is learned from what is read back later, and fewer than %d "
                "segments a row leave little of it. Use longer rows or shorter segments",
                self.longest,
                FEWEST_SEGMENTS,
            )
        self.warned = True

    def watch(self, index, cache):
        """Note the gradient that reaches what the segments before `index` have written."""
        # What enters the first segment is nothing, or was written in an earlier row, without a gradient.
        for layer_index, layer in cache.infini_layers.items() if index else ():
            if layer.memory.requires_grad:
                layer.memory.register_hook(lambda gradient, at=layer_index: self._add(at, gradient))

    def _add(self, layer_index, gradient):
        # Row by row: the sum over a step is then the same however its rows are divided into micro-batches.
        self.write_gradients[layer_index] += gradient.detach().float().flatten(1).norm(dim=1).sum()

    def note_memory(self, cache):
        """Keep the norms of the memories after a row."""
        self.memory_norms = {
            index: layer.memory.detach().flatten(1).norm(dim=1).mean() for index, layer in cache.infini_layers.items()
        }

    def metrics(self, model):
        """What is logged: `{"memory_gate/layer_0/mean": …}` and the like, and the summary `memory_gate_moved`."""
        self.warn_of_short_rows()
        values, metrics, moved = gate_values(model), {}, []
        for index, gates in values.items():
            name = f"{PREFIX}layer_{index}/"
            shift = torch.zeros_like(gates) if self.start is None else (gates - self.start[index]).abs()
            moved.append((shift > MOVED).float().mean().item())
            metrics |= {
                f"{name}mean": gates.mean().item(),
                f"{name}min": gates.min().item(),
                f"{name}max": gates.max().item(),
                f"{name}moved": moved[-1],
            }
            if index in self.memory_norms:
                metrics[f"{name}memory_norm"] = float(self.memory_norms[index])
            if index in self.write_gradients:
                metrics[f"{name}write_gradient"] = float(self.write_gradients[index])
        metrics["memory_gate_moved"] = sum(moved) / max(1, len(moved))
        return metrics

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not self.plot:
            return
        values = gate_values(model)
        if state.is_world_process_zero and values:
            draw_gates(values, Path(args.output_dir) / "memory_gates.png")


class RunCallback(TrainerCallback):
    """Begins a run where it has to, counts its micro-batches, and tells the sampler its epoch.

    Args:
        trainer ([`InfiniTrainer`]): whose run.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Not earlier: the layers are on their devices only now.
        self.trainer.begin_run(model)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.micro_batch = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.note_step()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.lane_sampler is not None:
            self.trainer.lane_sampler.set_epoch(int(state.epoch or 0))


def quiet_console(trainer):
    """Put quiet ones in the place of the stock console callbacks of a trainer; what users have made of them stays."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(one := quiet(type(callback))())
            vars(one).update(vars(callback))


def quiet(kind):
    """A console callback of class `kind` that leaves the numbers of single layers to the log files and says of a
    progress bar what it counts."""

    class Quiet(kind):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            describe_bar(self, "training_bar", "training")

        def on_prediction_step(self, *args, **kwargs):
            super().on_prediction_step(*args, **kwargs)
            describe_bar(self, "prediction_bar", "evaluation")

        def on_log(self, args, state, control, logs=None, **kwargs):
            shown = {name: value for name, value in (logs or {}).items() if not name.startswith(PREFIX)}
            super().on_log(args, state, control, logs=shown, **kwargs)

    Quiet.__name__ = kind.__name__
    return Quiet


def describe_bar(callback, name, description):
    """Put a description in front of a bar of a [`transformers.ProgressCallback`], if it has one now."""
    bar = vars(callback).get(name)
    if bar is not None and bar.desc != f"{description}: ":
        bar.set_description(description)


def live_gates(model):
    """The gate of every patched layer that computes, by the index of the layer.

    PEFT keeps others beside it: a frozen copy, and those of the adapters that are not active.
    """
    layers = (module for module in model.modules() if isinstance(module, InfiniAttention))
    return {layer.layer_idx: layer.memory_gate.itself for layer in layers}


@torch.no_grad()
def gate_values(model):
    """`{layer: (num_heads,) float32}` on the CPU: the gates `g`, 0 for local attention alone, 1 for memory alone."""
    values, gates = {}, live_gates(model)
    with gathered([gate.bias for gate in gates.values()]):
        for index, gate in gates.items():
            bias = gate.bias.full_tensor() if isinstance(gate.bias, DTensor) else gate.bias
            values[index] = ACTIVATIONS[gate.kind](bias.float()).cpu()
    return values


def draw_gates(values, path):
    """Draw the layer × head map of `{layer: (num_heads,)}` into a PNG; without matplotlib, say so and go on."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture of the gates: install matplotlib (pip install matplotlib)")
        return
    table = torch.stack([values[index] for index in sorted(values)]).numpy()
    figure = Figure(figsize=(2 + 0.35 * table.shape[1], 1.5 + 0.3 * table.shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    reach = max(0.01, float(abs(table).max()))
    image = axes.imshow(table, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(len(values)), [str(index) for index in sorted(values)])
    axes.set(xlabel="head", ylabel="layer", title="memory gates: 0 local attention alone, 1 memory alone")
    figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
