"""A blob store on another machine: the six verbs over `/api/v1/blobs` of a node.

Errors come out as the classes that the node raised; a connection that fails is Unavailable. Pieces of at most PIECE
bytes are held, whatever the size of a blob.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager

import httpx2

from kachery_lab.blobs.base import PIECE, BlobStat
from kachery_lab.blobs.layout import is_blob_name
from kachery_lab.client.problems import error_from_problem
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import ContentMismatch, Gone, NotFound, RangeNotSatisfiable, Unavailable

CODE_HEADER = "KACHERY-CLIENT-AUTH-CODE"
PAGE = 1000
"""Rows that a node lists at once at most."""
_MAX_JSON = 8 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


class RemoteBlobStore:
    """A BlobStore at `base_url`, used with a token (`client` or `admin`; `delete` needs `admin`) or with a client code.

    `timeout` is how long, in seconds, the node may be silent. `transport` replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        code: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        timeout: float = 60.0,
    ) -> None:
        # Bodies are hashed as they arrive, so no encoding may be put around them.
        headers = {"Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        elif code is not None:
            headers[CODE_HEADER] = code
        # The environment is read by the settings only: no proxy from there, no .netrc.
        self._http = httpx2.AsyncClient(
            base_url=base_url, headers=headers, transport=transport, timeout=timeout, trust_env=False
        )

    async def put(self, sha1: Sha1, stream: AsyncIterable[bytes]) -> bool:
        """As BlobStore. The node hashes what arrives: ContentMismatch when it has another SHA-1, nothing stays then."""
        async with self._ask("PUT", _path(sha1), {200, 201}, content=_without_empty(stream)) as response:
            return response.status_code == 201

    async def stat(self, sha1: Sha1) -> BlobStat | None:
        """As BlobStore. What the node may not serve any more (Gone) counts as absent, as it does on its volume."""
        try:
            async with self._ask("HEAD", _path(sha1), {200}) as response:
                size = response.headers.get("content-length", "")
        except (NotFound, Gone):
            return None
        if not (size.isascii() and size.isdigit()):
            raise Unavailable(f"the node does not say the size of {sha1}")
        return BlobStat(sha1, int(size))

    async def read(self, sha1: Sha1, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """As BlobStore; also Gone before the first byte. When all bytes of the blob are read they are hashed, and the
        last piece is held back until they are right: ContentMismatch otherwise."""
        if length is not None and length <= 0:
            if await self.stat(sha1) is None:
                raise NotFound(f"there is no blob {sha1}")
            return
        headers = {}
        if offset or length is not None:
            headers["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
        try:
            async with self._ask("GET", _path(sha1), {200, 206}, headers=headers) as response:
                pieces = _pieces(sha1, response, offset, length)
                async with aclosing(pieces):
                    async for piece in pieces:
                        yield piece
        except RangeNotSatisfiable:
            return

    async def delete(self, sha1: Sha1) -> bool:
        """As BlobStore. Raises Forbidden without the scope `admin`."""
        try:
            async with self._ask("DELETE", _path(sha1), {204}):
                return True
        except NotFound:
            return False

    async def list(self, after: str = "", limit: int = PAGE) -> list[BlobStat]:
        """As BlobStore; asks for as many pages as it takes. `after` is empty or a whole SHA-1."""
        found: list[BlobStat] = []
        while len(found) < limit:
            wanted = min(limit - len(found), PAGE)
            query = f"?limit={wanted}" + (f"&after={after}" if after else "")
            async with self._ask("GET", f"/api/v1/blobs{query}", {200}) as response:
                page, more = _page(await _json(response), after)
            found += page[:wanted]
            if not more or not page:
                break
            after = page[-1].sha1
        return found

    async def close(self) -> None:
        """As BlobStore."""
        await self._http.aclose()

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        path: str,
        expected: set[int],
        *,
        headers: Mapping[str, str] | None = None,
        content: AsyncIterable[bytes] | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """The answer, its body not yet read. Raises the node's error, or Unavailable."""
        with _transport_errors():
            async with self._http.stream(method, path, headers=headers, content=content) as response:
                if response.status_code not in expected:
                    if response.status_code < 400:
                        raise Unavailable(f"the node answered {response.status_code} to {method}")
                    raise error_from_problem(response.status_code, await _json(response))
                yield response


def _path(sha1: Sha1) -> str:
    return f"/api/v1/blobs/{sha1}"


@contextmanager
def _transport_errors() -> Iterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise Unavailable(
            f"the other node cannot be reached ({type(error).__name__})", hint="Is it running, and the URL right?"
        ) from error


async def _without_empty(stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    async for piece in stream:
        # An empty chunk is the end of a chunked body.
        if piece:
            yield bytes(piece)


async def _json(response: httpx2.Response) -> object:
    """The decoded body, None when it is no JSON or too much: another node's answer must not fill our memory."""
    data = bytearray()
    async for piece in response.aiter_raw(PIECE):
        data += piece
        if len(data) > _MAX_JSON:
            return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _page(body: object, after: str) -> tuple[list[BlobStat], bool]:
    """(The rows of a listing, whether more follow). Raises Unavailable for what is none, or does not go on from
    `after` in order."""
    rows = body.get("blobs") if isinstance(body, dict) else None
    more = isinstance(body, dict) and body.get("next") is not None
    found: list[BlobStat] = []
    for row in rows if isinstance(rows, list) else [None]:
        name, size = (row.get("sha1"), row.get("size")) if isinstance(row, dict) else (None, None)
        # Without the order a node could make the pages go on for ever.
        if not (isinstance(name, str) and is_blob_name(name) and isinstance(size, int) and name > after):
            raise Unavailable("the other node's list of blobs cannot be read")
        after = name
        found.append(BlobStat(Sha1(name), size))
    return found, more


async def _pieces(sha1: Sha1, response: httpx2.Response, offset: int, length: int | None) -> AsyncGenerator[bytes]:
    """Bytes from `offset`, at most `length`, of an answer that may hold just them or, by HTTP's leave, the whole."""
    skip, whole = offset, response.status_code == 200
    if not whole:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != offset:
            raise ContentMismatch(f"the node sent another part of {sha1} than the one asked for")
        skip, whole = 0, offset == 0 and int(match[2]) + 1 == int(match[3])
    left = length
    digest = hashlib.sha1(usedforsecurity=False)
    held = b""
    async for piece in response.aiter_raw(PIECE):
        digest.update(piece)
        part = piece[skip:]
        skip = max(skip - len(piece), 0)
        if left is not None:
            part = part[:left]
            left -= len(part)
        if part:
            if held:
                yield held
            held = part
    if whole and digest.hexdigest() != sha1:
        raise ContentMismatch(f"the node sent bytes that do not have the SHA-1 {sha1}", hint="Ask its operator")
    if held:
        yield held
