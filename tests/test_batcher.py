"""The queue that makes batches: budget, company, order, bounds, deadlines, and that one bad text fails alone."""

import asyncio
import threading
import time

import pytest

from textlora.core.errors import AdapterError, DeadlineError, InternalError, Interrupted, OverloadError
from textlora.inference.batcher import Batcher, Task


def task(text: str, tokens: int = 10, adapters: tuple[str, ...] = ("a",)) -> Task:
    return Task(text, None, adapters, tokens)


class Recorder:
    """A `run` that notes its batches, and waits where it is told to."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def __call__(self, texts, adapters, pairs):
        self.begun.set()
        assert self.gate.wait(20)
        self.batches.append(list(texts))
        if any(text == "breaks" for text in texts):
            raise ZeroDivisionError("a bug")
        return [
            AdapterError("bad") if name == "bad" else f"{name}:{text}:{pair}"
            for text, name, pair in zip(texts, adapters, pairs, strict=True)
        ]


def with_batcher(body, **settings):
    async def main():
        run, facts = Recorder(), []
        batcher = Batcher(run, on_batch=facts.append, **settings)
        try:
            return await body(batcher, run, facts)
        finally:
            run.gate.set()
            await batcher.close()
            assert batcher.waiting == 0
            assert not batcher.alive

    return asyncio.run(main())


async def begun(run: Recorder) -> None:
    while not run.begun.is_set():
        await asyncio.sleep(0.001)


def test_answers_come_back_to_who_asked():
    async def body(batcher, run, facts):
        asked = [
            [task(f"{i}-{j}", adapters=("a", "b")[: 1 + j % 2]) for j in range(i % 4 + 1)] for i in range(20)
        ]
        found = await asyncio.gather(*(batcher.submit(tasks, 10) for tasks in asked))
        for tasks, results in zip(asked, found, strict=True):
            for one, result in zip(tasks, results, strict=True):
                assert result.answers == [f"{name}:{one.text}:None" for name in one.adapters]
                assert result.queued >= 0
        assert sum(fact.rows for fact in facts) == sum(len(one.adapters) for tasks in asked for one in tasks)

    with_batcher(body)


def test_what_waits_is_the_next_batch_up_to_the_budget():
    async def body(batcher, run, facts):
        run.gate.clear()
        first = asyncio.create_task(batcher.submit([task("first")], 10))
        await begun(run)
        rest = [asyncio.create_task(batcher.submit([task(str(i))], 10)) for i in range(7)]
        large = asyncio.create_task(batcher.submit([task("large", tokens=1000)], 10))
        await asyncio.sleep(0.01)
        assert batcher.waiting == 8
        run.gate.set()
        await asyncio.gather(first, *rest, large)
        assert run.batches == [["first"], ["0", "1", "2"], ["3", "4", "5"], ["6"], ["large"]]
        assert [fact.tokens for fact in facts] == [10, 30, 30, 10, 1000]

    with_batcher(body, batch_tokens=30, wait=0)


def test_an_idle_thread_waits_for_company():
    async def body(batcher, run, facts):
        first = asyncio.create_task(batcher.submit([task("one")], 10))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batcher.submit([task("two", tokens=990)], 10))
        assert run.batches == [["one", "two"]]

    begin = time.monotonic()
    with_batcher(body, batch_tokens=1000, wait=15)
    assert time.monotonic() - begin < 10  # a full budget ends the wait


def test_a_full_queue_refuses_and_says_when_to_come_again():
    async def body(batcher, run, facts):
        run.gate.clear()
        first = asyncio.create_task(batcher.submit([task("first")], 10))
        await begun(run)
        waiting = asyncio.create_task(batcher.submit([task("x"), task("y")], 10))
        await asyncio.sleep(0)
        batcher.check_room()
        with pytest.raises(OverloadError) as refused:
            await batcher.submit([task("p"), task("q")], 10)
        assert refused.value.retry_after >= 1
        third = asyncio.create_task(batcher.submit([task("z")], 10))
        await asyncio.sleep(0)
        with pytest.raises(OverloadError):
            batcher.check_room()
        run.gate.set()
        await asyncio.gather(first, waiting, third)
        assert (
            len(await batcher.submit([task(str(i)) for i in range(9)], 10)) == 9
        )  # larger than the queue, which is empty

    with_batcher(body, queue_rows=3, wait=0)


def test_work_that_nobody_waits_for_is_not_run():
    async def body(batcher, run, facts):
        run.gate.clear()
        first = asyncio.create_task(batcher.submit([task("first")], 10))
        await begun(run)
        late = asyncio.create_task(batcher.submit([task("late")], 0.02))
        gone = asyncio.create_task(batcher.submit([task("gone"), task("too")], 10))
        kept = asyncio.create_task(batcher.submit([task("kept")], 10))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.02 s"):
            await late
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.waiting == 1
        run.gate.set()
        await asyncio.gather(first, kept)
        assert run.batches == [["first"], ["kept"]]

    with_batcher(body, wait=0)


def test_one_bad_text_fails_alone():
    async def body(batcher, run, facts):
        run.gate.clear()
        first = asyncio.create_task(batcher.submit([task("first")], 10))
        await begun(run)
        rest = [
            asyncio.create_task(batcher.submit([one], 10))
            for one in (task("good"), task("breaks"), task("x", adapters=("a", "bad")), task("also good"))
        ]
        await asyncio.sleep(0.01)
        run.gate.set()
        good, broken, mixed, also = [(await one)[0].answers for one in rest]
        assert (good, also) == (["a:good:None"], ["a:also good:None"])
        assert isinstance(broken[0], InternalError)
        assert isinstance(broken[0].__cause__, ZeroDivisionError)
        assert mixed[0] == "a:x:None"
        assert isinstance(mixed[1], AdapterError)
        await first

    with_batcher(body, wait=0)


def test_closing_finishes_what_waits_and_takes_no_more():
    async def body(batcher, run, facts):
        run.gate.clear()
        tasks = [asyncio.create_task(batcher.submit([task(str(i))], 10)) for i in range(5)]
        await begun(run)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Interrupted):
            await batcher.submit([task("new")], 10)
        run.gate.set()
        assert [(await one)[0].answers for one in tasks] == [[f"a:{i}:None"] for i in range(5)]
        await closing

    with_batcher(body, batch_tokens=20, wait=0)
