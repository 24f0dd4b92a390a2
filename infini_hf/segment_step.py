"""One training step, segment after segment: exact backpropagation through time at the activation cost of one.

Every segment but the last is one call of `torch.utils.checkpoint` whose inputs and outputs are the whole carried
state, so that the graph of a step holds that state once a segment and the activations of the segment at work alone.
The last segment is the first that the backward pass needs: it keeps its activations. The last that reads a token is
the one call that goes through the wrapper of data parallelism, which counts one forward for one backward.
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .heap import release_free_pages
from .step_options import StepObserver, StepOptions

IGNORED = -100
# Tokens in a segment from which its work outweighs a look at the heap, a millisecond.
WORTH_RELEASING = 256
# Pages that go back are cleared when they return, so not before every segment: of 16 segments of 1,024 tokens a step
# took 26.0, 23.6 and 21.5 s of a processor with pages given back before each, before every second and never, and at
# most 943, 996 and 1,746 MiB (4 layers of width 512, float32).
RELEASE_EVERY = 2


@dataclass
class Segment:
    """The columns of one segment, each `(batch, columns)` or `None`: ids, padding mask, targets and their weights.

    `teacher` holds a teacher's last hidden states, `(batch, columns, hidden_size of the teacher)`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    teacher: torch.Tensor | None = None


def shift_labels(labels):
    """What each position predicts, `(batch, seq_len)` int64; the last position of a row predicts nothing.

    Shifted once on the whole row: labels shifted inside each segment would lose the first token of every one.
    """
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()


def shift_weights(weights):
    """What the loss of each position's target counts, `(batch, seq_len)` float32, from the weights of the tokens."""
    return F.pad(weights.float(), (0, 1))[:, 1:].contiguous()


def used_columns(input_ids, attention_mask, targets=None):
    """Columns up to the last token of the longest row, or the last that is learned from, at least one.

    Targets at padding are learned by the stock trainer, and counted among those that a loss is divided by.
    """
    if attention_mask is None:
        return input_ids.shape[1]
    used = attention_mask.any(0)
    used = (used if targets is None else used | (targets != IGNORED).any(0)).nonzero()
    return max(1, int(used[-1]) + 1 if len(used) else 0)


def cut_segments(input_ids, attention_mask, targets, length, trim=True, weights=None):
    """Cut a batch into segments of `length` columns.

    Args:
        input_ids (`torch.Tensor`): `(batch, seq_len)` int64.
        attention_mask (`torch.Tensor`, *optional*): `(batch, seq_len)`, 0 at padding.
        targets (`torch.Tensor`, *optional*): `(batch, seq_len)` int64, as from [`shift_labels`].
        length (`int`): columns of a segment.
        trim (`bool`, *optional*, defaults to `True`): leave out the columns after the last token of the longest row
            and the last target.
        weights (`torch.Tensor`, *optional*): `(batch, seq_len)` float32, what the loss of each target counts.

    Returns:
        `list[Segment]`
    """
    columns = used_columns(input_ids, attention_mask, targets) if trim else input_ids.shape[1]
    wholes = [None if whole is None else whole[:, :columns] for whole in (input_ids, attention_mask, targets, weights)]
    return [
        Segment(*(None if whole is None else whole[:, start : start + length].contiguous() for whole in wholes))
        for start in range(0, columns, length)
    ]


def filling_of(segments):
    """A segment of two tokens that are not learned from: what a rank reads so that all call the model equally often.

    Of real tokens, so that it reaches every parameter, as ranks that reduce gradients layer by layer expect.
    """
    ids = segments[0].input_ids[:, :1].repeat(1, 2)
    return Segment(ids, None, None if segments[0].targets is None else torch.full_like(ids, IGNORED))


def forgotten(cache):
    """An empty cache like `cache`, which stays as it is."""
    twin = copy.copy(cache)
    twin.reset()
    return twin


def segment_major_loss(model, segments, cache, num_items, options=StepOptions(), observer=StepObserver()):
    """The loss of a row read segment after segment, with gradients through the memory.

    Args:
        model (`torch.nn.Module`): the patched causal model, not wrapped by data parallelism.
        segments (`list[Segment]`): the segments in order, as from [`cut_segments`].
        cache ([`InfiniCache`]): what the rows remember; it is not changed.
        num_items (`int` or `torch.Tensor`): tokens that the sum of the losses is divided by, those of the whole batch.
        options ([`StepOptions`]): truncation, recomputation, offloading, scaled writes, the teacher.
        observer ([`StepObserver`]): who is told of the step.

    Returns:
        `tuple[torch.Tensor, InfiniCache]`: the loss, a float32 scalar, and the cache after the last segment.

    Raises:
        NotImplementedError: for scaled writes of rows that are split over ranks.
    """
    if options.write_scale is not None and cache.is_split:
        raise NotImplementedError(
            "write_scale with rows that are split over ranks: its columns are the segments of whole rows; pass "
            "memory_scale for the segments of each rank's run to the model, or leave dilution out"
        )
    total, began, length = 0.0, cache.seen, cache.infini_config.segment_length
    wrapped = -1 if options.wrapper is None else last_with_tokens(segments)
    for _ in range(options.filling):
        total = total + read_segment(model, filling_of(segments), forgotten(cache), num_items, options, True)[0]
    for index, segment in enumerate(segments):
        if options.bptt_segments and index and index % options.bptt_segments == 0:
            cache = cache.with_tensors(tensor.detach() for tensor in cache.tensors())
        if observer.watch is not None:
            observer.watch(index, cache)
        last = index + 1 == len(segments)
        target = options.wrapper if index == wrapped else model
        scale = None if options.write_scale is None else scale_now(options.write_scale, began, cache.seen, length)
        recompute = options.recompute and not last
        release = recompute and index % RELEASE_EVERY == 0 and segment.input_ids.numel() >= WORTH_RELEASING
        loss, *notes, cache = read_segment(target, segment, cache, num_items, options, recompute, scale, release)
        for tell, note in zip((observer.tally, observer.divergence), notes, strict=True):
            if tell is not None and note is not None:
                tell(note)
        total = total + loss
    return total, cache


