"""Peak memory of one reading or one step, in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from .contenders import make_contender
from .machine import peak_mib, time_of


def peak_of(settings, cell):
    """Peak and times of one run of a cell, in a new process.

    What was resident before would hide what comes.

    Args:
        settings ([`BenchmarkSettings`]): the model.
        cell ([`Cell`]): of `memory` or `training_memory`.

    Returns:
        `dict[str, float]`: `mib`, and what [`time_of`] says.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure_here, settings, cell).result()


def measure_here(settings, cell):
    """The same, in this process."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    contender = make_contender(cell.contender, settings)
    ids = contender.ids(cell.tokens)
    if contender.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(contender.device)
    if cell.measure == "training_memory":
        times = time_of(lambda: contender.train(ids), contender.device)
    else:
        with torch.no_grad():
            times = time_of(lambda: contender.read(ids), contender.device)
    return {"mib": peak_mib(contender.device), **times}
