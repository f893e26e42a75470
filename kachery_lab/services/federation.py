"""Channels of another server's hub: files fetched from its buckets and uploaded into them.

`JoinedHub` is the other kind of `services.offers.Channels`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

import structlog

from kachery_lab.core.ids import FileKey, Sha1
from kachery_lab.core.manifests import MAX_MANIFEST_BYTES
from kachery_lab.core.objects import ObjectPath
from kachery_lab.errors import ContentMismatch, Forbidden, KacheryLabError, NotFound
from kachery_lab.services.audit import AuditService
from kachery_lab.services.bands import ChannelBands
from kachery_lab.services.blobs import BlobService, Claim
from kachery_lab.services.file_requests import FileRequests
from kachery_lab.services.identity import Identity
from kachery_lab.services.large_files import bring_chunks, joined
from kachery_lab.services.offers import Progress, UploadUrl
from kachery_lab.services.origins import OriginService
from kachery_lab.services.principals import Principal
from kachery_lab.services.stats import Stats

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient, HubMembership

REPORT_SECONDS = 300.0
FIRST_RETRY = 2.0
MEMBERSHIP_SECONDS = 0.5

log = structlog.get_logger(__name__)


class JoinedHub:
    """This node's part in another hub's channels. The hub decides on rights at each use; what is asked here
    gives refusals their text."""

    def __init__(
        self,
        hub: HubClient,
        blobs: BlobService,
        origins: OriginService,
        identity: Identity,
        stats: Stats,
        audit: AuditService,
        bands: ChannelBands,
        requests: FileRequests,
    ) -> None:
        self.bands = bands
        self._requests = requests
        self._hub = hub
        self._blobs = blobs
        self._origins = origins
        self._identity = identity
        self._stats = stats
        self._audit = audit
        self._known: dict[str, HubMembership] = {}
        self._asked = -MEMBERSHIP_SECONDS

    async def keep_reporting(self) -> None:
        """Tell the hub who we are, at once and every five minutes, for ever; sooner again while it does not answer."""
        approved: bool | None = None
        pause = REPORT_SECONDS
        while True:
            try:
                before, approved = (
                    approved,
                    await self._hub.report(self._identity.label, self._identity.owner or "admin"),
                )
                pause = REPORT_SECONDS
                if approved is not before:
                    log.info("the hub knows this node", approved=approved)
            except KacheryLabError as error:
                log.warning("the hub was not told about this node", code=error.code, reason=error.message)
                pause = min(REPORT_SECONDS, FIRST_RETRY if pause == REPORT_SECONDS else pause * 2)
            await asyncio.sleep(pause)

    async def has(self, channel: str) -> bool:
        """Whether this node is a member there; while the hub cannot be reached, whether it was when last asked."""
        try:
            return channel in await self._memberships()
        except KacheryLabError:
            return channel in self._known

    async def _memberships(self) -> dict[str, HubMembership]:
        """Ours at the hub, at most MEMBERSHIP_SECONDS old: the calls of one request ask once."""
        if time.monotonic() - self._asked > MEMBERSHIP_SECONDS:
            self._known = await self._hub.memberships()
            self._asked = time.monotonic()
        return self._known

    async def _require(self, channel: str, role: str, principal: Principal) -> HubMembership:
        """Raises NotFound for a channel that this node is no member of, Forbidden that names role and channel."""
        membership = (await self._memberships()).get(channel)
        if membership is None:
            raise NotFound(f"this node is no member of a channel {channel!r} at the hub")
        who = f"{principal.kind}:{principal.name}"
        async with self._audit.refusals(who, principal.peer, f"channel.{role}", channel):
            if not principal.covers(channel):
                raise Forbidden(f"the token does not reach the channel {channel}")
            if role not in membership.roles:
                raise Forbidden(
                    f"node {self._identity.node_id} lacks {role} in the channel {channel}",
                    hint="The channel's owner grants roles at the hub",
                )
        return membership

    async def require(self, channel: str, role: str, principal: Principal) -> HubMembership:
        """This node's membership, if the caller may use a role there now. Raises NotFound, Forbidden, Unavailable."""
        return await self._require(channel, role, principal)

    def refusals(self, principal: Principal, action: str, what: str) -> AbstractAsyncContextManager[None]:
        """Records what the hub refuses in the block in this node's audit."""
        return self._audit.refusals(f"{principal.kind}:{principal.name}", principal.peer, action, what)

    async def has_object(self, channel: str, path: ObjectPath) -> bool:
        """Whether an object is in a channel's bucket. Raises NotFound for a channel that this node is no member of."""
        membership = (await self._memberships()).get(channel)
        if membership is None:
            raise NotFound(f"this node is no member of a channel {channel!r} at the hub")
        return await self._hub.has_object(membership.bucket_url, path)

    # -- uploading -----------------------------------------------------------------------------------------------

    async def upload(self, sha1: Sha1, channel: str, principal: Principal) -> None:
        """As `Channels.upload`; the bytes travel unless the bucket has them."""
        await self._require(channel, "provideFiles", principal)
        content = await self._blobs.open(sha1)
        try:
            url = await self._hub.upload_url(channel, sha1, content.size)
            if url is not None:
                await self._hub.put(url, content.read(0, content.size), content.size)
                self._stats.bytes_sent += content.size
        finally:
            content.close()

    async def upload_url(self, sha1: Sha1, channel: str, size: int | None, principal: Principal) -> UploadUrl:
        """As `Channels.upload_url`; the client PUTs at the hub itself."""
        membership = await self._require(channel, "provideFiles", principal)
        if size is None:
            return UploadUrl(exists=await self._hub.size(membership.bucket_url, sha1) is not None)
        url = await self._hub.upload_url(channel, sha1, size)
        return UploadUrl(exists=url is None, url=url)

    # -- fetching ------------------------------------------------------------------------------------------------

    async def fetch(self, key: FileKey, channel: str, principal: Principal, progress: Progress) -> None:
        """Bring a file here, verified and durable: as a whole, else by the chunks of its manifest, several at a time.
        What the bucket lacks the channel's nodes are asked for.

        What was fetched before a failure is kept and not fetched again. Raises NotFound (not in the bucket, and nobody
        provided it), ContentMismatch (other bytes than asked for; nothing is kept), Forbidden, Unavailable.
        """
        membership = await self._require(channel, "requestFiles", principal)
        size = await self._hub.size(membership.bucket_url, key.sha1)
        if size is not None:
            progress.start(size)
            await self._whole(membership, key.sha1, size, progress)
        elif key.manifest_sha1 is not None:
            await self._by_chunks(membership, key.sha1, key.manifest_sha1, progress)
        else:
            size = await self._provided(membership, key)
            progress.start(size)
            await self._whole(membership, key.sha1, size, progress)

    async def _provided(self, membership: HubMembership, key: FileKey) -> int:
        """Have the channel's nodes put a file into the bucket; its size. Raises what `FileRequests.ask` says."""
        look = partial(self._hub.size, membership.bucket_url, key.sha1)
        return await self._requests.ask(self.bands, membership.channel, key, look)

    async def membership(self, channel: str) -> HubMembership | None:
        """This node's membership in a channel, at most MEMBERSHIP_SECONDS old. Raises Unavailable."""
        return (await self._memberships()).get(channel)

    async def origin(self, channel: str) -> str:
        """What is recorded of blobs that came through a channel."""
        return f"{await self._hub.hub_id()}/{channel}"

    async def _whole(self, membership: HubMembership, sha1: Sha1, size: int, progress: Progress | None) -> None:
        await self._arriving(membership, sha1)
        stream = self._counted(self._hub.read(membership.bucket_url, sha1, size), progress)
        await self._blobs.store(stream, Claim(sha1=sha1, size=size, want_manifest=False), _fetched(membership))

    async def _arriving(self, membership: HubMembership, sha1: Sha1) -> None:
        here = await self._blobs.store_on_volume.stat(sha1) is not None
        await self._origins.arriving(sha1, await self.origin(membership.channel), here=here)

    async def _counted(self, stream: AsyncIterator[bytearray], progress: Progress | None) -> AsyncIterator[bytearray]:
        async for piece in stream:
            self._stats.bytes_received += len(piece)
            if progress is not None:
                progress.add(len(piece))
            yield piece

    async def _by_chunks(self, membership: HubMembership, sha1: Sha1, manifest_sha1: Sha1, progress: Progress) -> None:
        async def bring(key: FileKey, progress: Progress | None) -> None:
            size = await self._hub.size(membership.bucket_url, key.sha1)
            if size is None:
                size = await self._provided(membership, key)
            if key.chunk_of is None and size > MAX_MANIFEST_BYTES:
                raise ContentMismatch(f"{key.sha1} has {size} bytes, more than a manifest may have")
            if key.chunk_of is not None and size != key.chunk_of.end_byte - key.chunk_of.start_byte:
                raise ContentMismatch(f"{key.sha1} has {size} bytes in the bucket, which are not the chunk's")
            await self._whole(membership, key.sha1, size, progress)

        manifest = await bring_chunks(self._blobs, sha1, manifest_sha1, bring, progress)
        await self._arriving(membership, sha1)
        await self._blobs.store(
            joined(self._blobs, manifest), Claim(sha1=sha1, size=manifest.size), _fetched(membership)
        )


def _fetched(membership: HubMembership) -> Principal:
    """Who stored a fetched blob, for its index row."""
    return Principal("operator", f"channel:{membership.channel}")
