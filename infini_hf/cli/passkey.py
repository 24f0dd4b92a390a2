"""`infini-hf passkey`: hide needles in streams of any length and ask for them, with controls."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig

from ..data.base_rows import read_texts
from ..data.ruler_tasks import KEYS, VALUES
from ..data.task_registry import TASKS, make_task
from ..evaluation.needles.jobs import batches_of
from ..evaluation.needles.questions import ASKED_ALIKE
from ..evaluation.needles.runner import describe, run_needles
from ..evaluation.needles.samples import SampleFile, merge
from ..evaluation.needles.streams import HAYSTACKS, STRADDLING, Cell, Haystacks
from ..evaluation.needles.tables import CONTROLS
from ..evaluation.outputs import check_output
from .adapters import adapter_patch
from .common import ADAPTER, DEVICE, DTYPE, MODEL, SEEDS, THREADS, load
from .names import find_adapter, find_model
from .needle_options import parse_controls, parse_depths, parse_fillers, parse_lengths
from .read import choose_patch
from .report import echo_report

PATCH = "for a stock checkpoint; a patched one has its own."


def passkey(
    model: Annotated[str, MODEL],
    lengths: str = typer.Option("4k,32k", help="Tokens of a stream, such as 4k,32k,128k,1m."),
    depths: str = typer.Option(
        "",
        help="Depths from 0 to 1, straddling a segment boundary, or spread at random; by default 0, 0.1 … 1 and "
        "straddling, spread for several needles.",
    ),
    samples: int = typer.Option(20, min=1, help="Streams for each haystack, length and depth."),
    first: int = typer.Option(0, min=0, help="Number of the first stream, to share the work of an evaluation."),
    task: str = typer.Option("passkey", help=f"What is hidden: {', '.join(TASKS)}."),
    needles: int = typer.Option(None, min=1, help="Needles in a stream, of a task with several."),
    digits: int = typer.Option(5, min=3, help="Digits of a key or number."),
    keys: str = typer.Option(None, help=f"Keys of RULER's tasks: {' (default), '.join(KEYS)}."),
    values: str = typer.Option(None, help=f"Values of RULER's tasks: {VALUES[0]} (default), {', '.join(VALUES[1:])}."),
    fillers: str = typer.Option(
        None, help=f"Haystacks: {', '.join(HAYSTACKS)}; by default grass, and novel where there is a folder of them."
    ),
    haystack: Path = typer.Option(None, help="Folder of plain-text novels; the benchmark's grass alone without it."),
    controls: str = typer.Option(",".join(ASKED_ALIKE), help=f"Ways to ask: {', '.join(CONTROLS)}."),
    output: Path = typer.Option(
        Path("passkey.jsonl"),
        help="Every sample, a line each; a later run goes on from it. Tables and figure beside it.",
    ),
    full_attention_up_to: int = typer.Option(8192, min=0, help="The longest stream that the control full reads."),
    batch_size: int = typer.Option(8, min=1, help="Streams read at once."),
    chunk_size: int = typer.Option(2048, min=1, help="Tokens in one forward: speed and peak memory only."),
    seed: int = typer.Option(0, **SEEDS, help="Seed of keys, filler and places."),
    segment_length: int = typer.Option(None, help=f"Tokens in a segment, {PATCH}"),
    overlap: int = typer.Option(None, help="Tokens of the previous segment that stay visible, likewise."),
    sink_tokens: int = typer.Option(None, help="First tokens that stay visible, likewise."),
    memory_update: str = typer.Option(None, help="linear or delta, likewise."),
    feature_map: str = typer.Option(None, help="elu, exp or softmax, likewise."),
    adapter: str = ADAPTER,
    dtype: str = DTYPE,
    device: str = DEVICE,
    threads: int = THREADS,
):
    """Hide keys in grass and in novels, read the streams, ask for them, and count exact answers beside controls.

    For example: infini-hf passkey tiny-llama-infini --lengths 4k,32k --samples 4

    Ways to ask: with the memory; closed shuts its gates while the question
    is asked, and other exchanges it with that of another stream. Their
    reading is one and the same, so that upper layers keep a trace of the
    memory in the keys and values of the local window. The further ways read
    anew with the gates shut: window has the model's own local window alone,
    local none beyond a segment, txl a whole segment of overlap
    (Transformer-XL), full one window over all. Streams that differ in the
    depth alone share what they read before their needle.
    """
    asked = {
        "segment_length": segment_length,
        "overlap": overlap,
        "sink_tokens": sink_tokens,
        "memory_update": memory_update,
        "feature_map": feature_map,
    }
    # Everything that can be refused is, before a model is loaded.
    check_output(output, (".md", ".png"))
    chosen = make_task(task, needles, digits, keys, values)
    places = parse_depths(depths, chosen)
    kinds = parse_fillers(fillers, haystack, chosen)
    cells = [Cell(kind, length, depth) for length in parse_lengths(lengths) for kind in kinds for depth in places]
    ways = parse_controls(controls)
    texts = read_texts(haystack) if haystack else ()
    asked = {name: value for name, value in asked.items() if value is not None}
    folder = find_adapter(adapter)
    patch = patch_of(model, asked) if folder is None else adapter_patch(folder, asked)
    language_model, tokenizer = load(model, patch, dtype, device, threads, folder)
    haystacks = Haystacks(tokenizer, patch.segment_length, chosen, texts, seed)
    file = SampleFile(output, describe(language_model, haystacks))
    numbers = range(first, first + samples)
    if not depths:
        # Nobody asked for that depth by name.
        short = [cell for cell in cells if cell.depth == STRADDLING and not all_straddle(haystacks, cell, numbers)]
        cells = [cell for cell in cells if cell not in short]
        for length in sorted({cell.tokens for cell in short}):
            typer.echo(f"note: in {length:,} tokens not every needle can straddle a boundary: that depth is left out")
    smallest = min(map(len, batches_of(list(numbers), batch_size)))
    for note in notes(cells, ways, patch.longest_window, full_attention_up_to, smallest):
        typer.echo(f"note: {note}")
    run_needles(
        language_model,
        tokenizer,
        cells,
        numbers,
        haystacks,
        file,
        ways,
        batch_size,
        chunk_size,
        full_attention_up_to,
    )
    echo_report(file.samples, output, Path(adapter or model).name, file.about)


def all_straddle(haystacks, cell, numbers):
    """Whether the needle of every stream of a cell straddles a segment boundary."""
    try:
        for number in numbers:
            haystacks.layout(cell, number)
    except ValueError:
        return False
    return True


def notes(cells, ways, window, full_attention_up_to, last):
    """What an evaluation will not show, in sentences, before it begins; `last` streams are in its smallest batch."""
    for length in sorted({cell.tokens for cell in cells if cell.tokens <= window}):
        yield f"{length:,} tokens fit in one local window of {window:,}: finding needs no memory there"
    if "full" in ways and any(cell.tokens > full_attention_up_to for cell in cells):
        yield f"full attention is left out beyond {full_attention_up_to:,} tokens"
    if last == 1 and "other" in ways:
        yield "a stream alone in its batch (--batch-size, --samples) has no other whose memory it could be asked with"


def tables(
    files: Annotated[list[Path], typer.Argument(help="Files of samples, of one evaluation.", exists=True)],
    output: Path = typer.Option(
        None, help="Where tables (.md) and figure (.png) go; beside the first file by default."
    ),
    title: str = typer.Option("", help="What stands above them."),
):
    """Tables and figure of the samples that `infini-hf passkey` wrote, merged from several files without a model."""
    about, samples = merge(files)
    echo_report(samples, output or files[0], title, about)


def patch_of(model, asked):
    """The options that a model is read with.

    Raises:
        ValueError: when it is not patched and none is given, or when it is and another is asked for.
    """
    if not asked and "infini_attention" not in vars(AutoConfig.from_pretrained(find_model(model))):
        raise ValueError(
            f"{model}: is not patched; name a patched checkpoint, or give --segment-length to read with a new memory, "
            "which is closed until it is trained"
        )
    return choose_patch(model, asked, None)
