"""A connection between trainer and server that the harness can cut, and that tells it what passes."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from typing import Self

REQUEST = re.compile(rb"(?:GET|POST) (/\w+)[^\r\n]* HTTP/1\.1\r\n")
PIECE = 2**16
IDLE_S = 0.2


class Link:
    """A TCP proxy in front of one server, whose port may change. ``seen`` counts the paths of requests.

    It stands for the network: ``cut`` ends every connection and refuses new ones for a while, which is
    what a trainer sees of a cable that was pulled and plugged in again.
    """

    def __init__(self) -> None:
        self.target = 0
        self.seen: dict[str, int] = {}
        self._cut_until = 0.0
        self._open: set[socket.socket] = set()
        self._changing = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._end_all()

    def cut(self, seconds: float) -> None:
        """No connection lives, and none is made, for so long."""
        self._cut_until = time.monotonic() + seconds
        self._end_all()

    def count(self, *paths: str) -> int:
        """Requests to these paths until now."""
        return sum(self.seen.get(path, 0) for path in paths)

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def _serve(self, ours: socket.socket) -> None:
        try:
            if time.monotonic() < self._cut_until:
                raise OSError("cut")
            theirs = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            ours.close()
            return
        with self._changing:
            self._open |= {ours, theirs}
        with contextlib.suppress(OSError, ValueError):
            self._pass_on(ours, theirs)
        with self._changing:
            self._open -= {ours, theirs}
        ours.close()
        theirs.close()

    def _pass_on(self, ours: socket.socket, theirs: socket.socket) -> None:
        other = {ours: theirs, theirs: ours}
        while True:
            ready, _, _ = select.select(list(other), [], [], IDLE_S)
            for source in ready:
                data = source.recv(PIECE)
                if not data:
                    return
                if source is ours:
                    for path in REQUEST.findall(data):
                        self.seen[path.decode()] = self.seen.get(path.decode(), 0) + 1
                other[source].sendall(data)

    def _end_all(self) -> None:
        with self._changing:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