def last_with_tokens(segments):
    """The last segment that reads something: it reaches every parameter, as data parallelism expects of its call."""
    for index in range(len(segments) - 1, 0, -1):
        mask = segments[index].attention_mask
        if mask is None or bool(mask.any()):
            return index
    return 0


def scale_now(write_scale, began, seen, length):
    """The columns of `write_scale` for what rows close next, `(batch, 2)`: a call of `length` columns closes one."""
    rows, columns = write_scale.shape
    began = began or (0,) * rows
    closed = [now // length - before // length for now, before in zip(seen or began, began, strict=True)]
    index = torch.tensor([[min(count, columns - 1), min(count + 1, columns - 1)] for count in closed])
    return write_scale.gather(1, index.to(write_scale.device))


def read_segment(model, segment, cache, num_items, options, recompute, scale=None, release=False):
    """What [`segment_loss`] returns of one segment, and the cache after it; `release` gives free pages back before."""
    state = cache.tensors()
    # What stays alive until the backward pass holds no tensor of the state: those are the arguments.
    empty = cache.with_tensors(None for _ in state)

    # Random numbers, as of dropout, are kept for the devices of the arguments alone, and a first segment has no state.
    device = segment.input_ids.new_empty(0)

    def read(device, *state):
        if release:
            release_free_pages(segment.input_ids.device)
        twin = empty.with_tensors(state)
        return *segment_loss(model, segment, twin, num_items, options, scale), twin

    if not recompute or not torch.is_grad_enabled():
        return read(device, *state)
    # Recomputation saves nothing but its arguments: these are what goes to the CPU.
    pin = any(tensor.is_cuda for tensor in state)
    with save_on_cpu(pin_memory=pin) if options.offload else contextlib.nullcontext():
        return checkpoint(read, device, *state, use_reentrant=False)


def segment_loss(model, segment, cache, num_items, options=StepOptions(), scale=None):
    """The sum of the losses of a segment's targets over `num_items`, and what an observer is told of it.

    It is the model's own loss where neither weights, smoothing nor a teacher are asked for.

    Returns:
        `tuple`: the loss; the counts of the emphasised targets, `(2,)` int64, or `None`; the divergence or `None`.
    """
    inputs = {
        "input_ids": segment.input_ids,
        "attention_mask": segment.attention_mask,
        "past_key_values": cache,
        "use_cache": True,
        **({} if scale is None else {"memory_scale": scale}),
    }
    if not options.label_smoothing and segment.weights is None and segment.teacher is None:
        targets = {"labels": segment.targets, "shift_labels": segment.targets, "num_items_in_batch": num_items}
        return model(**inputs, **targets).loss, None, None
    logits = model(**inputs).logits.float().flatten(0, 1)
    targets = segment.targets.flatten().to(logits.device)
    loss, counts = target_loss(logits, targets, segment.weights, options.label_smoothing)
    if segment.teacher is None:
        return loss / num_items, counts, None
    divergence = options.distillation.divergence(logits, segment.teacher.flatten(0, 1), targets) / num_items
    return loss / num_items + options.distillation.weight * divergence, counts, divergence.detach()


def target_loss(logits, targets, weights, label_smoothing):
    """The summed loss of targets `(tokens,)` under logits `(tokens, vocab_size)`, and the counts of the emphasised."""
    kind = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum", **kind), None
    weights = weights.flatten().to(logits.device)
    losses = F.cross_entropy(logits, targets, reduction="none", **kind)
    emphasised = (weights > 1) & (targets != IGNORED)
    correct = (logits.detach().argmax(-1) == targets) & emphasised
    return (losses * weights).sum(), torch.stack([correct.sum(), emphasised.sum()])


@torch.no_grad()
def score_segments(model, segments, cache, keep_logits=False, filling=0):
    """Loss of every row, at constant memory.

    Args:
        model (`torch.nn.Module`): the patched causal model.
        segments (`list[Segment]`): as from [`cut_segments`].
        cache ([`InfiniCache`]): an empty cache; it holds the rows afterwards.
        keep_logits (`bool`, *optional*, defaults to `False`): return the logits of the whole row too.
        filling (`int`, *optional*, defaults to 0): calls more that add nothing, for ranks that share parameters.

    Returns:
        `tuple`: summed losses `(batch,)` float32 in nats, numbers of targets `(batch,)` int64, and the logits
        `(batch, seq_len, vocab_size)` or `None`.
    """
    batch, device = segments[0].input_ids.shape[0], segments[0].input_ids.device
    losses = torch.zeros(batch, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    kept = []
    for _ in range(filling):
        model(input_ids=filling_of(segments).input_ids, past_key_values=forgotten(cache), use_cache=True)
    for segment in segments:
        logits = model(
            input_ids=segment.input_ids, attention_mask=segment.attention_mask, past_key_values=cache, use_cache=True
        ).logits
        if segment.targets is not None:
            targets = segment.targets.to(logits.device)
            parts = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            losses += parts.sum(1).to(device)
            counts += (segment.targets != IGNORED).sum(1)
        if keep_logits:
            kept.append(logits)
    return losses, counts, torch.cat(kept, dim=1) if keep_logits else None
