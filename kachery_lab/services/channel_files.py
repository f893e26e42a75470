"""Files of channels as the newer clients use them: announced, uploaded, finished, found, read, deleted, restored.

What they call a zone is a channel. Rights and existence are answered for the one channel that is asked: a hash that is
known from elsewhere opens nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kachery_lab.core.ids import ChannelName, NodeId, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, ContentMismatch, Forbidden, Gone, InvalidInput, NotFound, Unauthenticated
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.buckets import BucketService, Reference
from kachery_lab.services.content import Content
from kachery_lab.services.origins import LOCAL, OriginService
from kachery_lab.services.pending import Pending, PendingUploads, drop
from kachery_lab.services.quotas import Charge
from kachery_lab.services.resources import ResourceService
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.uploads import UploadService

MAX_LABEL = 1000
ON_DEMAND_SECONDS = 10.0
"""How long a reader waits while a file of a resource directory is hashed; the work goes on when they give up."""


@dataclass(frozen=True, slots=True)
class Announced:
    """Answer to an announced upload: the file `exists` in the channel, or `ticket` is the URL segment for its PUT."""

    exists: bool
    object_key: str
    ticket: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a channel. `ticket`: what its address needs, None where anybody may read it."""

    channel: str
    sha1: Sha1
    size: int
    object_key: str
    ticket: str | None


def object_key(channel: str, sha1: Sha1) -> str:
    """The key of a file in the newer clients' messages: the channel is the directory of its zone."""
    return f"{channel}/{file_path(sha1)}"


def parse_object_key(key: object) -> tuple[ChannelName, Sha1]:
    """(Channel, hash) of a key. Raises InvalidInput for every text that `object_key` does not make."""
    channel, _, path = key.partition("/") if isinstance(key, str) else ("", "", "")
    try:
        parsed = ObjectPath.parse(path)
        if parsed.kind != "file" or parsed.sha1 is None:
            raise InvalidInput("no file")
        return ChannelName.parse(channel), parsed.sha1
    except InvalidInput:
        raise InvalidInput("objectKey: expected the one that the announcement was answered with") from None


