"""The adapters of a server by name: what every request asks is known here, what computes is in another
process."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textlora.core.errors import TextloraError, UnavailableError, UnknownAdapterError, error_of
from textlora.core.predictions import Answer, Prediction
from textlora.server.log import log


@dataclass(frozen=True)
class Card:
    """What an answer's shape and limits need of an adapter."""

    path: str
    labels: tuple[str, ...]
    problem_type: str
    pairs: bool
    max_length: int


class Registry:
    """Adapters by name, as `AdapterBank` has them in the process that computes.

    Args:
        handle: `Worker.handle`, there or here.
    """

    def __init__(self, handle: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]):
        self._handle = handle
        self._cards: dict[str, Card] = {}
        self._resident: set[str] = set()  # as far as was told: what is wrong here costs time, not answers
        self._changing = threading.Lock()  # changes there and here come in one order

    def _call(self, call: str, *given: Any) -> Any:
        kind, *rest = self._handle(call, given)
        if kind != "ok":
            raise error_of(kind, *rest)
        value, put_out = rest
        self._resident.difference_update(put_out)
        return value

    def add(self, path: str | Path, name: str, *, replace: bool = False, load: bool = False) -> None:
        """As `AdapterBank.add`. Raises UnavailableError where the process that computes has ended."""
        with self._changing:
            self._cards[name] = Card(str(path), *self._call("add", str(path), name, replace, load))
            (self._resident.add if load else self._resident.discard)(name)

    def remove(self, name: str, timeout: float) -> None:
        """Forget an adapter; returns when its last batch is done.

        Raises:
            UnknownAdapterError: there is none of that name.
            UsageError: it was still in use after `timeout` seconds; its memory is freed by the last batch.
        """
        with self._changing:
            if self._cards.pop(name, None) is None:
                raise UnknownAdapterError(f"no adapter '{name:.80}'")
            self._resident.discard(name)
            with contextlib.suppress(UnavailableError):
                self._call("retire", name)
        with contextlib.suppress(UnavailableError):
            self._call("wait", name, timeout)

    def restore(self, handle: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        """Register everything once more, with a new process; what is not there any more is forgotten."""
        with self._changing:
            self._resident.clear()
            for name, card in list(self._cards.items()):
                kind, *rest = handle("add", (card.path, name, False, False))
                if kind == "ok":
                    self._cards[name] = Card(card.path, *rest[0])
                else:
                    del self._cards[name]
                    log("adapter_refused", adapter=name, reason=str(error_of(kind, *rest)))

    def __contains__(self, name: str) -> bool:
        return name in self._cards

    def names(self) -> list[str]:
        return sorted(self._cards)

    def card(self, name: str) -> Card | None:
        return self._cards.get(name)

    def is_resident(self, name: str) -> bool:
        """Whether using it now reads nothing from disk, as far as is known."""
        return name in self._resident

    def warm(self, name: str) -> float:
        """Read an adapter where it is not in memory; seconds. Raises UnknownAdapterError and AdapterError."""
        seconds = self._call("warm", name)
        self._resident.add(name)
        return seconds

    def answers(
        self, texts: Sequence[str], names: Sequence[str], pairs: Sequence[str | None]
    ) -> list[Answer | TextloraError]:
        """As `AdapterEngine.answers`."""
        found = self._call("answers", list(texts), list(names), list(pairs))
        return [Answer(Prediction(*row[:5]), *row[5:]) if len(row) > 3 else error_of(*row) for row in found]

    def state(self) -> dict[str, int]:
        """Numbers for metrics: registered, resident, resident_bytes."""
        try:
            return self._call("state") | {"registered": len(self._cards)}
        except UnavailableError:
            return {"registered": len(self._cards), "resident": 0, "resident_bytes": 0}
