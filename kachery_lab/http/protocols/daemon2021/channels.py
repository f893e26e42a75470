"""Files into channels and out of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import ChannelName, FileKey, Sha1, parse_whole_number
from kachery_lab.errors import Gone, NotFound
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.daemon2021.auth import local_class
from kachery_lab.http.protocols.daemon2021.translate import Answer, fields_of
from kachery_lab.http.public_url import base_url
from kachery_lab.node import Node
from kachery_lab.services.offers import Progress
from kachery_lab.services.principals import Principal

PROGRESS_SECONDS = 2.0
"""At most one progress message in this time."""

_UPLOAD = {"sha1": required(str), "channel": required(str)}
_CREATE_URL = {"channelName": required(str), "sha1": required(str), "size": optional(float)}


async def upload_file(request: Request) -> Response:
    """A file that is here, of any size, into a channel's bucket."""
    principal = local_class(request)
    fields = await fields_of(request, _UPLOAD)
    sha1, channel = Sha1.parse(fields["sha1"]), ChannelName.parse(fields["channel"], "channel")
    hub = await node_of(request).offers.find(channel)
    await hub.upload(sha1, channel, principal)
    return Answer({"success": True})


async def create_signed_file_upload_url(request: Request) -> Response:
    """Where the client PUTs a file itself, which need not be here."""
    principal = local_class(request)
    fields = await fields_of(request, _CREATE_URL)
    sha1, channel = Sha1.parse(fields["sha1"]), ChannelName.parse(fields["channelName"])
    given = parse_whole_number(fields["size"], "size") if "size" in fields else None
    node = node_of(request)
    hub = await node.offers.find(channel)
    size = upload_size(given, await _local_size(node, sha1))
    found = await hub.upload_url(sha1, channel, size, principal)
    answer: dict[str, object] = {"success": found.exists or found.url is not None, "alreadyUploaded": found.exists}
    if found.url is not None:
        answer["signedUrl"] = f"{base_url(request)}{found.url}" if found.url.startswith("/") else found.url
    return Answer(answer)


async def _local_size(node: Node, sha1: Sha1) -> int | None:
    try:
        return await node.blobs.stat(sha1)
    except (NotFound, Gone):
        return None


def upload_size(given: int | None, local: int | None) -> int | None:
    """The size that an upload will have; None when there can be none (spec/daemon-api.md, the table).

    `given` is what the client says, `local` the size of the file if it is here.
    """
    if local is None:
        return given or None
    return local if given in (None, local) else None


async def fetching(
    node: Node, key: FileKey, channel: str, principal: Principal, progress: Progress
) -> AsyncIterator[None]:
    """Fetch a file from a channel; yields when there is progress to tell. Raises what `Channels.fetch` raises.

    A caller that goes away ends the fetch; what was verified by then is kept.
    """
    hub = await node.offers.find(channel)
    work = asyncio.create_task(hub.fetch(key, channel, principal, progress))
    try:
        while not (await asyncio.wait({work}, timeout=PROGRESS_SECONDS))[0]:
            if progress.total:
                yield
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
