"""Which device and precision to use, and how much memory was taken."""

import resource
import sys

import torch

from textlora.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> str:
    """`auto` is CUDA where there is one. Raises UsageError where the named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"--device {name}: not cpu, cuda, cuda:N or auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here", "use --device cpu")
    return name


def choose_dtype(precision: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it, float32 on every CPU (docs/decisions/precision.md)."""
    if precision != "auto":
        return DTYPES[precision]
    return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def peak_memory(device: str) -> int:
    """Largest memory held so far, bytes: the process's resident set, or what torch took on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
