"""The patched model, through what a user calls: `prefill`, `generate`, a step of the trainer, a plain call."""

import copy
from dataclasses import fields

import torch

from ...cache import InfiniCache
from ...config import InfiniConfig
from ...patching import patch_model
from ...segment_step import StepOptions, cut_segments, segment_major_loss, shift_labels
from ...streaming import generate, prefill
from .contender import Contender, build_model, choose, greedy


class Infini(Contender):
    """Infini-attention with open gates; trains segment-major and recomputed, as `InfiniTrainer` does by default."""

    MEASURES = ("prefill", "first_token", "read_on", "decode", "training", "memory", "training_memory")

    def build(self, weights):
        self.loop = choose(self.text, self.options, "loop", ("generate", "static", "forward"))
        self.order = choose(self.text, self.options, "order", ("segment", "layer"))
        own = {"num_key_value_heads": self.options["kv_heads"]} if "kv_heads" in self.options else {}
        names = {item.name for item in fields(InfiniConfig)}
        chosen = {name: value for name, value in self.options.items() if name in names}
        self.config = InfiniConfig(self.settings.segment_length, **chosen)
        self.model = patch_model(build_model(self.settings, None if own else weights, **own), self.config)
        for name, parameter in self.model.named_parameters():
            if name.endswith("memory_gate.bias"):
                torch.nn.init.normal_(parameter)

    def read(self, ids, state=None):
        cache = InfiniCache(self.model.config) if state is None else copy.copy(state)
        return prefill(self.model, ids, cache=cache, chunk_size=self.settings.chunk_size, progress=False)

    def answer(self, ids):
        generate(self.model, ids, max_new_tokens=1, do_sample=False)

    def after(self, tokens, state=None):
        return self.read(self.ids(tokens), state)

    def read_on(self, state, ids):
        self.read(ids, state)

    def decode(self, state, count):
        cache = copy.copy(state)
        if self.loop == "forward":
            greedy(self.model, cache, count, self.device)
        else:
            start = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            static = {"cache_implementation": "static"} if self.loop == "static" else {}
            generate(self.model, start, cache=cache, max_new_tokens=count, do_sample=False, **static)

    def train(self, ids):
        self.model.train()
        if self.order == "layer":
            loss = self.model(ids, labels=ids, use_cache=False).loss
        else:
            segments = cut_segments(ids, None, shift_labels(ids), self.settings.segment_length)
            options = StepOptions(recompute=self.options.get("recompute", True))
            cache = InfiniCache(self.model.config)
            loss, _ = segment_major_loss(self.model, segments, cache, ids.shape[1] - 1, options)
        loss.backward()
