"""Free pages of the C heap, given back between segments.

A long step frees and allocates the same large blocks over and over, with small ones that stay in between. The C
library then finds no hole large enough and grows the heap, although nothing is held: hundreds of MiB in a long step on
the CPU. Accelerators have allocators of their own and do not need this.
"""

import ctypes
import functools
import platform


@functools.cache
def trim_function():
    """glibc's `malloc_trim`, or `None` where there is another C library."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None).malloc_trim


def release_free_pages(device):
    """Give what is free in the heap back to the system; for work on the CPU alone."""
    trim = trim_function()
    if device.type == "cpu" and trim is not None:
        trim(0)
