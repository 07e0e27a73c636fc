"""Where the runs of a comparison are made, and the memory they take there."""

import contextlib
import ctypes
import os
import platform
import sys
from typing import Any

import torch

from textlora.kernels.devices import peak_memory


def memory_begin(device: str) -> int | None:
    """Forget the largest memory held so far, so that the next reading is this run's; what is held now, bytes.
    Linux and CUDA only."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def memory_peak(device: str) -> int | None:
    if device.startswith("cuda"):
        return peak_memory(device)
    return _status("VmHWM") if sys.platform.startswith("linux") else None


def _status(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(name + ":")), None)
    except OSError:
        return None


def machine(device: str) -> dict[str, Any]:
    """Where the runs were made."""
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    return {
        "system": platform.system(),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kind": device,
    }
