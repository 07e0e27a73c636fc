"""The process that computes: an engine that answers calls of the server's process. Reads no HTTP, and ends
when that process does."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from textlora.adapters.folder import AdapterMeta
from textlora.core.errors import AdapterError, InternalError, TextloraError, UsageError, told
from textlora.core.predictions import Answer
from textlora.inference.engine import AdapterEngine
from textlora.kernels.bindings import share_cores
from textlora.model.executor import executor_of
from textlora.server.gc_tuning import settle
from textlora.server.ipc import Link
from textlora.server.log import log_bug


class Worker:
    """What may be called, by name, with plain values in and out."""

    def __init__(self, engine: AdapterEngine):
        self.engine, self.bank = engine, engine.bank
        self.on_cpu = torch.device(self.bank.device).type == "cpu"
        self.threads = torch.get_num_threads() if self.on_cpu else 1
        self._retired: dict[str, Callable[[float | None], bool]] = {}
        calls = (self.facts, self.answers, self.add, self.warm, self.retire, self.wait, self.state)
        self._calls: dict[str, Callable[..., Any]] = {call.__name__: call for call in calls}

    def handle(self, call: str, given: Sequence[Any]) -> tuple[Any, ...]:
        """("ok", value, adapters put out of memory), or an error as `told` has it. Raises nothing."""
        try:
            return "ok", self._calls[call](*given), self.bank.put_out()
        except TextloraError as error:
            return told(error)
        except OSError as error:  # a folder that went while it was read
            return told(AdapterError(f"{error.filename}: {error.strerror or type(error).__name__}"))
        except Exception as error:
            log_bug(error)
            return told(InternalError("internal error"))

    def facts(self) -> dict[str, Any]:
        """What the server says of its base. `threads` is the number of batches that should run at a time."""
        files = self.bank.files
        return {
            "device": self.bank.device, "base_name": files.id or files.folder.name, "base_hash": self.bank.weights.hash,
            "max_length": files.config["max_position_embeddings"], "threads": self.threads, "executor": str(executor_of(self.bank.running)),
        }  # fmt: skip

    def answers(
        self, texts: list[str], names: list[str | None], pairs: list[str | None]
    ) -> list[tuple[Any, ...]]:
        """For each row the fields of an answer, or an error."""
        return [
            _plain(one) if isinstance(one, Answer) else told(one)
            for one in self.engine.answers(texts, names, pairs)
        ]

    def add(self, path: str, name: str, replace: bool, load: bool) -> tuple[Any, ...]:
        """Register; gives what `registry.Card` holds."""
        meta: AdapterMeta = self.bank.add(path, name, replace=replace, load=load)
        return meta.labels, meta.problem_type, meta.pairs, meta.max_length

    def warm(self, name: str) -> float:
        """Read an adapter where it is not in memory; seconds."""
        begun = time.perf_counter()
        with self.bank.use([name]):
            return time.perf_counter() - begun

    def retire(self, name: str) -> None:
        """Forget an adapter; `wait` comes next."""
        self._retired[name] = self.bank.retire(name)

    def wait(self, name: str, timeout: float) -> None:
        """Return when the last batch with a retired adapter is done. Raises UsageError after `timeout`
        seconds."""
        done = self._retired.pop(name, None)  # none: retired twice, and the other one waits
        if done is not None and not done(timeout):
            raise UsageError(f"adapter '{name}' is removed, and was still in use after {timeout:g} s")

    def state(self) -> dict[str, int]:
        return self.bank.state()


def _plain(answer: Answer) -> tuple[Any, ...]:
    found = answer.prediction
    return (
        found.label,
        found.labels,
        found.score,
        found.scores,
        found.logits,
        answer.problem_type,
        answer.tokens,
        answer.full,
    )


def main(control: int) -> None:
    """Answer calls until the socket of that file descriptor closes.

    The first message there is the engine's settings, the answer to it says what was loaded or why nothing
    was. Then each byte comes with a socket, whose calls get a thread of their own.
    """
    for sign in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the server's process gets them too, and ends this one when its requests are done
        signal.signal(sign, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the server ended as this one started
        _run(socket.socket(fileno=control))


def _run(control: socket.socket) -> None:
    link = Link(control)
    threads, options = link.receive()
    if threads:
        torch.set_num_threads(threads)
    try:
        worker = Worker(AdapterEngine(**options))
    except TextloraError as error:
        link.send(told(error))
        return
    settle()
    link.send(worker.handle("facts", ()))
    while True:
        _, sockets, *_ = socket.recv_fds(control, 1, 1)
        if not sockets:
            os._exit(0)  # threads that compute are not waited for: nobody wants their answers
        threading.Thread(
            target=_serve, args=(worker, Link(socket.socket(fileno=sockets[0]))), daemon=True
        ).start()


def _serve(worker: Worker, link: Link) -> None:
    if worker.on_cpu:
        torch.set_num_threads(1)  # a batch for each core: none waits for another's slower half ...
        share_cores(worker.threads)  # ... and a batch that is alone takes all
    while True:
        try:
            call, given = link.receive()
            link.send(worker.handle(call, given))
        except (EOFError, OSError):
            return
