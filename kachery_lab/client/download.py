"""One large answer, read by a thread in pieces of 1 MiB.

The asynchronous library hands on what each packet brings, which costs more than hashing it; the standard library fills
a large buffer at once.
"""

from __future__ import annotations

import asyncio
import http.client
from typing import Any, Self
from urllib.parse import urlsplit

from kachery_lab.client.problems import error_from_problem
from kachery_lab.core import strict_json
from kachery_lab.errors import InvalidInput, KacheryLabError, Unavailable

PIECE = 1 << 20
_MAX_PROBLEM = 64 * 1024


class Download:
    """A GET from `offset` on. `status` and headers have come when it is open; redirects are not followed."""

    def __init__(self, url: str, offset: int, timeout: float) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=timeout)
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        self._connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
        self._response = self._connection.getresponse()

    @classmethod
    async def open(cls, url: str, offset: int, timeout: float) -> Self:
        """Raises the error that the server answered, Unavailable for another range than the one asked for, OSError and
        HTTPException for a connection that fails."""
        self = await asyncio.to_thread(cls, url, offset, timeout)
        try:
            await asyncio.to_thread(self._check, offset)
        except BaseException:
            self.close()
            raise
        return self

    def _check(self, offset: int) -> None:
        response = self._response
        if response.status != (206 if offset else 200):
            raise _refusal(response.status, response.read(_MAX_PROBLEM))
        if offset and not (response.getheader("content-range") or "").startswith(f"bytes {offset}-"):
            raise Unavailable("the hub sent another range than the one asked for")

    async def piece(self) -> bytearray:
        """The next bytes; fewer than PIECE, or none, when the answer ends or the connection is cut."""
        return await asyncio.to_thread(self._piece)

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
        self._connection.close()


def _refusal(status: int, body: bytes) -> KacheryLabError:
    found: Any
    try:
        found = strict_json.loads(body)
    except InvalidInput:
        found = {}
    return error_from_problem(status, found)
