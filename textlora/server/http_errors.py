"""Errors as answers: one shape, TEI's words, and nothing of the inside."""

from collections.abc import Mapping

from textlora.core.errors import AdapterError, OverloadError, TextloraError

TYPES = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    424: "Backend",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Timeout",
}
HTTP_TEXTS = {
    404: "there is nothing here; GET /openapi.json lists the routes",
    405: "this path has no such method; GET /openapi.json lists the routes",
    400: "the body is not JSON in UTF-8",
}


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.error_type = error_type or TYPES.get(status, "Validation")

    @property
    def body(self) -> dict[str, str]:
        return {"error": self.message, "error_type": self.error_type}


def unauthorized() -> Refusal:
    return Refusal(401, "give a key as 'Authorization: Bearer KEY'", headers={"WWW-Authenticate": "Bearer"})


def refusal(error: TextloraError, adapter: str = "") -> Refusal:
    """What a client may know of an error; messages about adapters hold paths, which it may not."""
    if isinstance(error, OverloadError):
        return Refusal(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, AdapterError):
        return Refusal(424, f"adapter '{adapter}' cannot be used: its folder is damaged, incomplete or gone")
    return Refusal(error.http_status, str(error))
