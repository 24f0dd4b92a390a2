"""What the numbers were measured on: hardware, versions, a digest of the code, and the speed of bare products."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import time
from pathlib import Path

import torch
import transformers

from ...version import __version__
from .settings import DTYPES

MIB = 2**20
COPIED = 64 * MIB
PACKAGE = Path(__file__).parents[2]


def synchronize(device):
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_of(function, device):
    """Seconds of a call until the device is done: by the wall clock, and of the processor for this process.

    Returns:
        `dict[str, float]`: `seconds` and `processor`. On a CPU that is shared the second leaves out when others ran.
    """
    synchronize(device)
    began, worked = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return {"seconds": time.perf_counter() - began, "processor": time.process_time() - worked}


def processor():
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_digest():
    """Eight hexadecimal digits of the library's own modules: numbers of two versions never share a file."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def version_of(package):
    """The version of an installed package, `None` without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(device):
    """Hardware and versions, as a dict that JSON can hold.

    Args:
        device (`str`): where the models run.
    """
    gpu = torch.device(device).type == "cuda"
    packages = ("infini-transformer-pytorch", "optimum-quanto", "hqq")
    return {
        "hardware": torch.cuda.get_device_name(device) if gpu else f"{processor()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "infini_hf": __version__,
        "code": code_digest(),
        **{name: version for name in packages if (version := version_of(name))},
    }


def speed_probes(settings):
    """Functions that do one product of the MLP's size, and one copy of 64 MiB.

    Returns:
        `dict[str, Callable]`
    """
    options = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    left = torch.randn(settings.chunk_size, settings.width, **options)
    right = torch.randn(settings.width, settings.intermediate, **options)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=settings.device)
    target = torch.zeros_like(source)
    return {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}


def product_flops(settings):
    """FLOPs of the product of [`speed_probes`]."""
    return 2 * settings.chunk_size * settings.width * settings.intermediate


def peak_mib(device):
    """The most memory so far, in MiB: allocated on a GPU, else resident of this process.

    On Linux it is read from the kernel: `getrusage` of a new process begins with the peak of the one that made it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if platform.system() == "Darwin" else 1024)
