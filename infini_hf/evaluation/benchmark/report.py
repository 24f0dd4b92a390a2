"""What a benchmark leaves beside its CSV: the tables as markdown and the curves as PNG."""

from pathlib import Path

from .contenders import parse_contender
from .costs import shape_of
from .plots import draw_measures
from .summary import Summary
from .tables import Tables

READING = (
    "Medians of all runs. A ratio is the median of the ratios of runs of the same turn, in brackets the lowest and "
    "the highest. Logits are computed of every token in training, of the last one for a first token and in decoding, "
    "and of none in prefill. A context of decoding is half a segment longer than its column says; the caches of full "
    "attention and of the window then hold random keys and values, which nobody computed."
)


def report_lines(settings, results, command):
    """The report as lines of markdown.

    Args:
        settings ([`BenchmarkSettings`]): what was to be measured.
        results ([`ResultFile`]): what was, and under which conditions.
        command (`str`): what wrote it.
    """
    held, shape = results.conditions, settings.shape
    where = f"{held['hardware']}, {settings.device}" + (f", {settings.threads} thread(s)" if "threads" in held else "")
    versions = [f"{name} {held[name]}" for name in ("python", "torch", "transformers", "infini_hf") if name in held]
    others = [
        f"{name} {held[name]}" for name in ("infini-transformer-pytorch", "optimum-quanto", "hqq") if name in held
    ]
    head = [
        "# What it costs beside other ways to do it",
        "",
        f"`{command}`",
        "",
        f"- {where}, {settings.dtype}; {', '.join([*versions, *others])}, code {held.get('code', 'unknown')}",
        f"- {shape.layers} layers, width {shape.width:,}, {shape.heads} heads and {shape.kv_heads} KV heads of "
        f"{shape.head_dim}, MLP {shape.intermediate:,}, vocabulary {shape.vocab_size:,}, random weights; segments of "
        f"{settings.segment_length:,}, {settings.chunk_size:,} tokens a forward, {settings.attention}, batch 1",
        f"- {parameter_line(settings)}",
        f"- up to {settings.repeats} runs of a cell in {settings.cell_seconds:g} s, none of more than "
        f"{settings.most_seconds:g} s; {settings.new_tokens} tokens decoded, {settings.piece_tokens:,} read on",
        *clock_lines(settings, results),
        "",
        READING,
    ]
    summary = Summary(settings, results).lines()
    return [*head, *(["", *summary] if summary else []), *Tables(settings, results).lines()]


def clock_lines(settings, results):
    """Which clock the times are of, and whether others worked on the machine."""
    share = results.share_of_processor
    if settings.device != "cpu" or share is None:
        return []
    names = {"wall": "the wall clock", "processor": "the processor's time of the process alone"}
    return [
        f"- times by {names[settings.clock]}; the process had a processor for {100 * share / settings.threads:.0f} % "
        "of the measured time"
    ]


def parameter_line(settings):
    """Parameters of the contenders, those with another shape by name."""
    texts = dict.fromkeys(text for measure in settings.measures for text in settings.contenders_of(measure))
    base = settings.shape.parameters
    others = {
        text: shape_of(text, settings).parameters for text in texts if shape_of(text, settings) != settings.shape
    }
    named = [f"`{text}` about {count:,}" for text, count in others.items()]
    if any(parse_contender(text)[0] == "package" for text in texts):
        named.append("it has no grouped-query attention")
    return f"{base:,} parameters" + (f"; {', '.join(named)}" if named else "")


def write_report(settings, results, command):
    """Write the markdown file and the figures beside it.

    Returns:
        `tuple[list[str], str]`: the lines of the report, and a sentence that says where everything is.
    """
    lines = report_lines(settings, results, command)
    if settings.output is None:
        return lines, "name an output to keep the runs"
    path = Path(settings.output)
    try:
        drawn = draw_measures(settings, results, path)
        figures = f"{', '.join(file.name for file in drawn)}: the figures" if drawn else "no figure: one length alone"
        lines += [line for file in drawn for line in ("", f"![{file.stem}]({file.name})")]
    except ModuleNotFoundError as error:
        figures = f"no figure: {error}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines, f"{path}: the tables; {results.path}: all runs; {figures}"
