"""From settings to a server that listens until it is told to stop."""

import os
import signal
import socket
import sys
import time
from typing import Any

from textlora.core.errors import UsageError
from textlora.server.gc_tuning import settle
from textlora.server.keys import read_keys
from textlora.server.log import log
from textlora.server.settings import ServeSettings
from textlora.server.supervisor import Supervisor

SWITCH_SECONDS = 2e-4  # threads that wait for batches must not wait 5 ms for the event loop


def serve(settings: ServeSettings) -> None:
    """Listen, load, answer; returns when a signal has ended it and running requests are done.

    Raises:
        UsageError: a setting does not fit, the port is taken, or the extra `serve` is not installed.
        AdapterError, ModelError: an adapter or the base cannot be used.
    """
    begun = time.perf_counter()
    keys = read_keys(settings.api_keys, os.environ.get("TEXTLORA_API_KEY"))
    with _listen(settings.host, settings.port) as listener, Supervisor(settings) as keeper:
        try:
            import uvicorn  # all of it while the other process imports torch
            import uvloop  # noqa: F401

            from textlora.server.app import create_app
            from textlora.server.folders import Folders
            from textlora.server.registry import Registry
            from textlora.server.service import Service
        except ModuleNotFoundError as error:
            raise UsageError(f"serving needs {error.name}", 'pip install "textlora[serve]"') from error
        bank, facts = Registry(keeper.handle), keeper.start()
        service = Service(bank, facts, settings, lambda: keeper.alive)
        folders = Folders(service)
        folders.open_all()
        keeper.watch(bank.restore)
        host, port = listener.getsockname()[:2]
        log(
            "listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", adapters=len(bank.names()), keys=len(keys.keys),
            seconds=round(time.perf_counter() - begun, 2), engine_pid=keeper.pid,
        )  # fmt: skip
        sys.setswitchinterval(SWITCH_SECONDS)
        settle()
        signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # uvicorn raises it once more when all is answered; then this ends with 0
        uvicorn.Server(server_config(create_app(service, keys, folders), settings)).run([listener])
        if keeper.failed is not None:
            raise keeper.failed
        log("stopped")


def server_config(app: Any, settings: ServeSettings) -> Any:
    """`uvicorn.Config`."""
    import uvicorn

    from textlora.server.parser import bounded  # needs the extra `serve`

    return uvicorn.Config(
        app, http=bounded(settings.max_header_bytes), loop="uvloop", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        backlog=2048,
    )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is read: a taken port shows at once. Raises UsageError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error}",
            "choose another --port",
        ) from error
