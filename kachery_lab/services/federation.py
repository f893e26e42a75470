"""Channels of another server's hub: files fetched from its buckets and uploaded into them.

`JoinedHub` is the other kind of `services.offers.Channels`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import structlog

from kachery_lab.client.hub import HubClient, HubMembership
from kachery_lab.core.ids import FileKey, Sha1
from kachery_lab.core.manifests import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from kachery_lab.errors import ContentMismatch, Forbidden, Gone, KacheryLabError, NotFound
from kachery_lab.services.audit import AuditService
from kachery_lab.services.blobs import BlobService, Claim
from kachery_lab.services.identity import Identity
from kachery_lab.services.offers import Progress, UploadUrl
from kachery_lab.services.origins import OriginService
from kachery_lab.services.principals import Principal
from kachery_lab.services.stats import Stats

CHUNKS_AT_ONCE = 5
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
    ) -> None:
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

        What was fetched before a failure is kept and not fetched again. Raises NotFound (not in the bucket),
        ContentMismatch (other bytes than asked for; nothing is kept), Forbidden, Unavailable.
        """
        membership = await self._require(channel, "requestFiles", principal)
        size = await self._hub.size(membership.bucket_url, key.sha1)
        if size is not None:
            progress.start(size)
            await self._whole(membership, key.sha1, size, progress)
        elif key.manifest_sha1 is not None:
            manifest = await self._manifest(membership, key.manifest_sha1)
            if manifest.sha1 != key.sha1:
                raise ContentMismatch(f"{key.manifest_sha1} is the manifest of another file")
            progress.start(manifest.size)
            await self._by_chunks(membership, manifest, progress)
        else:
            raise NotFound(f"{key.sha1} is not in the bucket of {membership.channel}")

    async def _whole(self, membership: HubMembership, sha1: Sha1, size: int, progress: Progress | None) -> None:
        await self._arriving(membership, sha1)
        stream = self._counted(self._hub.read(membership.bucket_url, sha1, size), progress)
        await self._blobs.store(stream, Claim(sha1=sha1, size=size, want_manifest=False), _fetched(membership))

    async def _arriving(self, membership: HubMembership, sha1: Sha1) -> None:
        here = await self._blobs.store_on_volume.stat(sha1) is not None
        await self._origins.arriving(sha1, f"{await self._hub.hub_id()}/{membership.channel}", here=here)

    async def _counted(self, stream: AsyncIterator[bytearray], progress: Progress | None) -> AsyncIterator[bytearray]:
        async for piece in stream:
            self._stats.bytes_received += len(piece)
            if progress is not None:
                progress.add(len(piece))
            yield piece

    async def _manifest(self, membership: HubMembership, sha1: Sha1) -> Manifest:
        if not await self._here(sha1):
            size = await self._hub.size(membership.bucket_url, sha1)
            if size is None:
                raise NotFound(f"the manifest {sha1} is not in the bucket of {membership.channel}")
            if size > MAX_MANIFEST_BYTES:
                raise ContentMismatch(f"{sha1} has {size} bytes, more than a manifest may have")
            await self._whole(membership, sha1, size, None)
        content = await self._blobs.open(sha1)
        try:
            return parse_manifest(b"".join([piece async for piece in content.read(0, content.size)]))
        finally:
            content.close()

    async def _here(self, sha1: Sha1) -> bool:
        try:
            (await self._blobs.open(sha1)).close()
        except (NotFound, Gone):
            return False
        return True

    async def _by_chunks(self, membership: HubMembership, manifest: Manifest, progress: Progress) -> None:
        gate = asyncio.Semaphore(CHUNKS_AT_ONCE)

        async def one(sha1: Sha1, size: int) -> None:
            async with gate:
                if await self._here(sha1):
                    progress.add(size)
                else:
                    await self._whole(membership, sha1, size, progress)

        try:
            async with asyncio.TaskGroup() as tasks:
                for chunk in manifest.chunks:
                    tasks.create_task(one(Sha1(chunk.sha1), chunk.end - chunk.start))
        except* KacheryLabError as group:
            raise group.exceptions[0] from None
        await self._arriving(membership, Sha1(manifest.sha1))
        await self._blobs.store(
            self._joined(manifest), Claim(sha1=Sha1(manifest.sha1), size=manifest.size), _fetched(membership)
        )

    async def _joined(self, manifest: Manifest) -> AsyncIterator[bytes]:
        for chunk in manifest.chunks:
            content = await self._blobs.open(Sha1(chunk.sha1))
            try:
                async for piece in content.read(0, content.size):
                    yield piece
            finally:
                content.close()


def _fetched(membership: HubMembership) -> Principal:
    """Who stored a fetched blob, for its index row."""
    return Principal("operator", f"channel:{membership.channel}")
