"""Threads side by side: who computes what, in which order, on how many cores, and what a failure leaves."""

import ctypes
import threading
import time

import pytest
import torch

from textlora.kernels import bindings
from textlora.kernels.devices import side_by_side, torch_threads


@pytest.fixture
def three():
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    with side_by_side("cpu") as workers:
        yield workers
    assert torch.get_num_threads() == 3
    torch.set_num_threads(count)


def test_results_come_in_order_and_the_calling_thread_helps(three):
    together, seen = threading.Barrier(3, timeout=30), set()

    def compute(item):
        if item < 3:  # so that each thread takes one of the first three
            together.wait()
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return item * 10

    assert three.count == 3
    assert three.map(compute, range(50)) == [item * 10 for item in range(50)]
    assert {cores for _, cores in seen} == {1}
    assert len({thread for thread, _ in seen}) == 3
    assert threading.get_ident() in {thread for thread, _ in seen}


@pytest.mark.parametrize("items", [[], [7]])
def test_one_item_has_all_cores(three, items):
    assert three.map(lambda item: (item, torch.get_num_threads(), threading.get_ident()), items) == [
        (i, 3, threading.get_ident()) for i in items
    ]


@pytest.mark.parametrize("helper", [True, False])
def test_a_failure_ends_it_and_leaves_workers_at_work(three, helper):
    caller, begun, together = threading.get_ident(), [], threading.Barrier(3, timeout=30)

    def compute(item):
        begun.append(item)
        together.wait()
        if (threading.get_ident() != caller) == helper:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        three.map(compute, range(3))
    with pytest.raises(ZeroDivisionError):
        three.map(lambda item: begun.append(item) or 1 / item, range(100))
    assert len(begun) < 50
    assert three.map(str, range(5)) == list("01234")


def test_one_worker_where_nothing_is_gained():
    for device, parallel in (("cuda", True), ("cpu", False)):
        with side_by_side(device, parallel) as workers:
            assert workers.count == 1
            assert workers.map(lambda item: threading.get_ident(), range(3)) == [threading.get_ident()] * 3


def until(condition, again):
    """Again and again, as threads come when the system lets them; fails after half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        again()


@pytest.mark.skipif(bindings.library() is None, reason="nothing was compiled")
def test_a_call_has_the_cores_that_no_other_call_uses():
    """Threads that share three cores: a call alone is done by three threads; when a second one begins each
    keeps one, and helpers leave."""
    library, done, numbers = bindings.library(), [], {"first": set(), "second": set()}
    alone, begun, finished = threading.Event(), threading.Event(), threading.Event()

    def stage(name):
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
        def work(_, chunk, number):
            time.sleep(0.001)
            numbers[name].add(number)

        numbers[name].clear()
        library.textlora_share(work, None, ctypes.c_long(20), 3)

    def first():
        until(lambda: numbers["first"] == {0, 1, 2}, lambda: stage("first"))
        alone.set()
        assert begun.wait(30)
        until(lambda: numbers["first"] == {0}, lambda: stage("first"))
        done.append("first")

    def second():
        begun.set()
        stage("second")
        assert finished.wait(30)
        done.append("second")

    def run(body, after):
        bindings.share_cores(3)
        assert bindings.hands(1000) == 3
        assert bindings.hands(40) == 1
        assert after is None or after.wait(30)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: body())
        library.textlora_with_hands(call, None, None, 3)
        finished.set()

    threads = [threading.Thread(target=run, args=given) for given in ((first, None), (second, alone))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["first", "second"]  # a failure in a callback is only printed
    assert numbers["second"] == {0}


@pytest.mark.skipif(bindings.library() is None, reason="nothing was compiled")
@pytest.mark.parametrize("hands", [1, 2, 3])
def test_who_has_no_work_helps(three, hands):
    """Each chunk of a call is done once, by threads whose numbers are below what the call has room for; each
    number is one thread."""
    done, stages = [], []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    def work(_, chunk, number):
        time.sleep(0.001)
        done.append((chunk, number, threading.get_ident()))

    def share():
        stages.append(None)
        bindings.library().textlora_share(work, None, ctypes.c_long(60), hands)

    def compute(item):
        if item == 0:
            until(lambda: {number for _, number, _ in done} == set(range(hands)), share)
        return item

    for _ in range(5):
        done.clear()
        stages.clear()
        assert three.map(compute, range(2)) == [0, 1]
        assert sorted(chunk for chunk, _, _ in done) == sorted(list(range(60)) * len(stages))
        assert len({(number, thread) for _, number, thread in done}) == hands
    bindings.library().textlora_share(work, None, ctypes.c_long(4), hands)  # this thread has no crew now
    assert {thread for _, _, thread in done[-4:]} == {threading.get_ident()}


def test_what_lies_between_has_one_thread_and_what_is_mapped_has_all(three):
    """Beside a busy process a team of threads for little work waits for the slowest."""
    assert torch.get_num_threads() == 1
    assert three.map(lambda _: torch.get_num_threads(), [0]) == [3]
    with pytest.raises(ZeroDivisionError):
        three.map(lambda item: 1 / item, [0])
    assert torch.get_num_threads() == 1


def test_one_worker_on_the_processor_has_all_cores_for_what_is_mapped():
    with torch_threads(3):
        with side_by_side("cpu", parallel=False) as workers:
            assert torch.get_num_threads() == 1
            assert workers.map(lambda item: (item, torch.get_num_threads()), range(3)) == [
                (0, 3),
                (1, 3),
                (2, 3),
            ]
        assert torch.get_num_threads() == 3
