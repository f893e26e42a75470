"""What stands between a client and a server, and spoils what goes between them."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

Pieces = Iterator[bytes]
Change = Callable[[Pieces], Pieces]
"""What an end said -> what the other one hears. When it is exhausted the connection ends."""
PIECE = 65536


def unchanged(pieces: Pieces) -> Pieces:
    """Everything arrives."""
    return pieces


def relay(
    client: socket.socket, server: socket.socket, requests: Change = unchanged, answers: Change = unchanged
) -> None:
    """Pass on what both ends say until one of them ends the connection; then the other one's has ended, too."""
    there = threading.Thread(target=_pass, args=(client, server, requests), daemon=True)
    there.start()
    _pass(server, client, answers)
    there.join()


def _pass(source: socket.socket, sink: socket.socket, change: Change) -> None:
    # Whichever end is gone, the connection has ended: that is all there is to say of it.
    with suppress(OSError):
        for piece in change(iter(lambda: source.recv(PIECE), b"")):
            sink.sendall(piece)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Passes on connections to a port of this machine, one thread each. `cut` ends them all and takes no more until
    `heal`. Subclasses change what goes through. Use with `with`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._cut = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake up who waits for connections.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Between this moment and `heal` the server cannot be reached."""
        self._cut = True
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """The server can be reached again."""
        self._cut = False

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, to its end. OSError ends it."""
        relay(client, server)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        # A server that is away, or goes away, ends the connection, as without a proxy.
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            ends = {client, server}
            self._open |= ends
            try:
                if not self._cut:
                    self.serve(client, server)
            finally:
                self._open -= ends


class Cable(Proxy):
    """Can go silent without ending anything."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self._passing = threading.Event()
        self._passing.set()

    def silence(self) -> None:
        """From now on nothing arrives; nor is anything lost."""
        self._passing.clear()

    def heal(self) -> None:
        """What was held back arrives, and what comes after it."""
        super().heal()
        self._passing.set()

    def cut(self) -> None:
        """As `Proxy.cut`; what was held back is lost."""
        super().cut()
        self._passing.set()

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        relay(client, server, self._held, self._held)

    def _held(self, pieces: Pieces) -> Pieces:
        for piece in pieces:
            self._passing.wait()
            yield piece


class Cutter(Proxy):
    """Ends each connection when so many bytes have come from the server; `cuts` counts them."""

    def __init__(self, target: int, after: int) -> None:
        super().__init__(target)
        self.cuts = 0
        self._after = after

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        relay(client, server, answers=self._beginning)

    def _beginning(self, pieces: Pieces) -> Pieces:
        left = self._after
        for piece in pieces:
            yield piece[:left]
            if len(piece) > left:
                self.cuts += 1
                return
            left -= len(piece)


class LosingProxy(Proxy):
    """Takes one HTTP request on a connection. Of the next request to each path in `losing` (its last part) it drops the
    answer, if that is a 2xx: the server has done it, and nobody hears of it. `lost` counts them. WebSockets pass."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.losing: list[str] = []
        self.lost: Counter[str] = Counter()

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        request = _until(client, b"", lambda data: b"\r\n\r\n" in data)
        head, complete, body = request.partition(b"\r\n\r\n")
        if not complete:
            return
        if b"upgrade: websocket" in head.lower():
            server.sendall(request)
            relay(client, server)
            return
        fields = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        length = next((int(line[15:]) for line in fields if line.lower().startswith(b"content-length:")), 0)
        body = _until(client, body, lambda data: len(data) >= length)
        server.sendall(b"\r\n".join([*fields, b"Connection: close"]) + b"\r\n\r\n" + body)
        answer = _until(server, b"", lambda _: False)
        path = urlsplit(fields[0].split()[1].decode()).path.rpartition("/")[2]
        if path in self.losing and answer.startswith(b"HTTP/1.1 2"):
            self.losing.remove(path)
            self.lost[path] += 1
        else:
            client.sendall(answer)


def _until(source: socket.socket, data: bytes, complete: Callable[[bytes], bool]) -> bytes:
    """What came, with more of it until it is complete, or the end of the connection."""
    while not complete(data) and (piece := source.recv(PIECE)):
        data += piece
    return data
