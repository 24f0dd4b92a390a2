"""Average the weights of two checkpoints, one of which went on from the other, into one that keeps most of both.

    python scripts/average_weights.py --config configs/pretrain/tiny_llama_half_3_average.yaml

A checkpoint that learned one task, and what it became by learning another, are often joined by a line on which both
tasks are kept (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903). Nothing is trained.
"""

import json
from dataclasses import dataclass, field

import torch

from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import check_target
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.fingerprint import fingerprint

# What may differ: the weights are the same functions of what the local window holds.
WINDOW = {"segment_length", "overlap", "sink_tokens"}


@dataclass(frozen=True)
class AverageArguments:
    """The other checkpoint, and where the mean goes."""

    other: str = field(metadata={"help": "the checkpoint to average with: a hub name, a folder, a shipped one"})
    share: float = field(default=0.5, metadata={"help": "share of `model` in the mean, between 0 and 1"})
    output_dir: str = field(default="outputs/averaged", metadata={"help": "folder of the model that comes out"})


def kind(model):
    """What two models have to share: their shape, and their patch but for its local window."""
    found = fingerprint(model.get_decoder())
    values = json.loads(found["model"]) | json.loads(found["patch"])
    return {name: value for name, value in values.items() if name not in WINDOW}


def check_alike(model, other):
    """Refuse two models of which a mean means nothing.

    Args:
        model, other ([`~transformers.PreTrainedModel`]): two patched models.

    Raises:
        ValueError: when they or their patches differ by more than the local window, when a weight of one is not in
            the other, or when the features of their memories are centred elsewhere.
    """
    values, others = kind(model), kind(other)
    weights, other_weights = model.state_dict(), other.state_dict()
    values |= {name: tuple(weight.shape) for name, weight in weights.items()}
    others |= {name: tuple(weight.shape) for name, weight in other_weights.items()}
    for name in sorted(values.keys() | others.keys()):
        ours, theirs = values.get(name, "missing"), others.get(name, "missing")
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in the model and {theirs} in the other: a mean of weights needs the same weights "
                "and the same patch but for its window; choose checkpoints of one training"
            )
    for name, _ in model.named_buffers():
        if name in weights and not torch.equal(weights[name], other_weights[name]):
            raise ValueError(
                f"{name} differs: the memories were calibrated apart, and the mean of their projections would be "
                "neither's; choose checkpoints of one calibration"
            )


@torch.no_grad()
def average(model, other, share):
    """Make every weight of a model the mean with another's, in place: share · model + (1 - share) · other.

    Args:
        model, other ([`~transformers.PreTrainedModel`]): two models that [`check_alike`] lets pass.
        share (`float`): between 0, which gives the other, and 1, which changes nothing.
    """
    others = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        weight.copy_(torch.lerp(others[name].float(), weight.float(), share))


def main(argv=None):
    model_args, args = parse_arguments((ModelArguments, AverageArguments), __doc__, argv)
    if not 0 < args.share < 1:
        raise ValueError(f"share={args.share}: is the part of `model` in the mean; choose one between 0 and 1")
    check_target(args.output_dir, "output_dir=")
    other_args = ModelArguments(args.other, dtype=model_args.dtype)
    for each in (model_args, other_args):
        each.check()
    model, tokenizer = model_args.load()
    other, _ = other_args.load()
    check_alike(model, other)
    average(model, other, args.share)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"mean    {args.share:g} of {model_args.model}, {1 - args.share:g} of {args.other}")
    print(f"model   {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
