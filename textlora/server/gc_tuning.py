"""Pauses of Python's collector of circular garbage, which hold up every request at once."""

import gc


def settle() -> None:
    """Call when a process of the server has started: what is there now stays, and of what comes later only
    the young is looked through.

    All of it took 60 ms every few seconds in the process that listens, and 80 ms in the one that computes;
    neither found anything.
    """
    gc.freeze()
    gc.set_threshold(5000, 10, 1000)
