"""The buckets into which this node provides files: those of its own hub, and those of another's.

Both are `services.file_providers.Shelf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kachery_lab.core.ids import FileKey, NodeId, Sha1
from kachery_lab.core.objects import file_path
from kachery_lab.core.roles import Role
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.federation import JoinedHub
from kachery_lab.services.file_providers import Found, Terms
from kachery_lab.services.files import FileService
from kachery_lab.services.principals import Principal
from kachery_lab.services.stats import Stats
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.uploads import UploadService

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient


class OwnShelf:
    """A reference is all it takes: the bytes are here."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        buckets: BucketService,
        uploads: UploadService,
        files: FileService,
        own_node: NodeId,
    ) -> None:
        self._data = data
        self._roles = roles
        self._buckets = buckets
        self._uploads = uploads
        self._files = files
        self._own_node = own_node
        self._self = Subject("node", own_node)

    async def terms(self, channel: str, asker: NodeId) -> Terms | None:
        """As `Shelf.terms`."""
        membership = self._data.memberships.get((channel, self._own_node))
        provides = self._roles.roles(self._self, channel) & Role.PROVIDE_FILES
        asks = self._roles.roles(Subject("node", asker), channel) & Role.REQUEST_FILES
        if membership is None or not provides or not asks:
            return None
        return Terms(f"{self._own_node}/{channel}", membership.offer == "local")

    async def shows(self, channel: str, sha1: Sha1) -> bool:
        """As `Shelf.shows`."""
        return await self._buckets.find(channel, file_path(sha1)) is not None

    async def put(self, channel: str, key: FileKey, found: Found) -> None:
        """As `Shelf.put`. A chunk becomes a file of its own first."""
        size = found.end - found.start
        if found.part and key.chunk_of is not None:
            await self._files.store_chunk(key, key.chunk_of, found.content, Principal("operator", f"channel:{channel}"))
        await self._uploads.adopt(channel, key.sha1, size, self._self, on_demand=True)


class JoinedShelf:
    """The bytes travel to the hub, by a ticket that the hub gives; it decides on rights, offers and deletions."""

    def __init__(self, hub: HubClient, joined: JoinedHub, stats: Stats) -> None:
        self._hub = hub
        self._joined = joined
        self._stats = stats

    async def terms(self, channel: str, asker: NodeId) -> Terms | None:
        """As `Shelf.terms`; what the asker may is the hub's business, which passed its message on."""
        membership = await self._joined.membership(channel)
        if membership is None or "provideFiles" not in membership.roles:
            return None
        return Terms(await self._joined.origin(channel), membership.offer == "local")

    async def shows(self, channel: str, sha1: Sha1) -> bool:
        """As `Shelf.shows`. A node that may not look there does not know."""
        membership = await self._joined.membership(channel)
        if membership is None or "requestFiles" not in membership.roles:
            return False
        return await self._hub.size(membership.bucket_url, sha1) is not None

    async def put(self, channel: str, key: FileKey, found: Found) -> None:
        """As `Shelf.put`; no bytes travel when the bucket has the file already."""
        size = found.end - found.start
        url = await self._hub.upload_url(channel, key.sha1, size, on_demand=True)
        if url is not None:
            await self._hub.put(url, found.content.read(found.start, found.end), size)
            self._stats.bytes_sent += size
