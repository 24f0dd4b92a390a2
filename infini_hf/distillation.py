"""A teacher that reads the same rows with full attention: what the memory has lost, it still sees.

The loss of a step adds the divergence KL(teacher ‖ student) at every position that is learned from (Hinton et al.,
arXiv 1503.02531). The teacher's hidden states are computed for the whole row, its logits for a segment at a time, so
that neither's logits of a whole row ever exist.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .output_head import logits_of
from .patching import is_patched
from .segment_step import IGNORED


class Distillation:
    """A frozen teacher, and how much its opinion counts.

    Args:
        teacher (`PreTrainedModel`): a stock causal language model with the student's tokenizer, on its device. It is
            put into evaluation mode, and nothing here gives it a gradient.
        weight (`float`, *optional*, defaults to `1.0`): what the divergence counts in the loss.
        temperature (`float`, *optional*, defaults to `1.0`): τ, by which the logits of both are divided; the
            divergence is multiplied by τ², so that its gradient stays of one size.

    Raises:
        TypeError: when the teacher is no causal language model of transformers.
        ValueError: when it is patched.
        NotImplementedError: when its logits are not those of its output head.
    """

    def __init__(self, teacher, weight=1.0, temperature=1.0):
        if not isinstance(teacher, PreTrainedModel) or teacher.get_output_embeddings() is None:
            raise TypeError(
                f"teacher is a {type(teacher).__name__}: pass a causal language model, as from "
                "AutoModelForCausalLM.from_pretrained"
            )
        if is_patched(teacher):
            raise ValueError(
                "the teacher is patched: it has to read with full attention; load another instance with "
                "AutoModelForCausalLM.from_pretrained"
            )
        self.teacher, self.weight, self.temperature = teacher.eval(), weight, temperature
        config = teacher.config.get_text_config(decoder=True)
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size
        # Of every step since the last log, nats a token.
        self.steps = []
        self.check_head()

    @torch.no_grad()
    def check_head(self):
        """Refuse a teacher whose logits are made in a way that [`head`] does not know, on a few tokens."""
        ids = torch.arange(min(8, self.vocabulary), device=self.teacher.device)[None]
        expected = self.teacher(input_ids=ids, use_cache=False).logits.float()
        # A hundredth of the largest logit is a few roundings of bfloat16.
        if (self.head(self.hidden_states(ids)) - expected).abs().max() > 0.01 * expected.abs().max():
            raise NotImplementedError(
                f"a teacher of type {self.teacher.config.model_type!r}: its logits are not those of its output head "
                "on its last hidden state; take a teacher of a supported family"
            )

    def check_student(self, config):
        """Refuse a student whose tokens are others.

        Raises:
            ValueError: names both vocabularies.
        """
        ours = config.get_text_config(decoder=True).vocab_size
        if ours != self.vocabulary:
            raise ValueError(
                f"the teacher has a vocabulary of {self.vocabulary} tokens and the student one of {ours}: take a "
                "teacher with the student's tokenizer"
            )

    def hidden_states(self, input_ids, attention_mask=None):
        return self.teacher.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def head(self, hidden):
        """The teacher's logits, float32, for hidden states `(..., hidden_size)`."""
        return logits_of(self.teacher, hidden)

    @torch.no_grad()
    def read(self, segments):
        """Segments like those given, with what the teacher makes of them as parts of one row.

        Args:
            segments (`list[infini_hf.segment_step.Segment]`): a batch, cut.

        Returns:
            `list[infini_hf.segment_step.Segment]`

        Raises:
            ValueError: when the row is longer than the teacher's positions.
        """
        ids = torch.cat([segment.input_ids for segment in segments], dim=1)
        if ids.shape[1] > self.positions:
            raise ValueError(
                f"a row of {ids.shape[1]} tokens, and the teacher has {self.positions} positions "
                "(max_position_embeddings): use shorter rows, or a teacher with a longer context"
            )
        masked = segments[0].attention_mask is not None
        mask = torch.cat([segment.attention_mask for segment in segments], dim=1) if masked else None
        hidden = self.hidden_states(
            ids.to(self.teacher.device), mask if mask is None else mask.to(self.teacher.device)
        )
        parts = hidden.split([segment.input_ids.shape[1] for segment in segments], dim=1)
        return [replace(segment, teacher=part) for segment, part in zip(segments, parts, strict=True)]

    def note(self, divergence):
        """Count the divergence of a step, of all ranks together."""
        self.steps.append(divergence)

    def metrics(self):
        """What is logged: the mean divergence of the steps since this was last asked, in nats a token."""
        steps, self.steps = self.steps, []
        return {"distillation_kl": sum(steps) / len(steps)} if steps else {}

    def divergence(self, logits, hidden, targets):
        """The sum over learned positions of τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), in nats.

        Args:
            logits (`torch.Tensor`): `(tokens, vocab_size)` float32, the student's.
            hidden (`torch.Tensor`): `(tokens, hidden_size)`, the teacher's last hidden states.
            targets (`torch.Tensor`): `(tokens,)` int64; -100 where nothing is learned.

        Returns:
            `torch.Tensor`: a float32 scalar.
        """
        learned = targets != IGNORED
        with torch.no_grad():
            expected = self.head(hidden[learned.to(hidden.device)]).to(logits.device)
            expected = F.log_softmax(expected / self.temperature, dim=-1)
        found = F.log_softmax(logits[learned] / self.temperature, dim=-1)
        return self.temperature**2 * F.kl_div(found, expected, reduction="sum", log_target=True)
