"""Calls between the server's two processes: plain values (text, numbers, lists, tuples, dictionaries) over a
socket, one call at a time.

`marshal` writes them: nothing else comes as near to free, it makes no object of any class, and both ends are
the same interpreter.
"""

import marshal
import socket
from typing import Any


class Link:
    """One end of a pair of connected sockets.

    Messages are a length and that many bytes. An end that goes shows as EOFError or OSError at the other one.
    """

    def __init__(self, end: socket.socket):
        self._socket, self._reading = end, end.makefile("rb")

    def send(self, value: Any) -> None:
        data = marshal.dumps(value)
        self._socket.sendall(len(data).to_bytes(8, "big") + data)

    def receive(self) -> Any:
        return marshal.loads(self._exactly(int.from_bytes(self._exactly(8), "big")))

    def close(self) -> None:
        self._reading.close()
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = self._reading.read(size)
        if len(data) < size:
            raise EOFError
        return data
