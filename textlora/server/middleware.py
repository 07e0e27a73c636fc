"""What surrounds every request: its id, its log line, its count, and the limits that hold before anything is
parsed."""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

from textlora.core.errors import OverloadError
from textlora.server.http_errors import Refusal, refusal, unauthorized
from textlora.server.keys import KeyRing
from textlora.server.log import log, log_bug
from textlora.server.metrics import Metrics

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Outer:
    """ASGI application around another one.

    Args:
        keys: a POST without one of them is refused before its body is read.
        check_room: raises OverloadError where a request that asks for predictions would find the queue full.
    """

    def __init__(
        self,
        app: Any,
        keys: KeyRing,
        metrics: Metrics,
        check_room: Callable[[], None],
        max_body: int,
        seconds: float,
    ):
        self.app = app
        self.keys = keys
        self.metrics = metrics
        self.check_room = check_room
        self.max_body = max_body
        self.seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
        status = 499  # nobody there to take an answer
        facts: dict[str, Any] = {}
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = self.keys.find(token.strip() if kind.lower() == "bearer" else None)
        scope.setdefault("state", {}).update(facts=facts, key=key)

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode()), *_HEADERS],
                }
            await send(message)

        try:
            if scope["method"] == "POST":
                if key is None:
                    raise unauthorized()
                if "/v1/load" not in scope["path"] and "/v1/unload" not in scope["path"]:
                    self.check_room()
                receive = await self._body(headers.get(b"content-length", b"0"), receive)
            await self.app(scope, receive, answer)
        except OverloadError as error:
            self.metrics.dropped.labels("queue_full").inc()
            await _send(refusal(error), answer)
        except Refusal as error:
            await _send(error, answer)
        except ConnectionError:
            pass
        except Exception as error:
            log_bug(error, request_id=request_id)
            if status == 499:
                await _send(
                    Refusal(500, "internal error; the log has its place under the request id"), answer
                )
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.duration.labels(route).observe(seconds)
            log(
                "request",
                request_id=request_id,
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1e3, 1),
                **facts,
            )

    async def _body(self, length: bytes, receive: Any) -> Any:
        """The whole body, bounded in bytes and time, then a `receive` that gives it once and afterwards tells
        when the client goes."""
        large = Refusal(413, f"the body has more than {self.max_body} bytes", headers={"Connection": "close"})
        if not length.isdigit() or int(length) > self.max_body:
            raise large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > self.max_body:
                        raise large
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self.seconds:g} s", "Timeout", {"Connection": "close"}
            ) from None
        body: list[bytes] | None = [b"".join(parts)]

        async def again() -> Any:
            nonlocal body
            if body is not None:
                message, body = {"type": "http.request", "body": body[0], "more_body": False}, None
                return message
            return await receive()

        return again


async def _send(error: Refusal, send: Any) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
