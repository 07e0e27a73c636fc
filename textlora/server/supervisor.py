"""Keeps the process that computes: starts it, calls it, starts another when it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from textlora.core.errors import InternalError, TextloraError, UnavailableError, error_of
from textlora.server.ipc import Link
from textlora.server.log import log
from textlora.server.settings import ServeSettings

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from textlora.server.worker import main; main(int(sys.argv[2]))"
Handle = Callable[[str, tuple[Any, ...]], tuple[Any, ...]]
_GONE = "the process that computes has ended", "another is being started; come again later"


class Child:
    """One such process. Calls come from any thread, each on a connection that no other uses meanwhile."""

    def __init__(self, settings: ServeSettings):
        self._control, other = socket.socketpair()
        with other:
            # a session of its own: an interrupt from the terminal is for the server, which first ends its
            # requests
            command = [sys.executable, "-P", "-c", _CODE, json.dumps(sys.path), str(other.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._first = Link(self._control)
        self._free: list[Link] = []
        resident = settings.adapter_memory_mb * 2**20
        options = {
            "base": settings.model,
            "device": settings.device,
            "resident_bytes": resident,
            "precision": settings.precision,
        }
        with contextlib.suppress(OSError):  # it has ended: `facts` tells
            self._first.send((settings.threads, options))

    def facts(self) -> dict[str, Any]:
        """What `Worker.facts` says, when the base is loaded. Raises what loading it raised, or InternalError
        where the process has ended."""
        try:
            kind, *rest = self._first.receive()
        except (EOFError, OSError):
            raise InternalError(
                f"the process that computes ended as it started, with {self.process.wait()}"
            ) from None
        if kind != "ok":
            raise error_of(kind, *rest)
        return rest[0]

    def handle(self, call: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `Worker.handle`. Raises UnavailableError where the process has ended."""
        link = None
        try:
            link = self._link()
            link.send((call, given))
            answer = link.receive()
        except (EOFError, OSError):
            if link is not None:
                link.close()
            raise UnavailableError(*_GONE) from None
        self._free.append(link)
        return answer

    def _link(self) -> Link:
        with contextlib.suppress(IndexError):
            return self._free.pop()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return Link(ours)

    def close(self) -> None:
        """End it: it keeps nothing that would be lost."""
        self.process.kill()
        self.process.wait()
        self._first.close()
        for link in self._free:
            link.close()


class Supervisor:
    """A child, and when it ends the next one: who asks meanwhile is told so. Use it as a context; `start`
    comes first.

    Attributes:
        failed: why there will be no other child; then the server is told to end.
    """

    def __init__(self, settings: ServeSettings):
        self._settings, self._child = settings, Child(settings)
        self._closing = False
        self.alive = False
        self.failed: TextloraError | OSError | None = None

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing, self.alive = True, False
        self._child.close()

    def start(self) -> dict[str, Any]:
        """Facts of the child when it has read its base. Raises as `Child.facts`."""
        facts = self._child.facts()
        self.alive = True
        return facts

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def handle(self, call: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `Child.handle`."""
        if not self.alive:
            raise UnavailableError(*_GONE)
        return self._child.handle(call, given)

    def watch(self, restore: Callable[[Handle], None]) -> None:
        """From now on start another child where one ends; `restore` is told its `handle` before others may
        call it."""
        threading.Thread(target=self._watch, args=(restore,), name="textlora-keeper", daemon=True).start()

    def _watch(self, restore: Callable[[Handle], None]) -> None:
        while True:
            code = self._child.process.wait()
            if self._closing:
                return
            self.alive = False
            log("engine_ended", code=code)
            self._child.close()
            try:
                self._child = Child(self._settings)
                self._child.facts()
                restore(self._child.handle)
            except (TextloraError, OSError) as error:
                self.failed = error
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self.alive = True
            log("engine_started", engine_pid=self.pid)
