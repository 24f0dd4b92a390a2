"""Which of two equal ways a layer computes. Every fast path has a plain one beside it, and tests run both."""

import contextlib

MODES = ("auto", "always", "never")


class Choice:
    """The mode of this process: `"auto"` takes a fast path where it was measured to be the faster one."""

    mode = "auto"


@contextlib.contextmanager
def fast_paths(mode):
    """A context in which fast paths are taken wherever they exist (`"always"`), nowhere (`"never"`) or by measure.

    What is computed is the same to rounding: the batched scan of whole segments, causal attention without a mask, and
    the reading of the memory in one step whose gradient is written out.
    For tests, and to find out whether a fast path is to blame. It holds for the whole process, all threads.

    Args:
        mode (`str`): `"auto"`, `"always"` or `"never"`.

    Raises:
        ValueError: for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    before, Choice.mode = Choice.mode, mode
    try:
        yield
    finally:
        Choice.mode = before
