"""Measure a base checkpoint and write its model card: held-out perplexity and in-context recall.

python scripts/evaluate_base.py --model outputs/tiny-llama-5/final --novels NOVELS/validation
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from infini_hf.cli.errors import run_script
from infini_hf.data.base_rows import read_texts
from infini_hf.evaluation.recall import context_recall, wilson_interval

CARD = """---
language: en
license: apache-2.0
library_name: transformers
tags: [infini-attention, llama]
---

# tiny-llama

A stock `LlamaForCausalLM` of {parameters:,} parameters ({layers} layers, width {width}, {heads} query and {kv_heads} KV
heads of {head_dim}, {vocab:,} byte-level BPE tokens with digits apart, {positions} positions), small enough to ship with
`infini_hf` and to be patched, trained and tested on a laptop. It writes period pastiche and copies what it read; it knows
nothing.

## Training

    python scripts/pretrain_base.py --config configs/pretrain/tiny_llama_1_text.yaml --train_folder NOVELS/train

and the stages after it, each going on from a checkpoint of the one before; the configs in `configs/pretrain` say which:

| stage | rows | steps | what |
|---|---|---|---|
| `tiny_llama_1_text` | 8 × 640 tokens | 2,000 | novels and a quarter of recall documents |
| `tiny_llama_2_copy` | 24 × 128 | 900 | two thirds recall: one fact a document |
| `tiny_llama_3_recall` | 8 × 640 | 1,000 | a third recall: the full mix |
| `tiny_llama_4_names` | 20 × 160 | 800 | two thirds recall: facts to tell apart by name |
| `tiny_llama_5_mixed` | 8 × 640 | 600 | novels and two fifths of the full mix, down to a learning rate of zero |

Why stages: with a quarter of recall rows among long rows of novels alone, nothing was copied after 2,000 steps.

Data: 60 English novels, 1840-1920 (ELTeC-eng, release 1.0.1; texts in the public domain), and recall documents: passkeys,
keys and words that belong to names, repeated passages, in novel text and in the grass filler of the passkey benchmark. One
key in ten is kept for tests. Last stage: {training}

## Measured

    python scripts/evaluate_base.py --model {model} --novels NOVELS/validation --samples {samples} --seed {seed}

Ten novels that it never saw, in blocks of {positions} tokens from the start of each book ({blocks} blocks, float32):
**{loss:.3f} nats a token, perplexity {perplexity:.2f}**.

In-context recall, exact match with 95 % Wilson intervals, prompts of about {recall_tokens} tokens, facts at depths 0, 0.25,
0.5, 0.75 and 0.95, keys kept from training:

| asked for | haystack | exact match | interval | questions |
|---|---|---|---|---|
{rows}

The control: with the statement of the fact taken out of the prompt, {control} of {control_count} answers match.
"""


@torch.no_grad()
def block_losses(model, tokenizer, texts, blocks_per_book):
    """Mean loss of independent blocks as long as the trained positions."""
    length, losses, count = model.config.max_position_embeddings, 0.0, 0
    for text in tqdm(texts, desc="perplexity"):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        for block in ids[: len(ids) // length * length].view(-1, length)[:blocks_per_book]:
            losses += model(block[None], labels=block[None]).loss.item()
            count += 1
    return losses / count, count


def recall_rows(results, labels):
    """A table row for each kind and haystack."""
    rows = []
    for kind, label in labels.items():
        for haystack in ("novel", "grass"):
            cell = [sample for sample in results if (sample.kind, sample.haystack) == (kind, haystack)]
            right = sum(sample.correct for sample in cell)
            low, high = wilson_interval(right, len(cell))
            rows.append(f"| {label} | {haystack} | {right / len(cell):.3f} | {low:.3f}-{high:.3f} | {len(cell)} |")
    return rows


def training_summary(folder):
    """What the trainer's log says of the run, as a sentence."""
    states = sorted(Path(folder).parent.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return ""
    state = json.loads(states[-1].read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    last = losses[-10:]
    return (
        f"{state['global_step']:,} steps of {state['train_batch_size']} rows; the mean training loss of the last "
        f"{len(last)} log entries was {sum(last) / len(last):.3f} nats over both kinds of rows."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint; the card is written into it")
    parser.add_argument("--novels", required=True, help="folder of held-out plain-text novels")
    parser.add_argument("--samples", type=int, default=8, help="questions for each kind, haystack and depth")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of each novel for the perplexity")
    parser.add_argument("--recall-tokens", type=int, default=480, help="length of a recall prompt, about")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.novels)
    loss, blocks = block_losses(model, tokenizer, texts, args.blocks)
    joined = "\n\n".join(texts)
    results = context_recall(model, tokenizer, joined, args.recall_tokens, args.samples, seed=args.seed)
    rows = recall_rows(results, {"passkey": "passkey", "key": "key of a name", "word": "word of a name"})
    for facts in (2, 4):
        several = context_recall(
            model, tokenizer, joined, args.recall_tokens, args.samples, kinds=("key",), seed=args.seed, facts=facts
        )
        rows += recall_rows(several, {"key": f"key of one of {facts} names"})
    control = context_recall(
        model, tokenizer, joined, args.recall_tokens, args.samples, depths=(0.5,), seed=args.seed, state=False
    )
    config = model.config
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        training=training_summary(args.model),
        model=args.model,
        samples=args.samples,
        seed=args.seed,
        blocks=blocks,
        loss=loss,
        perplexity=torch.tensor(loss).exp().item(),
        recall_tokens=args.recall_tokens,
        rows="\n".join(rows),
        control=sum(sample.correct for sample in control),
        control_count=len(control),
    )
    (Path(args.model) / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    run_script(main)
