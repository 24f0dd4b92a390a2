"""The settings of a `generate` call that decide what the cache has to hold, and where each row of its output ended."""

import torch
from torch.nn import functional as F
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

# Criteria that take the place of those that `generate` makes itself, and so have to be passed on as they are.
OWN_KINDS = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
# Names of caches of which a cache that is continued is one already.
OWN_CACHES = ("dynamic", "offloaded")
# What a beam search puts after the end of a row where no token ends texts.
NO_TOKEN = -1
NO_ROLLBACK = (
    "assisted decoding takes tokens back, and an InfiniCache cannot be cropped: what is written in the memory cannot "
    "be taken out; generate without an assistant"
)


class RowEnds(StoppingCriteria):
    """Other criteria, and where they ended each row.

    Args:
        criteria (`list[StoppingCriteria]`): one after the other, at every token.

    Attributes:
        ends (`torch.Tensor`, *optional*): `(rows,)` int64, columns of a row when it ended, 0 where it did not.
    """

    def __init__(self, criteria):
        self.criteria, self.ends = StoppingCriteriaList(criteria), None
        for item in criteria:
            # By this attribute transformers knows that rows end one by one, and pads those that have.
            if hasattr(item, "eos_token_id"):
                self.eos_token_id = item.eos_token_id

    def __call__(self, input_ids, scores, **kwargs):
        done = self.criteria(input_ids, scores, **kwargs)
        ends = torch.zeros_like(done, dtype=torch.int64) if self.ends is None else self.ends
        self.ends = torch.where(done & (ends == 0), input_ids.shape[1], ends)
        return done


class GenerationOptions:
    """The few settings of a `generate` call that decide what the cache has to hold.

    Args:
        inner (`PreTrainedModel`): the patched model.
        kwargs (`dict`): what `generate` was called with.
    """

    def __init__(self, inner, kwargs):
        defaults = [kwargs.get("generation_config"), inner.generation_config]
        self.given, self.defaults = kwargs, [config.to_dict() for config in defaults if config is not None]
        self.criteria = list(kwargs.get("stopping_criteria") or ())
        eos = next((item.eos_token_id for item in self.criteria if isinstance(item, EosTokenCriteria)), None)
        eos = self._get("eos_token_id") if eos is None else eos
        self.eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        pad = self._get("pad_token_id")
        self.pad = pad if pad is not None else self.eos[0] if self.eos else None
        self.implementation = self._get("cache_implementation")
        self.is_static = self.implementation == "static"
        self.beams = self._get("num_beams") or 1
        # What a beam search of transformers puts after the end of a row; it takes a pad of 0 for none.
        self.fill = (pad or self.eos[0]) if self.eos else NO_TOKEN
        self.rows_per_input = max(self.beams, self._get("num_return_sequences") or 1)
        self.watch = self._watch()

    def _get(self, name):
        # As in transformers: what the call says counts, `None` too, which in a config is no word.
        if name in self.given:
            return self.given[name]
        return next((values[name] for values in self.defaults if values.get(name) is not None), None)

    def _watch(self):
        """A [`RowEnds`] of what may end one row before the others, end-of-text tokens apart; `None` without."""
        watched = [item for item in self.criteria if type(item) not in OWN_KINDS]
        strings, tokenizer = self._get("stop_strings"), self.given.get("tokenizer")
        mine = [item for item in self.criteria if isinstance(item, StopStringCriteria)]
        if strings and tokenizer is not None and not mine:
            # It keeps nothing from token to token, so that two of them say the same.
            mine = [StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
        return RowEnds(watched + mine) if watched or mine else None

    def refuse_rollback(self):
        """Refuse to decode with an assistant of any kind, before one changes the model's config.

        Raises:
            NotImplementedError: names the option.
        """
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            # Of beams transformers does without what a config asks for, and says so.
            value = self.given.get(name) if self.beams > 1 else self._get(name)
            if value is not None and value is not False:
                raise NotImplementedError(f"{name}: {NO_ROLLBACK}")

    def check_ends(self, rows):
        """Refuse a search in which the end of a row could not be told from its padding.

        Raises:
            ValueError: for beams of several rows that other criteria end, where an end-of-text token is the padding;
                that is so with a pad of 0, which beam search takes for none.
        """
        several = rows * (self._get("num_return_sequences") or 1) > 1
        if self.watch is not None and self.beams > 1 and several and self.fill in self.eos:
            raise ValueError(
                f"pad_token_id={self._get('pad_token_id')}: beam search pads with {self.fill}, which ends texts too, "
                "and where stop_strings or stopping_criteria end beams nothing else tells where a row stopped; pass a "
                "pad_token_id above 0 that is no eos_token_id"
            )

    def watched_criteria(self):
        """`{"stopping_criteria": ...}`: what to pass on, so that the ends of rows are noted; empty without them."""
        if self.watch is None:
            return {}
        kept = [item for item in self.criteria if type(item) in OWN_KINDS]
        return {"stopping_criteria": StoppingCriteriaList([*kept, self.watch])}

    def real_tokens(self, generated, prompt):
        """`(rows, new)` int64: 1 at tokens that a row generated, 0 at the padding after it finished.

        Args:
            generated (`torch.Tensor`): `(rows, new)` ids.
            prompt (`int`): columns before them.
        """
        if self.beams > 1 and not self.eos:
            return (generated != NO_TOKEN).long()
        # Where nothing ends rows one by one transformers pads nothing.
        if not self.eos and not hasattr(self.watch, "eos_token_id"):
            return torch.ones_like(generated)
        ends = torch.isin(generated, torch.tensor(self.eos, device=generated.device)).long()
        real = F.pad(ends, (1, 0))[:, :-1].cumsum(1) == 0
        if self.watch is None or self.watch.ends is None:
            return real.long()
        if self.beams > 1:
            # Beams change places, so that nobody noted where one of them ended.
            padding = (generated == self.fill).long().flip(1).cumprod(1).flip(1).bool()
            return (real & ~(padding & (ends.sum(1, keepdim=True) == 0))).long()
        last = self.watch.ends.to(generated.device)[:, None]
        column = prompt + 1 + torch.arange(generated.shape[1], device=generated.device)
        return (real & ((last == 0) | (column <= last))).long()
