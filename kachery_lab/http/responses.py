"""Blobs as HTTP answers: single ranges, strong ETag, no thread hop more than needed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kachery_lab.core.ids import Sha1
from kachery_lab.errors import RangeNotSatisfiable
from kachery_lab.services.content import READ_PIECE, Content

_RANGE = re.compile(r"bytes=[ \t]*(\d{0,100})-(\d{0,100})[ \t]*", re.ASCII | re.IGNORECASE)
IMMUTABLE = "private, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes `start` to `end` (exclusive) of `size`."""

    start: int
    end: int
    size: int

    def header(self) -> str:
        """The value of Content-Range."""
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def parse_range(header: str | None, size: int) -> Range | None:
    """The range to send; None: the whole. A header of another form, or with several ranges, is ignored, as the
    standard allows. Raises RangeNotSatisfiable."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None or match.group(0).strip().endswith("=-"):
        return None
    first, last = match.group(1), match.group(2)
    if not first and not last:
        return None
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= end:
        raise RangeNotSatisfiable(f"the file has {size} bytes; the range begins behind them", size=size)
    return Range(start, end, size)


def etag(sha1: Sha1) -> str:
    """A blob's strong validator is its name."""
    return f'"{sha1}"'


def matches(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match header names this tag."""
    if header is None:
        return False
    names = [part.strip().removeprefix("W/") for part in header.split(",")]
    return tag in names or "*" in names


class ContentResponse(Response):
    """Sends a part of verified content and closes it. A failure on the way ends the connection: the client sees fewer
    bytes than were announced, never other ones."""

    def __init__(
        self,
        content: Content,
        start: int,
        end: int,
        status: int,
        headers: Mapping[str, str],
        media_type: str = "application/octet-stream",
        sent: Callable[[int], None] | None = None,
    ) -> None:
        # Not by Response.__init__, whose checks of headers that are made here would be a tenth of a small answer.
        self.status_code = status
        self.background = None
        self.body = b""
        self.raw_headers = [
            *((name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()),
            (b"content-type", media_type.encode("ascii")),
            (b"content-length", b"%d" % (end - start)),
        ]
        self._content = content
        self._start = start
        self._end = end
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = 0
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = b""
            if scope["method"] == "HEAD":
                pass
            elif self._content.data is not None:
                last = self._content.data[self._start : self._end]
            else:
                # Sending to a client that went away is no error; reading the rest of the file for it would be waste.
                gone = asyncio.ensure_future(_gone(receive)) if self._end - self._start > READ_PIECE else None
                try:
                    async for piece in self._content.read(self._start, self._end):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                        sent += len(piece)
                        if gone is not None and gone.done():
                            return
                finally:
                    if gone is not None:
                        gone.cancel()
            await send({"type": "http.response.body", "body": last, "more_body": False})
            sent += len(last)
        finally:
            self._content.close()
            if self._sent is not None and scope["method"] != "HEAD":
                self._sent(sent)


async def _gone(receive: Receive) -> None:
    """Ends when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def blob_response(
    sha1: Sha1,
    content: Content,
    request_headers: Mapping[str, str],
    *,
    media_type: str = "application/octet-stream",
    cache_control: str = IMMUTABLE,
    more: Mapping[str, str] | None = None,
    sent: Callable[[int], None] | None = None,
) -> Response:
    """The answer to GET or HEAD of a blob: 200, 206 or 304. Raises RangeNotSatisfiable. Takes over `content`.

    `more`: further headers; `sent` is called with the bytes that a GET was answered with, when it ends.
    """
    tag = etag(sha1)
    headers = {"etag": tag, "accept-ranges": "bytes", "cache-control": cache_control, **(more or {})}
    if matches(request_headers.get("if-none-match"), tag):
        content.close()
        return Response(None, 304, headers)
    wanted = request_headers.get("range")
    if wanted and request_headers.get("if-range", tag) != tag:
        wanted = None
    try:
        part = parse_range(wanted, content.size)
    except RangeNotSatisfiable:
        content.close()
        raise
    if part is None:
        return ContentResponse(content, 0, content.size, 200, headers, media_type, sent)
    headers["content-range"] = part.header()
    return ContentResponse(content, part.start, part.end, 206, headers, media_type, sent)
