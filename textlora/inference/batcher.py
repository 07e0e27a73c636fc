"""Requests of many clients to batches, by a token budget. Knows no HTTP, no adapter and prints nothing.

The event loop puts work into a bounded queue; threads take whatever waits and run it. The next batch starts
as soon as a thread is free, so that batches grow with the load; only an idle thread waits a moment for
company. Work that nobody waits for is not run.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from textlora.core.errors import DeadlineError, InternalError, Interrupted, OverloadError, TextloraError


@dataclass(frozen=True)
class Task:
    """One text, or pair, for one or more adapters: they stay in one batch, since they share work.

    Attributes:
        tokens: an estimate of what one adapter reads; the budget counts it once for each.
    """

    text: str
    pair: str | None
    adapters: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Result:
    """What `run` gave for a task, one answer per adapter, and seconds in the queue and in the batch."""

    answers: list[Any]
    queued: float
    ran: float


@dataclass(frozen=True)
class BatchFacts:
    """One batch that ran: rows (text x adapter), estimated tokens, seconds."""

    rows: int
    tokens: int
    seconds: float
    queued: list[float]


@dataclass(eq=False)
class _Waiting:
    task: Task
    arrived: float
    future: asyncio.Future = field(repr=False)
    dropped: bool = False


Run = Callable[[Sequence[str], Sequence[str], Sequence[str | None]], list[Any]]


class Batcher:
    """A queue and the threads that empty it. Make it, and call `submit`, on one event loop.

    Args:
        run: texts, adapters and pairs of equal length to one answer or `TextloraError` for each, as
            `AdapterEngine.answers`.
        batch_tokens: estimated tokens of a batch; a larger task is a batch of its own.
        queue_rows: rows (text x adapter) that may wait; one request larger than this is taken by an empty
            queue.
        wait: seconds an idle thread waits for more work after the first.
        on_batch: told of each batch, from its thread.
        threads: batches at a time.
    """

    def __init__(
        self,
        run: Run,
        *,
        batch_tokens: int = 512,
        queue_rows: int = 1024,
        wait: float = 0.002,
        on_batch: Callable[[BatchFacts], None] = lambda _: None,
        threads: int = 1,
    ):
        self._run, self._on_batch = run, on_batch
        self.batch_tokens, self.queue_rows, self.wait = batch_tokens, queue_rows, wait
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._rate = 100.0  # rows a second, of the batches before
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"textlora-batches-{k}", daemon=True)
            for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._rows

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads) and not self._closed

    def check_room(self) -> None:
        """Raise OverloadError where the queue is full, before a request is even read."""
        if self._rows >= self.queue_rows:
            raise OverloadError(
                "too many requests are waiting",
                "come again later",
                max(1, math.ceil(self._rows / self._rate)),
            )

    async def submit(self, tasks: Sequence[Task], seconds: float) -> list[Result]:
        """Answers of one request's tasks, in order. Cancelling this drops those that wait.

        Args:
            seconds: from now on; then what still waits is dropped.

        Raises:
            OverloadError: the queue is full.
            DeadlineError: not done in time.
            Interrupted: the batcher is closed.
        """
        now = time.monotonic()
        rows = sum(len(task.adapters) for task in tasks)
        with self._changed:
            if self._closed:
                raise Interrupted("the server is shutting down", "ask another one")
            if self._rows and self._rows + rows > self.queue_rows:
                raise OverloadError(
                    "too many requests are waiting",
                    "come again later",
                    max(1, math.ceil(self._rows / self._rate)),
                )
            waiting = [_Waiting(task, now, self._loop.create_future()) for task in tasks]
            self._queue.extend(waiting)
            self._rows += rows
            self._changed.notify()
        try:
            async with asyncio.timeout(seconds):
                return [await one.future for one in waiting]
        except TimeoutError:
            raise DeadlineError(
                f"no answer within {seconds:g} s", "send less at once, or come again later"
            ) from None
        finally:
            self._drop(waiting)

    def _drop(self, waiting: list[_Waiting]) -> None:
        with self._changed:
            for one in waiting:
                one.future.cancel()
                if not one.dropped:
                    one.dropped = True
                    self._rows -= len(one.task.adapters)

    async def close(self) -> None:
        """Take no more work, finish what waits, end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _take(self) -> list[_Waiting]:
        """The next batch, oldest first; empty when closed and done."""
        with self._changed:
            idle = not self._queue
            self._changed.wait_for(lambda: self._queue or self._closed)
            if idle and self.wait and not self._closed:
                until = time.monotonic() + self.wait
                enough = lambda: (
                    self._closed
                    or sum(one.task.tokens * len(one.task.adapters) for one in self._queue)
                    >= self.batch_tokens
                )
                self._changed.wait_for(enough, until - time.monotonic())
            taken: list[_Waiting] = []
            tokens = 0
            while self._queue:
                one = self._queue[0]
                cost = one.task.tokens * len(one.task.adapters)
                if not one.dropped:
                    if taken and tokens + cost > self.batch_tokens:
                        break
                    taken.append(one)
                    tokens += cost
                    one.dropped = True  # it waits no more
                    self._rows -= len(one.task.adapters)
                self._queue.popleft()
            return taken

    def _work(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                with self._changed:
                    if self._closed and not self._queue:
                        return
                continue
            begun = time.monotonic()
            try:
                answers = self._answers(batch)
            except Exception as error:  # one text that breaks something must not fail those beside it
                answers = (
                    [self._alone(one) for one in batch] if len(batch) > 1 else [self._broken(batch[0], error)]
                )
            seconds = time.monotonic() - begun
            queued = [begun - one.arrived for one in batch]
            rows = sum(len(one.task.adapters) for one in batch)
            self._rate += 0.2 * (rows / max(seconds, 1e-4) - self._rate)
            results = [
                Result(answer, waited, seconds) for answer, waited in zip(answers, queued, strict=True)
            ]
            self._on_batch(
                BatchFacts(
                    rows, sum(one.task.tokens * len(one.task.adapters) for one in batch), seconds, queued
                )
            )
            self._loop.call_soon_threadsafe(
                _deliver, batch, results
            )  # last: who has an answer finds its batch counted

    def _answers(self, batch: list[_Waiting]) -> list[list[Any]]:
        tasks = [one.task for one in batch]
        texts = [task.text for task in tasks for _ in task.adapters]
        names = [name for task in tasks for name in task.adapters]
        found = iter(self._run(texts, names, [task.pair for task in tasks for _ in task.adapters]))
        return [[next(found) for _ in task.adapters] for task in tasks]

    def _alone(self, one: _Waiting) -> list[Any]:
        try:
            return self._answers([one])[0]
        except Exception as error:
            return self._broken(one, error)

    @staticmethod
    def _broken(one: _Waiting, error: Exception) -> list[Any]:
        trouble = error if isinstance(error, TextloraError) else InternalError("internal error")
        trouble.__cause__ = error if trouble is not error else None
        return [trouble] * len(one.task.adapters)


def _deliver(batch: list[_Waiting], results: list[Result]) -> None:
    for one, result in zip(batch, results, strict=True):
        if not one.future.done():
            one.future.set_result(result)
