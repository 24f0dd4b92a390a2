"""What reading, decoding and learning cost beside other ways to do it, with the same random model.

    python scripts/benchmark.py --config configs/eval/benchmark_cpu.yaml
    python scripts/benchmark.py --config configs/eval/benchmark_cpu.yaml --only prefill decode --repeats 3
    python scripts/benchmark.py --arithmetic

Seven measures: prefill, first_token, read_on (after a context), decode (after a context), training, memory and
training_memory (peaks, each in a process of its own). Each takes contenders and lengths. A contender is
NAME:OPTION=VALUE:… of

    blocks      independent blocks of a segment, the ceiling    recompute=true, loop=forward
    infini      the patched model                               memory_update, feature_map, gate, overlap, sink_tokens,
                                                                order=layer, recompute=false, kv_heads,
                                                                loop=static or forward
    full        full attention                                  loop=forward
    quantized   full attention, quantised cache                 backend=quanto, hqq or fp8, loop=forward
    window      a sliding window of a segment                   width, loop=forward
    package     infini-transformer-pytorch                      detach=2, delta=true

Contenders are taken in turns, so that a slow moment of the machine meets them all; what carries over to another
machine is their ratios. A cell that would take longer than most_seconds is left out by name. The output gets a table,
a CSV of all runs and the figures; the same command goes on where an interrupted one stopped, and measures nothing
twice. Random weights: what it costs does not depend on what a model knows.
"""

import shlex
import sys
from pathlib import Path

from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.errors import run_script
from infini_hf.evaluation.benchmark.arithmetic import LLAMA_3_8B
from infini_hf.evaluation.benchmark.contenders import check_contenders
from infini_hf.evaluation.benchmark.machine import describe_machine
from infini_hf.evaluation.benchmark.predictions import arithmetic_lines
from infini_hf.evaluation.benchmark.report import write_report
from infini_hf.evaluation.benchmark.results import ResultFile
from infini_hf.evaluation.benchmark.runner import Benchmark
from infini_hf.evaluation.benchmark.settings import BenchmarkSettings


def arithmetic(settings):
    """FLOPs and bytes of the shape that was asked for, and of a large model."""
    length = settings.segment_length
    title = f"{settings.layers} layers of width {settings.width}"
    own = arithmetic_lines(settings.shape, length, settings.number_bytes, title)
    return [*own, "", *arithmetic_lines(LLAMA_3_8B, length, 2, "Llama-3-8B")]


def main(argv=None):
    (settings,) = parse_arguments((BenchmarkSettings,), __doc__, argv)
    check_contenders(settings)
    if settings.arithmetic:
        print("\n".join(arithmetic(settings)))
        return None
    if not settings.measures:
        raise ValueError("nothing to measure: name contenders, as in --prefill blocks infini, or a --config")
    path = None if settings.output is None else Path(settings.output).with_suffix(".csv")
    results = ResultFile(path, describe_machine(settings.device) | settings.conditions(), settings.clock)
    try:
        Benchmark(settings, results).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    words = shlex.join(sys.argv[1:] if argv is None else list(map(str, argv)))
    lines, where = write_report(settings, results, f"python scripts/benchmark.py {words}".strip())
    print("\n".join([*lines, "", where]))
    return results


if __name__ == "__main__":
    run_script(main)