class ChannelFiles:
    """Every method takes the subject and decides by its effective roles in the channel."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        blobs: BlobService,
        buckets: BucketService,
        uploads: UploadService,
        pending: PendingUploads,
        origins: OriginService,
        own_node: NodeId,
    ) -> None:
        self._data = data
        self._roles = roles
        self._blobs = blobs
        self._buckets = buckets
        self._uploads = uploads
        self._pending = pending
        self._origins = origins
        self._own_node = own_node
        self.resources: ResourceService | None = None

    # -- uploading -----------------------------------------------------------------------------------------------

    async def announce(
        self, channel: str, sha1: Sha1, size: int, owner: Subject, *, label: str = "", exact: bool = True
    ) -> Announced:
        """Hold room for a file and give permission to PUT it, or say that the channel has it.

        `exact`: whether `size` counts bytes; else UTF-16 units of a text. Raises Forbidden naming role and channel,
        InvalidInput (size, label), TooLarge, StorageFull, TooManyRequests.
        """
        path = ObjectPath.parse(file_path(sha1))
        # First: who may not upload learns nothing of the channel, not even whether it exists.
        self._roles.require(owner, channel, Role.PROVIDE_FILES)
        if size < 0:
            raise InvalidInput("size: expected a whole number that is not negative")
        if len(label) > MAX_LABEL or not label.isprintable():
            raise InvalidInput(f"label: expected at most {MAX_LABEL} printable characters")
        key = object_key(channel, sha1)
        if await self._has(channel, path, owner):
            return Announced(True, key)
        self._uploads.check_size(channel, path, size)
        charge = Charge(channel, path.text, str(owner), size)
        await self._pending.reserve(charge, exact=exact, label=label)
        ticket = self._uploads.issue(channel, path, size if exact else None, owner, announced=True)
        return Announced(False, key, ticket)

    async def _has(self, channel: str, path: ObjectPath, owner: Subject) -> bool:
        """Whether the channel has a file, so that it need not be sent. What this server's own node offers there becomes
        an upload of the owner, if they could read it: else its existence is none of their business."""
        assert path.sha1 is not None
        reference = await self._buckets.find(channel, path.text)
        if reference is not None and not reference.on_demand:
            return await self._is_here(path.sha1)
        if not self._roles.roles(owner, channel) & Role.REQUEST_FILES:
            return False
        size = await self._offered(channel, path)
        if size is None:
            return False
        self._uploads.check_size(channel, path, size)
        await self._buckets.refer(channel, path, path.sha1, size, owner)
        return True

    async def _is_here(self, sha1: Sha1) -> bool:
        """Whether the bytes of a reference are on the volume; when they are not, they may be sent again."""
        return await self._blobs.store_on_volume.stat(sha1) is not None or await self._readable(sha1) is not None

    async def _readable(self, sha1: Sha1) -> int | None:
        """Size of what could be served, None when nothing could."""
        try:
            return await self._blobs.stat(sha1)
        except (NotFound, Gone):
            return None

    async def finish(self, channel: str, sha1: Sha1, owner: Subject, size: int | None = None) -> bool:
        """Make an announced upload whose bytes came a file of the channel, durably; whether it is new. Doing it again
        is no error, and nothing is ever deleted. `size`: what the client says, None not to look at it.

        Raises Forbidden, ContentMismatch for another size, Conflict when this subject announced no such upload or its
        bytes did not come.
        """
        path = ObjectPath.parse(file_path(sha1))
        self._roles.require(owner, channel, Role.PROVIDE_FILES)
        found = self._pending.find(channel, path.text, str(owner))
        if found is None:
            return await self._finished_before(channel, path, owner, size)
        if not found.received:
            raise Conflict("the bytes of this upload have not arrived", hint="PUT them to the URL of the announcement")
        if found.exact and size is not None and size != found.charge.size:
            raise ContentMismatch(f"{found.charge.size} bytes arrived, not {size}")
        if not self._blobs.is_known(sha1) and not await self._is_here(sha1):
            raise Conflict("the bytes of this upload are not here any more", hint="Announce and send it again")
        return await self._refer(found, path, sha1, owner)

    async def _refer(self, found: Pending, path: ObjectPath, sha1: Sha1, owner: Subject) -> bool:
        charge = found.charge
        new = await self._buckets.refer(
            charge.channel,
            path,
            sha1,
            charge.size,
            owner,
            label=found.label,
            reserved=True,
            then=lambda conn: drop(conn, charge),
        )
        self._pending.forget(charge)
        return new

    async def _finished_before(self, channel: str, path: ObjectPath, owner: Subject, size: int | None) -> bool:
        reference = await self._buckets.find(channel, path.text)
        mine = reference is not None and not reference.on_demand and reference.principal == str(owner)
        if not mine:
            raise Conflict(
                f"{owner} has no unfinished upload of this file in {channel}",
                hint="Announce it first, and send its bytes",
            )
        assert reference is not None
        if size is not None and size != reference.size:
            raise ContentMismatch(f"the file has {reference.size} bytes, not {size}")
        return False

    # -- reading -------------------------------------------------------------------------------------------------

    async def find(
        self, channel: str, sha1: Sha1, reader: Subject | None, *, on_demand_wait: float = 0.0
    ) -> Found | None:
        """A file of a channel, None when it has none. Looked for in the bucket, then at this server's own node where
        its membership offers it, then for so many seconds in the channel's resource directories; `reader` None:
        anybody.

        Raises Unauthenticated (anybody, and the channel is private or does not exist), Forbidden naming role and
        channel.
        """
        known = self._may_find(channel, reader)
        found = await self._look(channel, sha1, reader, known)
        if found is None and on_demand_wait and await self._bring_from_resource(channel, sha1, on_demand_wait):
            found = await self._look(channel, sha1, reader, known)
        return found

    async def _look(self, channel: str, sha1: Sha1, reader: Subject | None, known: bool) -> Found | None:
        path = ObjectPath.parse(file_path(sha1))
        reference = await self._buckets.find(channel, path.text)
        if reference is not None and reference.on_demand and not known:
            reference = None
        if reference is None and known:
            reference = await self._bring(channel, path)
        if reference is None or not await self._is_here(sha1):
            return None
        ticket = (
            None if self._is_public(reference) or reader is None else self._uploads.issue_read(channel, path, reader)
        )
        return Found(channel, sha1, reference.size, object_key(channel, sha1), ticket)

    def _may_find(self, channel: str, reader: Subject | None) -> bool:
        """Whether the reader holds requestFiles; False: a reader of what is public. Raises what `find` raises."""
        record = self._data.channels.get(channel)
        public = record is not None and record.public
        if reader is None:
            if not public:
                raise Unauthenticated(
                    f"the zone {channel} is not open to everybody, or does not exist",
                    hint="Send an API key of a user who may read it",
                )
            return False
        if not public:
            self._roles.require(reader, channel, Role.REQUEST_FILES)
            return True
        return bool(self._roles.roles(reader, channel) & Role.REQUEST_FILES)

    async def _bring(self, channel: str, path: ObjectPath) -> Reference | None:
        """Refer to a file that this server's own node offers in a channel; None when it does not."""
        assert path.sha1 is not None
        size = await self._offered(channel, path)
        if size is None:
            return None
        try:
            await self._buckets.refer(channel, path, path.sha1, size, self._self, on_demand=True)
        except NotFound:
            return None
        return await self._buckets.find(channel, path.text)

    @property
    def _self(self) -> Subject:
        return Subject("node", self._own_node)

    async def _offered(self, channel: str, path: ObjectPath) -> int | None:
        """Size of a file that this server's own node offers in a channel, by its membership and its roles; None when it
        does not, or when it was deleted there."""
        assert path.sha1 is not None
        membership = self._data.memberships.get((channel, self._own_node))
        if membership is None or membership.offer != "local":
            return None
        if not self._roles.roles(self._self, channel) & Role.PROVIDE_FILES:
            return None
        if await self._buckets.is_deleted(channel, path.text):
            return None
        origins = await self._origins.of(path.sha1)
        if LOCAL not in origins and f"{self._own_node}/{channel}" not in origins:
            return None
        return await self._readable(path.sha1)

    # -- deleting ------------------------------------------------------------------------------------------------

    async def remove(self, channel: str, sha1: Sha1, by: Subject) -> None:
        """Delete a file in a channel; it can be restored for some time, and its bytes are not touched. Raises Forbidden
        for all but the channel's owner and their client keys, NotFound."""
        self._require_owner(channel, by)
        await self._buckets.forget(channel, ObjectPath.parse(file_path(sha1)), by)

    async def restore(self, channel: str, sha1: Sha1, by: Subject) -> Reference:
        """Undo a deletion. Raises Forbidden like `remove`, NotFound, Conflict when the bytes are gone, StorageFull."""
        self._require_owner(channel, by)
        return await self._buckets.restore(channel, ObjectPath.parse(file_path(sha1)), by)

    def _require_owner(self, channel: str, by: Subject) -> None:
        record = self._data.channels.get(channel)
        client = self._data.clients.get(by.name) if by.kind == "client" else None
        user = by.name if by.kind == "user" else client.user if client is not None else None
        reached = by.channels is None or channel in by.channels
        if record is None or record.owner != user or not reached or not by.ceiling & Role.PROVIDE_FILES:
            raise Forbidden(f"{by} may not delete in the channel {channel}", hint="Its owner may")

    # -- opening -------------------------------------------------------------------------------------------------

    async def open_by_ticket(self, ticket: tuple[str, ObjectPath, Subject], sha1: Sha1) -> Content:
        """Verified content of the one file that a ticket (`UploadService.open_read`) opens; the caller closes it.

        Raises Forbidden (another file, rights taken away), NotFound, and what reading raises."""
        channel, path, reader = ticket
        if path.sha1 != sha1 or path.kind != "file":
            raise Forbidden("this URL is for another file", hint="Use the URL exactly as it was given")
        return (await self._buckets.open(channel, path, reader))[1]

    async def open_anywhere(self, sha1: Sha1, reader: Subject | None) -> tuple[Reference, bool, Content]:
        """(Reference, whether anybody may read it, content) of a file that lies in some channel which the reader may
        read; the caller closes it. Raises NotFound, and what reading raises."""
        found = await self._buckets.everywhere(file_path(sha1))
        for reference in sorted(found, key=lambda one: not self._is_public(one)):
            public = self._is_public(reference)
            may = reader is not None and bool(self._roles.roles(reader, reference.channel) & Role.REQUEST_FILES)
            if public or may:
                try:
                    return reference, public, await self._blobs.open(sha1)
                except NotFound:
                    # A file of a resource directory that a rebuilt index does not know yet.
                    break
        for name in self.resources.channels if self.resources is not None else ():
            record = self._data.channels.get(name)
            may = reader is not None and bool(self._roles.roles(reader, name) & Role.REQUEST_FILES)
            open_to_reader = record is not None and (record.public or may)
            if open_to_reader and await self._bring_from_resource(name, sha1, ON_DEMAND_SECONDS):
                brought = await self._buckets.find(name, file_path(sha1))
                if brought is not None:
                    return brought, self._is_public(brought), await self._blobs.open(sha1)
        raise NotFound("there is no such file in a channel that you may read")

    async def _bring_from_resource(self, channel: str, sha1: Sha1, wait: float) -> bool:
        return self.resources is not None and await self.resources.brings(channel, sha1, wait)

    def _is_public(self, reference: Reference) -> bool:
        channel = self._data.channels.get(reference.channel)
        return channel is not None and channel.public and not reference.on_demand
