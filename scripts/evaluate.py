"""Evaluate: perplexity by position with controls, or the ROUGE table of summaries.

    python scripts/evaluate.py --config configs/eval/perplexity_tiny_cpu.yaml --source NOVELS/validation
    python scripts/evaluate.py --task rouge --predictions lora.jsonl base.jsonl closed.jsonl

Perplexity is measured on whole texts, streamed, each token counted once, for every way to read that `ways` names:
memory, closed (the gates shut), hard (blocks of a segment), overlap, txl (Transformer-XL), other (another text's
memory), full (the stock model in a sliding window), full_past (the stock model past its window). A way takes options
behind colons, as in overlap:segment=512:overlap=128:sinks=4 or full:window=640:stride=128.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from infini_hf.cache import infini_config_of
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.cli.names import find_device, find_file, find_source
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.data.documents import check_count, load_documents
from infini_hf.data.local_parts import held_out_split
from infini_hf.evaluation.comparison import beside_control, compare, comparison_lines, number
from infini_hf.evaluation.curves import draw_by_position, new_figure
from infini_hf.evaluation.outputs import beside, check_output
from infini_hf.evaluation.perplexity import SpanTable, curve_of, doubling_edges, mean_by_span, ratios_of_spans
from infini_hf.evaluation.rouge import rouge_scores
from infini_hf.evaluation.summary_file import read_summaries
from infini_hf.evaluation.ways import Way, lenders_of, losses_of_texts


@dataclass
class OptionalModel(ModelArguments):
    """The model and its patch, which matter to one of the tasks only."""

    model: str = field(default="tiny-llama", metadata={"help": "hub name, folder, or shipped checkpoint"})


@dataclass
class EvaluationArguments:
    """What is measured, and on what."""

    task: str = field(default="perplexity", metadata={"help": "perplexity or rouge"})
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA adapter, a folder or a name; merged into the model for perplexity"},
    )
    source: str | None = field(default=None, metadata={"help": "texts for perplexity: folder, file or hub dataset"})
    split: str | None = field(
        default=None,
        metadata={"help": "default: validation, or test; all of a local file, and of a folder that names no parts"},
    )
    limit: int | None = field(default=None, metadata={"help": "texts, the first ones"})
    max_tokens: int | None = field(default=None, metadata={"help": "tokens of each text"})
    ways: list[str] = field(
        default_factory=lambda: ["memory", "closed"],
        metadata={"help": "memory, closed, hard, overlap, txl, other, full, full_past, with options behind colons"},
    )
    first_edge: int | None = field(
        default=None,
        metadata={"help": "first position of the table, then twice that, and so on; default: the model's segment"},
    )
    beyond: int | None = field(
        default=None, metadata={"help": "first position of the comparison; default: the longest segment of the ways"}
    )
    control: str | None = field(
        default=None,
        metadata={"help": "JSON of an evaluation of another model: ratios to its closed memory on the same texts"},
    )
    figure: bool = field(default=False, metadata={"help": "draw the curves as PNG beside the output"})
    figure_ways: list[str] = field(default_factory=list, metadata={"help": "ways in the figure; all by default"})
    predictions: list[str] = field(default_factory=list, metadata={"help": "JSONL files of summarize.py"})
    output: str | None = field(default=None, metadata={"help": "markdown file for the table, with a JSON beside it"})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu …; the best one by default"})

    def __post_init__(self):
        for name, lowest in (("limit", 1), ("max_tokens", 2), ("first_edge", 1), ("beyond", 0)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), lowest)
        if self.output:
            check_output(self.output, (".json", ".png"))

    def parsed_ways(self):
        """The ways to read, checked before anything is loaded."""
        ways = {text: Way.parse(text) for text in self.ways}
        missing = sorted(set(self.figure_ways) - set(ways))
        if missing:
            raise ValueError(f"figure_ways: {missing} are not among the ways {list(ways)}")
        if (self.figure or self.figure_ways) and not self.output:
            raise ValueError("figure: name an output, the PNG is written beside it")
        if self.figure or self.figure_ways:
            # Said now, not after the reading.
            new_figure((1, 1))
        return list(ways.values())

    def parsed_control(self):
        """The numbers of the other evaluation, if one is named."""
        if self.control is None:
            return None
        numbers, file = None, find_file(self.control, "control")
        with contextlib.suppress(ValueError):
            numbers = json.loads(file.read_text(encoding="utf-8"))
        documents = numbers.get("documents") if isinstance(numbers, dict) else None
        if "closed" not in (documents or ()):
            raise ValueError(f"control {self.control}: is no JSON of an evaluation with the way closed; name one")
        return numbers


def check_control(control, **here):
    """Refuse an evaluation of other tokens; `here` is what is measured now, by the names of its JSON.

    Raises:
        ValueError: names what differs.
    """
    for name, value in here.items():
        if control.get(name) != value:
            raise ValueError(
                f"control: was measured with {name}={control.get(name)}, and this would be with {name}={value}: "
                "measure both on the same texts, alike"
            )


def lines_beside(control, numbers):
    """The ratios to another model, as lines; `numbers` gets them too."""
    # What ends early is measured on other tokens.
    documents = {way: losses for way, losses in numbers["documents"].items() if not way.startswith("full_past")}
    found = beside_control(documents, control["documents"]["closed"])
    numbers["control"] = {"model": control["model"], "ratios": {way: list(ratio) for way, ratio in found.items()}}
    lines = [f"Beside {control['model']}, closed, the mean over the texts:", "", "| read with | ratio |", "|---|---|"]
    return [*lines, *(f"| {way} | {number(*ratio, '.4f')} |" for way, ratio in found.items())]


def perplexity(model_args, args):
    """The tables of perplexity by position and beyond the first segment, and their numbers."""
    if args.source is None:
        raise ValueError("source: name the texts to measure on")
    ways, control = args.parsed_ways(), args.parsed_control()
    # What is not there, or holds nothing out, is refused before a model is loaded for it.
    find_source(args.source, "source")
    args.split = args.split or held_out_split(args.source)
    device = find_device(args.device)
    model, tokenizer = model_args.load(args.adapter, merge=True)
    model = model.to(device).eval()
    patch = infini_config_of(model.config)
    # A window that is none is an error before the first text is read.
    segments = [way.window(patch).segment_length for way in ways if way.patched]
    reaches = [reach for way in ways if not way.patched and (reach := way.slide(model.config)[2])]
    beyond = max([patch.segment_length, *segments]) if args.beyond is None else args.beyond
    if control is not None:
        check_control(control, max_tokens=args.max_tokens, beyond=beyond)
    texts = texts_of(tokenizer, args)
    digest = digest_of_ids(texts)
    if control is not None:
        check_control(control, texts=digest)
    for way in ways:
        if way.name == "other":
            # Refused now, not after the ways before it.
            lenders_of(texts, way.window(patch).segment_length)
    losses = {way.text: losses_of_texts(model, way, texts) for way in ways}
    longest = max(ids.shape[1] for ids in texts) - 1
    # A way that ends early has a span of its own, or its last one would mean other tokens than its neighbours'.
    first_edge = patch.segment_length if args.first_edge is None else args.first_edge
    edges = sorted({*doubling_edges(longest, first_edge), *(min(reach, longest) for reach in reaches)})
    counts = mean_by_span([ids[0, 1:] for ids in texts], edges)[1]
    table = SpanTable(edges, {name: mean_by_span(parts, edges)[0] for name, parts in losses.items()}, counts)
    # The plain control where there is one, else the first with options of its own.
    roles = [
        next((way.text for way in sorted(ways, key=lambda way: way.text != role) if way.name == role), role)
        for role in ("closed", "full")
    ]
    rows = compare(losses, beyond, *roles)
    if args.figure or args.figure_ways:
        shown = args.figure_ways or list(losses)
        curves = {name: curve_of(losses[name]) for name in shown}
        base = table.rows.get(roles[0])
        ratios = base and ratios_of_spans(edges, {name: table.rows[name] for name in shown}, base)
        draw_by_position(curves, beside(args.output, ".png"), beyond, ratios, roles[0])
    numbers = {
        "model": model_args.model,
        "adapter": args.adapter,
        "patch": patch.to_dict(),
        "max_tokens": args.max_tokens,
        "texts": digest,
    }
    numbers |= {"edges": edges, "losses": table.rows, "tokens": counts, "beyond": beyond}
    numbers["comparison"] = [row.to_dict() for row in rows]
    numbers["documents"] = {name: [text_mean(part[beyond:]) for part in parts] for name, parts in losses.items()}
    first = "segment" if args.beyond is None else f"{beyond:,} tokens"
    lines = [*table.markdown(), "", *comparison_lines(rows, beyond, roles[0], first)]
    if control is not None:
        lines += ["", *lines_beside(control, numbers)]
    return lines, numbers


def texts_of(tokenizer, args):
    """The ids of every text, `(1, tokens)`, with a beginning-of-text token where there is one."""
    documents = load_documents(args.source, args.split or held_out_split(args.source), limit=args.limit)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = []
    for document in tqdm(documents, desc="tokenizing", total=args.limit):
        ids = tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"]
        texts.append(torch.tensor([[*bos, *ids][: args.max_tokens]]))
    return texts


def digest_of_ids(texts):
    """What the ids of all texts are known by, 16 hexadecimal digits."""
    ids = [" ".join(map(str, text[0].tolist())) for text in texts]
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def text_mean(losses):
    """The mean of what a text has there, `None` for nothing."""
    return losses.double().mean().item() if len(losses) else None


def rouge(args):
    """The ROUGE table, one row a file."""
    if not args.predictions:
        raise ValueError("predictions: name the JSONL files of summarize.py")
    lines, numbers = ["| summaries | ROUGE-1 | ROUGE-2 | ROUGE-L | overall | texts |", "|---|---|---|---|---|---|"], {}
    paths = [find_file(path, "predictions") for path in args.predictions]
    stems = [path.stem for path in paths]
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        rows = read_summaries(path)
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
        beside(output, ".json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(text)
    return numbers


if __name__ == "__main__":
    run_script(main)
