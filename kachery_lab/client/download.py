"""One large answer, read by a thread in pieces of 4 MiB.

The asynchronous library hands on what each packet brings, which costs more than hashing it; the standard library fills
a large buffer at once.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from kachery_lab.client.problems import error_from_problem
from kachery_lab.client.reach import Reach
from kachery_lab.core import strict_json
from kachery_lab.errors import InvalidInput, KacheryLabError, Unavailable

PIECE = 1 << 22
LEAST_RATE = 1024
PIECE_SECONDS = 60.0
"""A hub that sends fewer than LEAST_RATE bytes per second over this time is given up."""
_MAX_PROBLEM = 64 * 1024


T = TypeVar("T")


class Threads:
    """A few threads that wait for another machine, so that a slow one keeps nobody else's."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._executor = ThreadPoolExecutor(count, "download")

    async def run(self, fn: Callable[[], T], cut: Callable[[], None]) -> T:
        """Run `fn` in a thread; `cut`, which makes it end, is called after PIECE_SECONDS and when the caller goes."""
        loop = asyncio.get_running_loop()
        async with self._free:
            timer = loop.call_later(PIECE_SECONDS, cut)
            try:
                return await loop.run_in_executor(self._executor, fn)
            except asyncio.CancelledError:
                cut()
                raise
            finally:
                timer.cancel()

    def close(self) -> None:
        """Wait for nothing."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Download:
    """A GET from `offset` on. Status and headers have come when it is open; redirects are not followed."""

    def __init__(self, reach: Reach, threads: Threads, url: str, timeout: float) -> None:
        self._reach = reach
        self._threads = threads
        self._url = url
        self._timeout = timeout
        self._sock: socket.socket | None = None
        self._late = False
        self._connection: http.client.HTTPConnection
        self._response: http.client.HTTPResponse

    @classmethod
    async def open(cls, reach: Reach, threads: Threads, url: str, offset: int, timeout: float) -> Self:
        """Raises the error that the server answered, Unavailable for another range than the one asked for, Forbidden
        for an address out of reach, OSError and HTTPException for a connection that fails."""
        self = cls(reach, threads, url, timeout)
        try:
            await threads.run(lambda: self._open(offset), self._cut)
        except BaseException:
            self.close()
            raise
        return self

    def _open(self, offset: int) -> None:
        parts = urlsplit(self._url)
        # Connected before it is asked to, so that the name is not looked up again.
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=self._timeout)
        self._connection.sock = self._sock = self._reach.connect(self._url, self._timeout)
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        self._connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
        self._response = self._connection.getresponse()
        self._check(offset)

    def _cut(self) -> None:
        """End what a thread waits for."""
        self._late = True
        if self._sock is not None:
            with suppress(OSError):
                # Of the socket itself: that of a TLS socket would change it under the thread that reads.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _check(self, offset: int) -> None:
        response = self._response
        if response.status != (206 if offset else 200):
            raise _refusal(response.status, response.read1(_MAX_PROBLEM))
        if offset and not (response.getheader("content-range") or "").startswith(f"bytes {offset}-"):
            raise Unavailable("the hub sent another range than the one asked for")

    async def piece(self) -> bytearray:
        """The next bytes; fewer than PIECE, or none, when the answer ends or the connection is cut. Raises Unavailable
        for an answer that comes more slowly than LEAST_RATE."""
        piece = await self._threads.run(self._piece, self._cut)
        if self._late and len(piece) < LEAST_RATE * PIECE_SECONDS:
            raise Unavailable("the hub sends too slowly", hint="Try again later")
        return piece

    def _piece(self) -> bytearray:
        buffer = bytearray(PIECE)
        view = memoryview(buffer)
        have = 0
        while have < PIECE:
            try:
                count = self._response.readinto(view[have:])
            except (OSError, http.client.HTTPException):
                # What arrived before the cut counts; the caller sees that it is less than was announced.
                break
            if not count:
                break
            have += count
        view.release()
        del buffer[have:]
        return buffer

    def close(self) -> None:
        """End the connection."""
        if self._sock is not None:
            self._sock.close()
            self._connection.close()


def _refusal(status: int, body: bytes) -> KacheryLabError:
    found: Any
    if status < 400:
        return Unavailable(f"the hub answers {status}, which is not followed")
    try:
        found = strict_json.loads(body)
    except InvalidInput:
        found = {}
    return error_from_problem(status, found)
