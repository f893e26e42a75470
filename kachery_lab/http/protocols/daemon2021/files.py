"""Files: in, linked, located and out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kachery_lab.core.ids import ChannelName, FileKey, parse_fields, parse_whole_number
from kachery_lab.errors import Forbidden, Gone, InvalidInput, KacheryLabError, NotFound
from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.daemon2021.auth import browser_class, local_class
from kachery_lab.http.protocols.daemon2021.channels import fetching
from kachery_lab.http.protocols.daemon2021.translate import body_of, fields_of, frame, stored
from kachery_lab.http.responses import ContentResponse
from kachery_lab.node import Node
from kachery_lab.services.blobs import Claim
from kachery_lab.services.offers import Progress
from kachery_lab.services.principals import Principal

_STORE_FILE = {"localFilePath": required(str)}
_LINK_FILE = {"localFilePath": required(str), "size": required(float), "mtime": required(float)}
_LOAD_FILE = (frozenset({"fileKey"}), frozenset({"channelName"}))
_NO_STORE = {"cache-control": "no-store"}
_DOWNLOAD = {"fileKey": required(dict), "startByte": optional(float), "endByte": optional(float)}


async def store(request: Request) -> Response:
    """The body, whatever its content type, becomes a blob."""
    principal = browser_class(request)
    declared = request.headers.get("content-length")
    claim = Claim(size=int(declared) if declared is not None else None)
    return stored(await node_of(request).blobs.store(request.stream(), claim, principal))


async def store_file(request: Request) -> Response:
    """A copy of a file that the server can read itself."""
    principal = local_class(request)
    node = node_of(request)
    fields = await fields_of(request, _STORE_FILE)
    file = await node.links.open_path(fields["localFilePath"])
    try:
        return stored(await node.blobs.store_open_file(file, principal))
    finally:
        file.close()


async def link_file(request: Request) -> Response:
    """A file registered in place."""
    principal = local_class(request)
    node = node_of(request)
    fields = await fields_of(request, _LINK_FILE)
    size = parse_whole_number(fields["size"], "size")
    # `mtime` stays the number that was sent: the client compares it with os.stat bit for bit.
    return stored(await node.links.link(node.blobs, fields["localFilePath"], size, fields["mtime"], principal))


async def load_file(request: Request) -> Response:
    """Where a file lies that the client can open, after it was fetched from a channel if need be.

    A missing role is 403 before the first message; other refusals after the credential are in-band, as the client
    expects.
    """
    principal = browser_class(request)
    async with body_of(request) as body:
        try:
            fields = parse_fields(body, "the body", *_LOAD_FILE)
            key = FileKey.parse(fields["fileKey"], "fileKey")
            channel = ChannelName.parse(fields["channelName"], "channelName") if "channelName" in fields else None
        except InvalidInput as error:
            return StreamingResponse(_frames(_error(error), None), headers=_NO_STORE)
    messages = _load(node_of(request), key, channel, principal)
    return StreamingResponse(_frames(await anext(messages), messages), headers=_NO_STORE)


async def _frames(first: bytes, rest: AsyncGenerator[bytes] | None) -> AsyncIterator[bytes]:
    try:
        yield first
        if rest is not None:
            async for message in rest:
                yield message
    finally:
        if rest is not None:
            await rest.aclose()


def _error(error: KacheryLabError) -> bytes:
    return frame({"type": "error", "error": error.text})


def _progress(progress: Progress) -> bytes:
    return frame({"type": "progress", "bytesLoaded": progress.loaded, "bytesTotal": progress.total})


async def _load(node: Node, key: FileKey, channel: str | None, principal: Principal) -> AsyncGenerator[bytes]:
    """The messages of a load. Raises Forbidden before the first one when the channel refuses."""
    progress = Progress()
    try:
        path = await node.files.locate(key, principal)
    except (NotFound, Gone) as missing:
        if channel is None:
            yield _error(missing)
            return
        refused = missing
    except KacheryLabError as error:
        yield _error(error)
        return
    else:
        yield _progress(progress)
        yield frame({"type": "finished", "localFilePath": path})
        return
    begun = False
    try:
        async for _ in fetching(node, key, channel, principal, progress):
            begun = True
            yield _progress(progress)
        path = await node.files.locate(key, principal)
    except Forbidden as error:
        if not begun:
            raise
        yield _error(error)
    except KacheryLabError as error:
        # Damaged here and absent there: what is wrong here is what the person can mend.
        yield _error(refused if isinstance(error, NotFound) and isinstance(refused, Gone) else error)
    else:
        yield _progress(progress)
        yield frame({"type": "finished", "localFilePath": path})


async def download_file_data(request: Request) -> Response:
    """Bytes of a file, or of a chunk of one; both ends of a range or none."""
    browser_class(request)
    async with body_of(request) as body:
        fields = require_fields(body, _DOWNLOAD)
        key = FileKey.parse(fields["fileKey"], "fileKey")
    content, first, last = await node_of(request).files.open(key)
    try:
        start, end = first, last
        if "startByte" in fields and "endByte" in fields:
            start = first + parse_whole_number(fields["startByte"], "startByte")
            end = min(first + parse_whole_number(fields["endByte"], "endByte"), last)
            if fields["startByte"] > fields["endByte"]:
                raise InvalidInput("startByte: expected a number not above endByte")
            start = min(start, end)
    except BaseException:
        content.close()
        raise
    return ContentResponse(content, start, end, 200, {"cache-control": "no-store"})
