"""What the routes share: which adapters a key means, limits, loading before queueing, and answers in time."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from textlora.core.errors import (
    AdapterError,
    DeadlineError,
    InternalError,
    OverloadError,
    TextloraError,
    UnknownAdapterError,
)
from textlora.core.predictions import NAME, Answer
from textlora.inference.batcher import Batcher, Task
from textlora.server.http_errors import Refusal, refusal
from textlora.server.keys import Key
from textlora.server.log import log_bug
from textlora.server.metrics import Metrics
from textlora.server.registry import Card, Registry
from textlora.server.settings import ServeSettings

LOADING = 64  # requests that may wait for adapters to be read


@dataclass(frozen=True)
class Answers:
    """Answers[text][adapter] of one request, and its times in seconds."""

    rows: list[list[Answer]]
    characters: int
    queued: float
    ran: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for row in self.rows for answer in row)


class Service:
    """Adapters behind a queue. `start` and `stop` run on the event loop.

    Args:
        facts: as `Worker.facts` has them.
        there: whether what computes is there.
    """

    def __init__(
        self,
        bank: Registry,
        facts: Mapping[str, Any],
        settings: ServeSettings,
        there: Callable[[], bool] = lambda: True,
    ):
        self.bank, self.facts, self.settings, self._there = bank, facts, settings, there
        self.batcher: Batcher | None = None
        self.metrics = Metrics(self.bank.state, lambda: self.batcher.waiting if self.batcher else 0)
        self.created = int(time.time())
        self._loader = ThreadPoolExecutor(1, "textlora-adapters")
        self._loading = 0

    def start(self) -> None:
        self.batcher = Batcher(
            self.bank.answers, batch_tokens=self.settings.batch_tokens, queue_rows=self.settings.queue_rows,
            wait=self.settings.batch_wait_ms / 1e3, on_batch=self.metrics.batch, threads=self.facts["threads"],
        )  # fmt: skip

    async def stop(self) -> None:
        if self.batcher is not None:
            await self.batcher.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        return self.batcher is not None and self.batcher.alive and self._there()

    def check_room(self) -> None:
        """Raise OverloadError where the queue is full."""
        if self.batcher is not None:
            self.batcher.check_room()

    def visible(self, key: Key) -> list[str]:
        return [name for name in self.bank.names() if key.sees(name)]

    def select(self, key: Key, path_name: str | None, *named: str | list[str] | None) -> list[str]:
        """The adapters a request means, by its path, `model` or `adapter_id`. Raises Refusal."""
        given = [
            [one] if isinstance(one, str) else list(one) for one in (path_name, *named) if one is not None
        ]
        if any(one != given[0] for one in given):
            raise Refusal(400, "the request names two different adapters")
        default = self.settings.default_adapter
        names = (
            given[0]
            if given
            else [default]
            if default is not None and default in self.bank and key.sees(default)
            else []
        )
        if not names:
            some = self.visible(key)
            shown = ", ".join(some[:20]) + (", ..." if len(some) > 20 else "")
            raise Refusal(400, f"name an adapter as model; there are: {shown or 'none'}")
        if len(set(names)) < len(names):
            raise Refusal(400, "an adapter is named twice")
        for name in names:
            self.check_name(key, name)
        return names

    def check_name(self, key: Key, name: str) -> None:
        """Raise a 404 that is the same for what is not there and what the key may not see."""
        if not NAME.fullmatch(name) or not key.sees(name) or name not in self.bank:
            raise _unknown(name)

    def tasks(self, texts: Sequence[tuple[str, str | None]], names: Sequence[str]) -> list[Task]:
        """Texts as work, within the limits. Raises Refusal."""
        limit = self.settings.max_client_batch_size
        if len(texts) * len(names) > limit:
            raise Refusal(
                413, f"{len(texts)} texts for {len(names)} adapters; at most {limit} rows in one request"
            )
        for i, pair in enumerate(texts):
            for text in pair:
                if text is not None and not text.strip():
                    raise Refusal(400, f"text {i + 1} is empty", "Empty")
                if text is not None and len(text) > self.settings.max_text_chars:
                    raise Refusal(
                        413,
                        f"text {i + 1} has {len(text)} characters; at most {self.settings.max_text_chars}",
                    )
        longest = 0
        for name in names:
            card = self._card(name)
            longest = max(longest, card.max_length)
            if any((second is not None) != card.pairs for _, second in texts):
                wants = (
                    "pairs of texts: give [first, second]"
                    if card.pairs
                    else "single texts: two strings in a list are one pair"
                )
                raise Refusal(400, f"adapter '{name}' takes {wants}")
        return [
            Task(one, two, tuple(names), min(longest, 3 + (len(one) + len(two or "")) // 4))
            for one, two in texts
        ]

    def _card(self, name: str) -> Card:
        card = self.bank.card(name)
        if card is None:
            raise _unknown(name)
        return card

    async def answer(
        self, texts: Sequence[tuple[str, str | None]], names: Sequence[str], whole: bool = False
    ) -> Answers:
        """Answers of all texts by all adapters.

        Args:
            whole: refuse texts that are longer than an adapter reads.

        Raises:
            Refusal: of the first text that cannot be answered, of a full queue, or of the deadline.
        """
        tasks = self.tasks(texts, names)
        until = time.monotonic() + self.settings.deadline_seconds
        try:
            await self._load(names, until)
            results = await self.batcher.submit(tasks, until - time.monotonic())
        except OverloadError as error:
            self.metrics.dropped.labels("queue_full").inc()
            raise refusal(error) from None
        except DeadlineError as error:
            self.metrics.dropped.labels("deadline").inc()
            raise refusal(error) from None
        except asyncio.CancelledError:
            self.metrics.dropped.labels("client_gone").inc()
            raise
        except TextloraError as error:
            raise refusal(error) from None
        for i, result in enumerate(results):
            for name, answer in zip(names, result.answers, strict=True):
                if isinstance(answer, InternalError) and answer.__cause__ is not None:
                    log_bug(answer.__cause__)
                if isinstance(answer, TextloraError):
                    raise _unknown(name) if isinstance(answer, UnknownAdapterError) else refusal(answer, name)
                if whole and answer.full > answer.tokens:
                    raise Refusal(
                        422,
                        f"text {i + 1} has {answer.full} tokens; adapter '{name}' reads {answer.tokens}",
                        "Tokenizer",
                    )
        characters = sum(len(one) + len(two or "") for one, two in texts)
        answers = Answers(
            [result.answers for result in results],
            characters,
            max(r.queued for r in results),
            max(r.ran for r in results),
        )
        self.metrics.texts.inc(len(texts) * len(names))
        self.metrics.tokens.inc(answers.tokens)
        return answers

    async def _load(self, names: Sequence[str], until: float) -> None:
        """Read adapters that are not in memory, beside the batches that run. Raises Refusal, OverloadError,
        DeadlineError."""
        for name in names:
            if self.bank.is_resident(name):
                continue
            if self._loading >= LOADING:
                raise OverloadError("too many adapters are being read", "come again later")
            self._loading += 1
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self.in_loader(self._warm, name)
            except TimeoutError:
                raise DeadlineError(f"adapter '{name}' was not read in time", "come again later") from None
            except UnknownAdapterError:
                raise _unknown(name) from None
            except AdapterError as error:
                raise refusal(error, name) from None
            finally:
                self._loading -= 1

    def _warm(self, name: str) -> None:
        if not self.bank.is_resident(name):  # nobody before it in the queue was for the same one
            self.metrics.loads.observe(self.bank.warm(name))

    async def in_loader(self, job, *given):
        """Run `job` in the thread that reads adapters."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, job, *given)


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"no adapter '{name}'" if NAME.fullmatch(name) else "no adapter of that name")
