"""What every contender can be asked for, and how one is written: `NAME:OPTION=VALUE:…`."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .settings import DTYPES

FAMILY = "llama"


class Missing(Exception):
    """A contender that cannot run here; the message names what is missing."""


def build_model(settings, weights=None, family=FAMILY, **overrides):
    """A random model of the benchmark's shape.

    Args:
        settings ([`BenchmarkSettings`]): the shape.
        weights (`dict[str, torch.Tensor]`, *optional*): the weights of another one, to be shared; drawn from the seed
            by default.
        family (`str`, *optional*, defaults to `"llama"`): `model_type` of a stock model with the same parameters.
        overrides: other values of the config.

    Returns:
        `PreTrainedModel`: in evaluation mode, on the device of the settings.
    """
    shape = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.width,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.longest,
        "tie_word_embeddings": False,
        # A random model would stop where it pleases.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **(shape | overrides))
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[settings.dtype], attn_implementation=settings.attention
        )
    if weights is not None:
        model.load_state_dict(weights, assign=True)
    return model.eval()


def greedy(model, cache, count, device):
    """Say so many tokens after what a cache holds, one forward each, without the loop of `generate`."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(count):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def choose(text, options, name, choices):
    """The value of an option that is one of a few words, the first by default.

    Raises:
        ValueError: when it is none of them.
    """
    value = options.get(name, choices[0])
    if value not in choices:
        raise ValueError(f"{text!r}: {name} must be {' or '.join(choices)}")
    return value


def twin_of(cache):
    """A copy of a stock cache that shares its tensors, which its updates replace and do not change."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


class Contender:
    """One way to read, decode and learn.

    Args:
        text (`str`): as it was written.
        settings ([`BenchmarkSettings`]): of the benchmark.
        options (`dict`): those of its kind.
        weights (`dict[str, torch.Tensor]`, *optional*): shared with the other contenders; its own by default.

    Raises:
        Missing: when a package that it needs is not installed.
        ValueError: when an option has a value that is none.
    """

    # The measures that it takes part in, and whether a context has to be read before it can be continued (a cache of
    # keys and values is filled with random ones instead).
    MEASURES = ()
    READS_CONTEXT = True

    def __init__(self, text, settings, options, weights=None):
        self.text, self.settings, self.options = text, settings, options
        self.device = torch.device(settings.device)
        self.build(weights)

    def build(self, weights):
        """Make the model."""
        raise NotImplementedError

    def ids(self, tokens):
        """Token ids `(1, tokens)`, the same for every contender."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randint(self.settings.vocab_size, (1, tokens), generator=generator).to(self.device)

    @property
    def parameters(self):
        """`int`: parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def context_key(self):
        """What two contenders have in common that share a model, and the contexts that one of them has read."""
        return type(self), *sorted((name, value) for name, value in self.options.items() if name != "loop")

    # What is timed.

    def read(self, ids):
        """Read an input, without logits."""
        raise NotImplementedError

    def answer(self, ids):
        """Read an input and say one token."""
        raise NotImplementedError

    def read_on(self, state, ids):
        """Read after a context; the state stays as it is."""
        raise NotImplementedError

    def decode(self, state, count):
        """Say so many tokens after a context; the state stays as it is."""
        raise NotImplementedError

    def train(self, ids):
        """The forward and backward pass of one step."""
        raise NotImplementedError

    # What is not.

    def after(self, tokens, state=None):
        """What is left of a context of so many tokens, or of so many more after a state."""
        raise NotImplementedError

    def clear(self):
        """Forget the gradients of a step."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
