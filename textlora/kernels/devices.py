"""Which device and precision to use, threads that work side by side, and how much memory was taken."""

import resource
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch

from textlora.core.errors import UsageError
from textlora.kernels.bindings import ThreadTeam

Item, Result = TypeVar("Item"), TypeVar("Result")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> str:
    """`auto` is CUDA where there is one. Raises UsageError where the named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"--device {name}: not cpu, cuda, cuda:N or auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here", "use --device cpu"
        )
    return name


def choose_dtype(precision: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it, float32 on every CPU (docs/decisions/precision.md)."""
    if precision != "auto":
        return DTYPES[precision]
    return (
        torch.bfloat16
        if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def peak_memory(device: str) -> int:
    """Largest memory held so far, bytes: the process's resident set, or what torch took on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch's operations in the calling thread while this lasts.

    One for work that takes less than a millisecond: all threads of an operation wait for the slowest of them,
    which beside a busy process is the one whose core the other has (an optimizer's step on 74,000 numbers: 73
    ms, 0.04 on one thread). Changing the number costs 0.1 us.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """Several threads, the calling one among them, that each run torch on one core: on a CPU faster than one
    thread that spreads every operation over all cores, since small operations are not spread at all
    (docs/log.md). Results do not depend on which thread did what."""

    def __init__(self, count: int, cores: int, others: ThreadPoolExecutor | None):
        self.count, self._cores, self._others = count, cores, others

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of each item, begun in order. A single item is computed in the calling thread, with all
        cores. The first failure ends it."""
        if self._others is None or len(items) < 2:
            with torch_threads(self._cores):
                return [function(item) for item in items]
        todo, done, crew = deque(enumerate(items)), {}, ThreadTeam(self.count)

        def work(number: int) -> None:
            with crew.member(number):
                while todo:
                    try:
                        place, item = todo.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    try:
                        done[place] = function(item)
                    except BaseException:
                        todo.clear()
                        raise

        others = [self._others.submit(work, number) for number in range(1, self.count)]
        try:
            with torch_threads(1):
                work(0)
        finally:
            wait(others)
        for other in others:
            other.result()
        return [done[place] for place in range(len(items))]


@contextmanager
def side_by_side(device: str | torch.device, parallel: bool = True) -> Iterator[Workers]:
    """As many workers as torch has threads; one, which is the calling thread, on a GPU or where `parallel` is
    off.

    On a CPU the calling thread has torch on one core meanwhile, but for what `map` computes: what lies
    between is little.
    """
    cores = torch.get_num_threads()
    if torch.device(device).type != "cpu" or cores == 1:
        yield Workers(1, cores, None)
        return
    with torch_threads(1):
        if not parallel:
            yield Workers(1, cores, None)
            return
        with ThreadPoolExecutor(cores - 1, initializer=torch.set_num_threads, initargs=(1,)) as others:
            yield Workers(cores, cores, others)


class _WithoutOneDNN:
    """torch's switch for oneDNN, off while anybody asks for that: it belongs to the whole process, and
    threads come and go in any order."""

    def __init__(self) -> None:
        self._lock, self._asking, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._asking:
                self._before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
            self._asking += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._asking -= 1
            if not self._asking:
                torch.backends.mkldnn.enabled = self._before


_without_onednn = _WithoutOneDNN()


class Runs(Protocol):
    """How a model, or the encoder that several share, runs. Read-only."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the base and the hidden states."""

    @property
    def in_steps(self) -> bool:
        """Whether batches are filled up to whole steps, so that shapes repeat."""

    @property
    def one_core(self) -> bool:
        """Whether a product takes one core whatever torch is told: little work is then worth sharing out,
        too."""

    @property
    def fused_stack(self) -> bool:
        """Whether all blocks are one call."""


def bounded_memory(model: Runs) -> AbstractContextManager[None]:
    """Float32 on a CPU without oneDNN while this lasts, unless the model fills its batches up to whole steps
    (`in_steps`).

    oneDNN keeps something for each shape it has seen, a buffer of that size for GELU's backward pass, and
    packed batches hardly repeat one (docs/log.md). bfloat16 and int8 need oneDNN.
    """
    plain = str(model.device) == "cpu" and model.dtype == torch.float32 and not model.in_steps
    return _without_onednn if plain else nullcontext()
