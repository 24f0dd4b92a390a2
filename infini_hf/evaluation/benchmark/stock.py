"""Stock models: independent blocks, full attention with a plain or quantised cache, and a sliding window."""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, QuantizedCache

from .contender import Contender, Missing, build_model, choose, greedy, twin_of

WINDOW_FAMILY = "mistral"
# Of transformers' quantised cache, and what has to be installed; fp8 needs nothing.
BACKENDS = {"quanto": "optimum-quanto", "hqq": "hqq", "fp8": "torch"}


class Stock(Contender):
    """A stock model of transformers with its own cache; `decode` goes through its `generate`."""

    READS_CONTEXT = False

    def build(self, weights):
        self.loop = choose(self.text, self.options, "loop", ("generate", "forward"))
        self.model = build_model(self.settings, weights)

    def new_cache(self):
        return DynamicCache(config=self.model.config)

    def say(self, ids, cache, count):
        """The stock loop; the mask says that no token is padding, whatever its id."""
        mask = torch.ones_like(ids)
        self.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, do_sample=False)

    def answer(self, ids):
        self.say(ids, self.new_cache(), 1)

    def after(self, tokens, state=None):
        """A cache filled with random keys and values: what a token costs does not depend on them."""
        cache, settings = self.new_cache() if state is None else twin_of(state), self.settings
        shape = (1, settings.kv_heads, tokens, settings.head_dim)
        for layer in range(settings.layers):
            keys, values = torch.randn(2, *shape, device=self.device, dtype=self.model.dtype)
            cache.update(keys, values, layer)
        return cache

    def decode(self, state, count):
        cache = twin_of(state)
        if self.loop == "forward":
            greedy(self.model, cache, count, self.device)
        else:
            self.say(torch.zeros(1, cache.get_seq_length() + 1, dtype=torch.long, device=self.device), cache, count)


class Blocks(Stock):
    """Independent blocks of a segment: what no memory can be faster than. Decodes after half a segment."""

    MEASURES = ("prefill", "read_on", "decode", "training", "memory", "training_memory")

    def read(self, ids):
        length = self.settings.segment_length
        for chunk in ids.split(self.settings.chunk_size, dim=1):
            self.model.model(chunk.view(-1, length), use_cache=False)

    def after(self, tokens, state=None):
        # Nothing is left of whole segments.
        rest = tokens % self.settings.segment_length
        return super().after(rest) if rest else None

    def read_on(self, state, ids):
        self.read(ids)

    def train(self, ids):
        self.model.train()
        blocks = ids.split(self.settings.segment_length, dim=1)
        for block in blocks:
            loss = checkpoint(self.loss, block, use_reentrant=False) if self.recomputes else self.loss(block)
            (loss / len(blocks)).backward()

    @property
    def recomputes(self):
        return self.options.get("recompute", False)

    def loss(self, block):
        return self.model(block, labels=block, use_cache=False).loss


class Full(Stock):
    """Full attention over the whole input, in one forward."""

    MEASURES = ("prefill", "first_token", "decode", "training", "memory", "training_memory")

    def read(self, ids):
        self.model.model(ids, past_key_values=self.new_cache(), use_cache=True)

    def train(self, ids):
        self.model.train()
        self.model(ids, labels=ids, use_cache=False).loss.backward()


class Quantized(Full):
    """Full attention whose cache holds quantised keys and values."""

    MEASURES = ("prefill", "first_token", "decode", "memory")

    def build(self, weights):
        self.backend = choose(self.text, self.options, "backend", tuple(BACKENDS))
        super().build(weights)
        self.new_cache()

    def new_cache(self):
        try:
            return QuantizedCache(self.backend, self.model.config)
        except ImportError as error:
            package = BACKENDS[self.backend]
            raise Missing(f"{package} is not installed (pip install {package})") from error
        except ValueError as error:
            # An older transformers has fewer backends.
            raise Missing(f"transformers: {error}") from error


class Window(Stock):
    """A stock model with a sliding window, read in chunks of its width: no mask is longer than twice that."""

    MEASURES = ("prefill", "first_token", "read_on", "decode", "memory")

    def build(self, weights):
        self.loop = choose(self.text, self.options, "loop", ("generate", "forward"))
        self.width = self.options.get("width", self.settings.segment_length)
        self.model = build_model(self.settings, weights, WINDOW_FAMILY, sliding_window=self.width)

    def read(self, ids, state=None):
        cache = self.new_cache() if state is None else twin_of(state)
        for start in range(0, ids.shape[1], self.width):
            self.model.model(ids[:, start : start + self.width], past_key_values=cache, use_cache=True)
        return cache

    def answer(self, ids):
        self.say(ids, self.read(ids[:, : -self.width]), 1)

    def read_on(self, state, ids):
        self.read(ids, state)
