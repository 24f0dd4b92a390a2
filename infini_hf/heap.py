"""Pages of the C heap: kept by a program for its next forward, and given back between the segments of a long step.

A page that went back to the system is cleared when it returns. glibc gives back what is free at the end of its heap,
often the activations of the last forward, for the next one to fetch again; what that costs is in docs/performance.md.
A long step, on the other hand, frees and allocates the same large blocks over and over, with small ones that stay in
between. The C library then finds no hole large enough and grows the heap, although nothing is held: hundreds of MiB.
Accelerators have allocators of their own and do not need any of this.
"""

import contextlib
import ctypes
import functools
import os
import platform

# Of glibc's malloc.h: how much is kept free at the end of the heap, and from what size on a block is mapped by itself.
# Setting one of them stops glibc from moving both as it sees fit; it goes as far as 64 and 32 MiB, the most it takes.
# Larger blocks stay mapped by themselves: in the heap each one may find the hole of the last a few bytes too small.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEEP = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 32 * 2**20}
AFTERWARDS = {TRIM_THRESHOLD: 64 * 2**20, MMAP_THRESHOLD: 32 * 2**20}
# Whoever set one of these has chosen.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def c_library():
    """glibc, or `None` where there is another C library."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def release_free_pages(device):
    """Give what is free in the heap back to the system; for work on the CPU alone."""
    library = c_library()
    if device.type == "cpu" and library is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def kept_pages():
    """Free pages stay with the process meanwhile, for what is computed next on a CPU; nothing but time depends on it.

    It is a setting of the process, so it is the program's to make, not a library's: `infini-hf` and the scripts that
    go through [`infini_hf.cli.errors.run_script`] do, unless the environment says otherwise. What was set before
    cannot be read; afterwards it is as glibc has it once a process has freed large blocks. [`release_free_pages`]
    still gives back what is free.
    """
    if any(name in os.environ for name in VARIABLES):
        yield
        return
    set_options(KEEP)
    try:
        yield
    finally:
        set_options(AFTERWARDS)


def set_options(options):
    """Set glibc's `mallopt` values; elsewhere, nothing."""
    library = c_library()
    for option, value in options.items() if library is not None else ():
        library.mallopt(option, value)
