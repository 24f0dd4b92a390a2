"""The package infini-transformer-pytorch at equal shapes, read, decoded and trained as its own wrapper does it.

It has no grouped-query attention: its keys and values have as many heads as its queries. It computes the logits of
every token; they are left out here where the others leave them out.
"""

import torch

from .contender import Contender, Missing
from .settings import DTYPES

NAME = "infini-transformer-pytorch"


class Package(Contender):
    """`InfiniTransformer`; `detach=2`, its own default, cuts the gradient every two segments and keeps activations."""

    MEASURES = ("prefill", "first_token", "read_on", "decode", "training", "memory", "training_memory")

    def build(self, weights):
        try:
            from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
        except ImportError as error:
            raise Missing(f"{NAME} is not installed (pip install infini-transformer-pytorch)") from error
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = InfiniTransformer(
            num_tokens=settings.vocab_size,
            dim=settings.width,
            depth=settings.layers,
            dim_head=settings.head_dim,
            heads=settings.heads,
            # Its inner size is the whole part of mult · dim · 2/3.
            ff_mult=(settings.intermediate + 0.5) * 3 / (2 * settings.width),
            use_mem_delta_rule=self.options.get("delta", False),
        )
        self.model.to(self.device, DTYPES[settings.dtype]).eval()
        self.head = self.model.to_logits
        detach = self.options.get("detach", 2)
        self.trainer = InfiniTransformerWrapper(
            self.model, segment_length=settings.segment_length, detach_mems_every_num_segments=detach
        )

    def states(self, ids, memories=None):
        """Hidden states of the last segment, what an open one leaves, and the memories after the whole ones."""
        length, open_keys, hidden = self.settings.segment_length, None, None
        self.model.to_logits = torch.nn.Identity()
        try:
            for segment in ids.split(length, dim=1):
                whole = segment.shape[1] == length
                hidden, open_keys, memories = self.model(segment, past_memories=memories, return_new_memories=whole)
        finally:
            self.model.to_logits = self.head
        return hidden, open_keys, memories

    def read(self, ids):
        self.states(ids)

    def answer(self, ids):
        self.head(self.states(ids)[0][:, -1:]).argmax(-1)

    def after(self, tokens, state=None):
        _, open_keys, memories = self.states(self.ids(tokens), None if state is None else state[1])
        return open_keys, memories

    def read_on(self, state, ids):
        self.states(ids, state[1])

    def decode(self, state, count):
        open_keys, memories = state
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(count):
            logits, open_keys, memories = self.model(token, past_memories=memories, cached_kv=open_keys)
            token = logits[:, -1:].argmax(-1)

    def train(self, ids):
        # It takes the last token for a target only.
        self.trainer(torch.cat([ids, ids[:, :1]], dim=1), backward=True)
