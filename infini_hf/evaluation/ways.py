"""Ways to read the same texts with the same weights, from the memory as patched to full attention of the stock model.

A way is written as its name with options behind it, `"overlap:segment=512:overlap=128:sinks=4"`:

    memory       as patched                                                          segment, overlap, sinks
    closed       the gates shut, the same window                                     segment, overlap, sinks
    hard         the gates shut, blocks of a segment, no overlap and no sinks        segment
    overlap      the gates shut, the overlap and the sinks that are named            segment, overlap, sinks
    txl          the gates shut, a whole segment of overlap: a Transformer-XL        segment
    other        as patched, with the memory of another document                     segment, overlap, sinks
    full         full attention without the patch, in a window that slides           window, stride
    full_past    full attention without the patch over one long prefix               length

What is not named is the patch's own. A window of `full` is as long as the model was trained on, 8,192 tokens at most.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..attention import InfiniAttention
from ..cache import InfiniCache, infini_config_of
from ..inputs import input_device
from ..output_head import logits_of
from ..patching import install_patch, unpatch_model
from ..streaming import prefill, require_patched, score
from .controls import another_window, closed_memory

WINDOW = {"segment": "segment_length", "overlap": "overlap", "sinks": "sink_tokens"}
OPTIONS = {
    "memory": tuple(WINDOW),
    "closed": tuple(WINDOW),
    "hard": ("segment",),
    "overlap": tuple(WINDOW),
    "txl": ("segment",),
    "other": tuple(WINDOW),
    "full": ("window", "stride"),
    "full_past": ("length",),
}
# The longest window of full attention that nobody has to ask for, in tokens.
LONGEST = 8192
# Positions whose logits are held at once.
PIECE = 1024


@dataclass(frozen=True)
class Way:
    """A way to read.

    Attributes:
        text (`str`): as it was written.
        name (`str`): one of `OPTIONS`.
        options (`dict[str, int]`): those that were named, in tokens.
    """

    text: str
    name: str
    options: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text):
        """`"name:key=value:…"`.

        Raises:
            ValueError: for a name or an option that is none, or a value that is no number of tokens.
        """
        name, *parts = text.split(":")
        if name not in OPTIONS:
            raise ValueError(f"way {text!r}: must be one of {', '.join(OPTIONS)}")
        options = {}
        for part in parts:
            key, _, value = part.partition("=")
            if key not in OPTIONS[name] or not (value.isascii() and value.isdigit()):
                known = ", ".join(f"{key}=TOKENS" for key in OPTIONS[name])
                raise ValueError(f"way {text!r}: {part!r} is no option of {name!r}; it takes {known}")
            options[key] = int(value)
        if name == "overlap" and not options.keys() & {"overlap", "sinks"}:
            raise ValueError(f"way {text!r}: name the overlap or the sinks, as in overlap:overlap=128:sinks=4")
        if 0 in (options.get("window"), options.get("stride"), options.get("length")):
            raise ValueError(f"way {text!r}: window, stride and length must be at least 1")
        return cls(text, name, options)

    @property
    def patched(self):
        """Whether the patch stays on."""
        return not self.name.startswith("full")

    def window(self, patch):
        """The [`InfiniConfig`] it reads under, from that of the model."""
        changes = {WINDOW[key]: value for key, value in self.options.items()}
        length = changes.get("segment_length", patch.segment_length)
        if self.name in ("hard", "txl"):
            changes |= {"overlap": length if self.name == "txl" else 0, "sink_tokens": 0}
        return replace(patch, **changes)

    def slide(self, config):
        """How full attention moves over a text.

        Args:
            config (`PreTrainedConfig`): the config of the model.

        Returns:
            `tuple[int, int, int | None]`: tokens in a window, in a step, and to read at most (`None` for all).

        Raises:
            ValueError: for a stride beyond the window, or a prefix that nobody named and few machines hold.
        """
        trained = config.get_text_config(decoder=True).max_position_embeddings
        if self.name == "full_past":
            length = self.options.get("length", 4 * trained)
            if "length" not in self.options and trained > LONGEST:
                raise ValueError(
                    f"way {self.text!r}: the model was trained on {trained:,} positions, and its prefix would be "
                    f"{length:,} tokens in one forward; name it, as in full_past:length={2 * trained}"
                )
            return length, length, length
        window = self.options.get("window", min(trained, LONGEST))
        stride = self.options.get("stride", max(1, window // 2))
        if stride > window:
            raise ValueError(f"way {self.text!r}: a stride of {stride} passes over tokens; at most window={window}")
        return window, stride, None


def losses_of_texts(model, way, texts, progress=True):
    """What each token costs, read in one way.

    Args:
        model (`PreTrainedModel`): a patched model; afterwards it is what it was.
        way ([`Way`]): the way.
        texts (`list[torch.Tensor]`): `(1, tokens)` ids of each text.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar over the texts.

    Returns:
        `list[torch.Tensor]`: `(tokens - 1,)` float32 for each text, in nats; shorter where the way does not reach.

    Raises:
        ValueError: when the model is not patched, the window is none, or `other` has no other text of a segment.
    """
    inner = require_patched(model)
    if not way.patched:
        slide = way.slide(inner.config)
        with stock(inner):
            return [sliding_losses(inner, ids, *slide) for ids in tqdm(texts, desc=way.text, disable=not progress)]
    window = way.window(infini_config_of(inner.config))
    if way.name == "other":
        lenders = lenders_of(texts, window.segment_length)
    shut = way.name in ("closed", "hard", "overlap", "txl")
    losses = []
    with another_window(inner, window), closed_memory(inner) if shut else nullcontext():
        for index, ids in enumerate(tqdm(texts, desc=way.text, disable=not progress)):
            if way.name == "other":
                losses.append(other_memory_losses(inner, ids, lenders[index]))
            else:
                losses.append(score(inner, ids, progress=False)[0])
    return losses


def lenders_of(texts, length):
    """For each text the one that lends it its memory; `None` for one that ends with its first segment: it asks none.

    Raises:
        ValueError: when there is none for a text that needs one.
    """
    return [lender_of(texts, index, length) if ids.shape[1] > length + 1 else None for index, ids in enumerate(texts)]


def lender_of(texts, index, length):
    """The text before number `index`, around the end, that is as long as a segment at least: it lends its memory.

    Raises:
        ValueError: when no other text is: a shorter one writes nothing.
    """
    for step in range(1, len(texts)):
        if texts[index - step].shape[1] >= length:
            return texts[index - step]
    raise ValueError(
        f"way 'other': reads text {index} with the memory of another, and of {len(texts)} none other has the {length} "
        "tokens of a segment; give more texts, or leave the way out"
    )


@contextmanager
def stock(model):
    """A patched model without its patch inside the `with`; the patch comes back with the same gates."""
    patch = infini_config_of(model.config)
    configs = [(part, part.config) for part in model.modules() if "config" in vars(part)]
    gates = {path: part.memory_gate for path, part in model.named_modules() if isinstance(part, InfiniAttention)}
    unpatch_model(model)
    try:
        yield model
    finally:
        # What there is to say of this patch was said when it was made.
        install_patch(model, patch)
        for path, gate in gates.items():
            model.get_submodule(path).memory_gate = gate
        # The patch made a config of its own; others may hold the one that was there.
        for part, config in configs:
            part.config = config
        model.config.infini_attention = patch.to_dict()


@torch.no_grad()
def sliding_losses(model, ids, window, stride, reach=None):
    """Losses of the stock model over a window that slides.

    The first window counts whole. Each later one moves on by `stride` and counts its last `stride` tokens alone, so
    that every token is counted once and has at least `window - stride` before it. A beginning-of-text token stays in
    front of every window, as the first of its tokens: heads rest their attention there (arXiv 2309.17453), and without
    it full attention would be far weaker than it is.

    Args:
        model (`PreTrainedModel`): a model that is not patched.
        ids (`torch.Tensor`): `(1, tokens)` int64.
        window (`int`): tokens that are read at once.
        stride (`int`): tokens from a window to the next, at most `window`.
        reach (`int`, *optional*): tokens to read at most; all by default.

    Returns:
        `torch.Tensor`: `(tokens - 1,)` float32 in nats, on the device of `ids`; `(reach,)` where that is less.
    """
    device, losses, done = input_device(model), [], 0
    total = ids.shape[1] - 1 if reach is None else min(reach, ids.shape[1] - 1)
    begun = ids[0, :1].tolist() == [model.config.get_text_config(decoder=True).bos_token_id]
    while done < total:
        end = min(total, done + (stride if done else window))
        start = max(0, end - window)
        part = ids[:, start:end]
        if start and begun:
            # In place of the oldest token; before it, where all of them are counted.
            part = torch.cat([ids[:, :1], ids[:, min(done, start + 1) : end]], dim=1)
        hidden = model.get_decoder()(part.to(device), use_cache=False).last_hidden_state[0, done - end :]
        targets = ids[0, done + 1 : end + 1]
        for states, wanted in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
            loss = F.cross_entropy(logits_of(model, states), wanted.to(states.device), reduction="none")
            losses.append(loss.to(ids.device))
        done = end
    return torch.cat(losses) if losses else torch.zeros(0)


@torch.no_grad()
def other_memory_losses(model, ids, other):
    """Losses of a patched model whose memory is that of another text: `(tokens - 1,)` float32, on the device of `ids`.

    Before every segment, M and z of each layer are replaced by those that the model has after as many segments of
    `other`, read for itself; the local window stays that of `ids`. So the memory is as full and as well-formed as the
    text's own, and knows nothing of it. Where `other` is shorter its last memory stays.
    """
    length = infini_config_of(model.config).segment_length
    cache, donor = InfiniCache(model.config), InfiniCache(model.config)
    losses, device = [], input_device(model)
    for start in range(0, ids.shape[1] - 1, length):
        if start:
            prefill(model, other[:, start - length : start], cache=donor, progress=False)
            for layer, source in zip(cache.infini_layers.values(), donor.infini_layers.values(), strict=True):
                layer.memory, layer.memory_norm = source.memory, source.memory_norm
        part = ids[:, start : start + length].to(device)
        logits = model(part, past_key_values=cache, use_cache=True).logits[0].float()
        targets = ids[0, start + 1 : start + 1 + length].to(device)
        loss = F.cross_entropy(logits[: len(targets)], targets, reduction="none")
        losses.append(loss.to(ids.device))
    return torch.cat(losses) if losses else torch.zeros(0)
