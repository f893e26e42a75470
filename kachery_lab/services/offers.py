"""Channels as local clients use them: a file goes up, a file comes down, by the channel's bare name.

The channels belong to this server's own hub or to another one's; `ChannelFinder` says whose. What is here already is
found before anybody asks a channel (`FileService`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import structlog

from kachery_lab.core.ids import FileKey, NodeId, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.bands import ChannelBands
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.file_requests import FileRequests
from kachery_lab.services.large_files import bring_chunks, size_here
from kachery_lab.services.principals import Principal
from kachery_lab.services.progress import Progress as Progress
from kachery_lab.services.subjects import RoleService, Subject, subject_of
from kachery_lab.services.uploads import UploadService

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UploadUrl:
    """Where a client PUTs a file itself; no `url` when the file `exists` in the bucket already, or has no size.

    A `url` that begins with `/` is relative to the address that the client used.
    """

    exists: bool
    url: str | None = None


class Channels(Protocol):
    """The channels of one hub. Rights are looked at on each call; a refusal is a Forbidden that names role and channel
    and is in the audit."""

    bands: ChannelBands
    """This node's part in the bands of these channels."""

    async def has(self, channel: str) -> bool:
        """Whether the channel belongs to this hub, for this node."""

    async def upload(self, sha1: Sha1, channel: str, principal: Principal) -> None:
        """Put a file that is here into the channel's bucket, durable on return. Putting it again is no error.

        Raises Forbidden, NotFound (no such channel, or the file is not here), TooLarge, StorageFull, Unavailable.
        """

    async def upload_url(self, sha1: Sha1, channel: str, size: int | None, principal: Principal) -> UploadUrl:
        """Whether a file is in the bucket; if not, permission to PUT it with `size` bytes (None: no permission).

        Raises Forbidden, NotFound, TooLarge, Unavailable.
        """

    async def fetch(self, key: FileKey, channel: str, principal: Principal, progress: Progress) -> None:
        """Bring a file from the channel to this server, verified and durable on return: from its bucket, else from the
        nodes that offer it there. A large file by its manifest comes in pieces, which `FileService` puts together.

        Raises Forbidden, NotFound, ContentMismatch (nothing is kept), Unavailable; the text says which step failed.
        Cancelling it keeps nothing half.
        """


class ChannelFinder:
    """Whose channel a bare name means: of the hubs in order, the first that has it; if none, the last one's."""

    def __init__(self, *hubs: Channels) -> None:
        self._hubs = list(hubs)
        self._shadowed: set[str] = set()

    def prefer(self, hub: Channels) -> None:
        """Ask this hub before the others."""
        self._hubs.insert(0, hub)

    async def find(self, channel: str) -> Channels:
        """The hub to ask for a channel. That a name hides one of another hub is logged once."""
        *others, last = self._hubs
        for hub in others:
            if await hub.has(channel):
                if channel not in self._shadowed and await last.has(channel):
                    self._shadowed.add(channel)
                    log.warning("a channel of another hub hides this hub's own", channel=channel)
                return hub
        return last


class OwnHub:
    """The channels of this server's own hub. What is in their buckets lies on this server's own volume."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        audit: AuditService,
        blobs: BlobService,
        buckets: BucketService,
        uploads: UploadService,
        own_node: NodeId,
        bands: ChannelBands,
        requests: FileRequests,
    ) -> None:
        self.bands = bands
        self._requests = requests
        self._data = data
        self._roles = roles
        self._audit = audit
        self._blobs = blobs
        self._buckets = buckets
        self._uploads = uploads
        self._own_node = own_node

    async def has(self, channel: str) -> bool:
        """Every channel of this hub."""
        return channel in self._data.channels

    async def upload(self, sha1: Sha1, channel: str, principal: Principal) -> None:
        """A reference is all it takes: the bytes are here. Raises what `Channels.upload` says."""
        subject = await self._require(channel, Role.PROVIDE_FILES, principal, "file.upload")
        await self._uploads.adopt(channel, sha1, await self._blobs.stat(sha1), subject)

    async def upload_url(self, sha1: Sha1, channel: str, size: int | None, principal: Principal) -> UploadUrl:
        """A ticket of this server. Raises what `Channels.upload_url` says."""
        subject = await self._require(channel, Role.PROVIDE_FILES, principal, "file.upload")
        path = file_path(sha1)
        found = await self._buckets.find(channel, path)
        # What is there only because somebody asked is no upload yet.
        if found is not None and not found.on_demand and await size_here(self._blobs, sha1) is not None:
            return UploadUrl(exists=True)
        if size is None:
            return UploadUrl(exists=False)
        ticket = self._uploads.issue(channel, ObjectPath.parse(path), size, subject)
        return UploadUrl(exists=False, url=f"/bucket/upload/{ticket}")

    async def fetch(self, key: FileKey, channel: str, principal: Principal, progress: Progress) -> None:
        """Whoever asks did not find the file here, so no bucket of this hub has it; what a node provides comes here.
        Raises what `Channels.fetch` says."""
        await self._require(channel, Role.REQUEST_FILES, principal, "file.load")

        async def bring(key: FileKey, progress: Progress | None) -> None:
            size = await self._requests.ask(self.bands, channel, key, lambda: self._look(channel, key.sha1))
            if progress is not None:
                progress.add(size)

        if key.manifest_sha1 is None:
            await bring(key, None)
        else:
            await bring_chunks(self._blobs, key.sha1, key.manifest_sha1, bring, progress)

    async def _look(self, channel: str, sha1: Sha1) -> int | None:
        if await self._buckets.find(channel, file_path(sha1)) is None:
            return None
        return await size_here(self._blobs, sha1)

    async def _require(self, channel: str, role: Role, principal: Principal, action: str) -> Subject:
        """Whose roles the caller uses. Raises NotFound for an unknown channel, Forbidden."""
        self._data.channel(channel)
        subject = subject_of(principal, self._own_node)
        who = f"{principal.kind}:{principal.name}"
        async with self._audit.refusals(who, principal.peer, action, channel):
            if not principal.covers(channel):
                raise Forbidden(f"the token does not reach the channel {channel}")
            self._roles.require(subject, channel, role)
        return subject
