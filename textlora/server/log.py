"""Log lines of the server, as JSON on standard error."""

import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def log(event: str, **fields: Any) -> None:
    """One JSON line on standard error. Callers pass names, numbers and routes, never a text or a key."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 10**6 % 1000:03}Z"
    with contextlib.suppress(OSError):  # a full disk under the log stops no answer
        print(json.dumps({"time": stamp, "event": event} | fields), file=sys.stderr, flush=True)


def log_bug(error: BaseException, **fields: Any) -> None:
    """Where an error came from, without its message, which may hold a text."""
    frames = [
        f"{Path(frame.filename).stem}.{frame.name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)[-6:]
    ]
    log("bug", error=type(error).__name__, frames=frames, **fields)
