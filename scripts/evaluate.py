"""Evaluate: perplexity by position with controls, or the ROUGE table of summaries.

    python scripts/evaluate.py --config configs/eval/perplexity_tiny_cpu.yaml --source NOVELS/validation
    python scripts/evaluate.py --task rouge --predictions lora.jsonl base.jsonl closed.jsonl

Perplexity is measured on whole texts, streamed: with the memory, with the memory closed (block-local attention of the
same weights), and with full attention of the unpatched weights as far as `full_attention_up_to` reaches.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from infini_hf import score, unpatch_model
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.script_arguments import ModelArguments, held_out_split
from infini_hf.data.documents import load_documents
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.perplexity import SpanTable, doubling_edges, mean_by_span
from infini_hf.evaluation.rouge import rouge_scores


@dataclass
class OptionalModel(ModelArguments):
    """The model and its patch, which matter to one of the tasks only."""

    model: str = field(default="tiny-llama", metadata={"help": "hub name, folder, or shipped checkpoint"})


@dataclass
class EvaluationArguments:
    """What is measured, and on what."""

    task: str = field(default="perplexity", metadata={"help": "perplexity or rouge"})
    source: str | None = field(default=None, metadata={"help": "texts for perplexity: folder, file or hub dataset"})
    split: str | None = field(
        default=None, metadata={"help": "default: validation of a hub dataset, all of a local folder or file"}
    )
    limit: int | None = field(default=None, metadata={"help": "texts, the first ones"})
    max_tokens: int | None = field(default=None, metadata={"help": "tokens of each text"})
    first_edge: int = field(default=1024, metadata={"help": "first position of the table; then twice that, and so on"})
    full_attention_up_to: int = field(
        default=0, metadata={"help": "tokens that full attention reads; 0 leaves it out"}
    )
    predictions: list[str] = field(default_factory=list, metadata={"help": "JSONL files of summarize.py"})
    output: str | None = field(default=None, metadata={"help": "markdown file for the table, with a JSON beside it"})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu …; the best one by default"})


def perplexity(model_args, args):
    """The table of perplexity by position, and its numbers."""
    if args.source is None:
        raise ValueError("source: name the texts to measure on")
    model, tokenizer = model_args.load()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    documents = load_documents(args.source, args.split or held_out_split(args.source), limit=args.limit)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = []
    for document in documents:
        ids = tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"]
        texts.append(torch.tensor([[*bos, *ids][: args.max_tokens]]))
    ways = {"memory": lambda ids: score(model, ids)[0]}
    ways["memory closed"] = lambda ids: score_closed(model, ids)
    losses = {name: [way(ids).cpu() for ids in tqdm(texts, desc=name)] for name, way in ways.items()}
    if args.full_attention_up_to:
        unpatch_model(model)
        losses["full attention"] = [
            full_attention(model, ids, args.full_attention_up_to) for ids in tqdm(texts, desc="full attention")
        ]
    longest = max(ids.shape[1] for ids in texts) - 1
    # Full attention has spans of its own, or the last one would mean other tokens than those of its neighbours.
    edges = sorted({*doubling_edges(longest, args.first_edge), min(args.full_attention_up_to, longest)})
    spans = {name: mean_by_span(parts, edges) for name, parts in losses.items()}
    table = SpanTable(edges, {name: means for name, (means, _) in spans.items()}, spans["memory"][1])
    return table.markdown(), {"edges": edges, "losses": table.rows, "tokens": table.counts}


def score_closed(model, ids):
    with closed_memory(model):
        return score(model, ids)[0]


@torch.no_grad()
def full_attention(model, ids, reach):
    """Losses of what the stock model predicts from the first `reach` tokens."""
    ids = ids[:, : reach + 1].to(model.device)
    logits = model(ids[:, :-1], use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()


def rouge(args):
    """The ROUGE table, one row a file."""
    if not args.predictions:
        raise ValueError("predictions: name the JSONL files of summarize.py")
    lines, numbers = ["| summaries | ROUGE-1 | ROUGE-2 | ROUGE-L | overall | texts |", "|---|---|---|---|---|---|"], {}
    paths = [Path(path) for path in args.predictions]
    stems = [path.stem for path in paths]
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scores = rouge_scores([row["summary"] for row in rows], [row["reference"] for row in rows])
        numbers[name] = {**scores, "texts": len(rows)}
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in scores.values()) + f" | {len(rows)} |")
    return lines, numbers


def main(argv=None):
    model_args, args = parse_arguments((OptionalModel, EvaluationArguments), __doc__, argv)
    if args.task not in ("perplexity", "rouge"):
        raise ValueError(f"task={args.task!r}: must be perplexity or rouge")
    lines, numbers = rouge(args) if args.task == "rouge" else perplexity(model_args, args)
    text = "\n".join(lines) + "\n"
    if args.output:
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        output.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(text)
    return numbers


if __name__ == "__main__":
    main()
