"""What lies in a channel's bucket: references to blobs by object path. Bytes lie on disk once, however many refer."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, select

from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import ObjectPath
from kachery_lab.db.engine import Database
from kachery_lab.db.models import bucket_objects, tombstones
from kachery_lab.errors import Conflict, NotFound
from kachery_lab.services import bucket_index
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.bucket_feeds import FEED_KINDS, BucketFeeds
from kachery_lab.services.bucket_index import Reference as Reference
from kachery_lab.services.content import Content
from kachery_lab.services.logs import LogWriter, to_line
from kachery_lab.services.quotas import Charge, Hold
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.usage import count_upload

T = TypeVar("T")
_KNOWN = 100_000
Change = Callable[[Connection], bool]


class BucketService:
    """References are kept in the records log and indexed; content is read through the blobs' own rules."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        database: Database,
        log: LogWriter,
        blobs: BlobService,
        feeds: BucketFeeds,
    ) -> None:
        self._data = data
        self._roles = roles
        self._database = database
        self._log = log
        self._blobs = blobs
        self.quotas = feeds.quotas
        # References that were looked up lately: all changes go through here, so what is kept is what the index has.
        self._known: OrderedDict[tuple[str, str], Reference] = OrderedDict()
        self._changes = 0
        # A caller gave up waiting: its change may still be committed, and nothing is kept until the log is idle.
        self._uncertain = False
        data.listeners.append(self._forget_known)
        self._feeds = feeds

    # -- reading -------------------------------------------------------------------------------------------------

    def may_read(self, channel: str, path: ObjectPath, reader: Subject | None) -> bool:
        """Whether a reader (None: anybody) may read this kind of object. Public channels may be read by anybody."""
        found = self._data.channels.get(channel)
        if found is None:
            return False
        if found.public:
            return True
        return reader is not None and bool(self._roles.roles(reader, channel) & path.request)

    async def find(self, channel: str, path: str) -> Reference | None:
        """The reference at a path, None when there is none. No rights are checked."""
        if self._uncertain and not self._log.busy:
            self._forget_known()
            self._uncertain = False
        known = self._known.get((channel, path))
        if known is not None and not self._uncertain:
            return known
        since = self._changes
        row = await self._database.read(lambda conn: bucket_index.at(conn, channel, path))
        if row is None:
            return None
        found = bucket_index.reference(row)
        # What changed while it was read may be older than the change.
        if since == self._changes and not self._uncertain:
            self._known[channel, path] = found
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return found

    def _forget_known(self) -> None:
        self._changes += 1
        self._known.clear()

    async def _change(self, record: dict[str, Any], commit: Callable[[Connection], T], hold: Hold | None = None) -> T:
        """Append one record and index it; then `hold` is released, whoever still waits.

        What was known of its object, or of all when it names none, is forgotten before and after: a look-up in between
        sees the one or the other, and nobody keeps the older."""
        key = (record.get("channel", ""), record.get("path", ""))
        try:
            self._changes += 1
            return await self._log.append([to_line(record)], commit, None if hold is None else hold.release)
        except BaseException:
            self._uncertain = True
            raise
        finally:
            self._changes += 1
            if key[1]:
                self._known.pop(key, None)
            else:
                self._known.clear()

    async def everywhere(self, path: str) -> Sequence[Reference]:
        """References at a path in all channels, by channel. No rights are checked."""
        statement = select(bucket_objects).where(bucket_objects.c.path == path).order_by(bucket_objects.c.channel)
        sha1 = path.rpartition("/")[2]
        # By the index on the hash: of a file it is the end of its path.
        statement = statement.where(bucket_objects.c.sha1 == sha1)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [bucket_index.reference(row) for row in rows]

    async def is_deleted(self, channel: str, path: str) -> bool:
        """Whether an object was deleted in a channel and is not back."""
        return await self._database.read(lambda conn: bucket_index.is_deleted(conn, channel, path))

    async def list(self, channel: str, after: str, limit: int) -> Sequence[Reference]:
        """References whose path comes after `after`, by path. No rights are checked."""
        statement = select(bucket_objects).where(bucket_objects.c.channel == channel, bucket_objects.c.path > after)
        statement = statement.order_by(bucket_objects.c.path).limit(limit)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [bucket_index.reference(row) for row in rows]

    async def open(self, channel: str, path: ObjectPath, reader: Subject | None) -> tuple[Sha1, Content]:
        """Name and verified content of an object; the caller closes it.

        A known reader without the role gets Forbidden, whether the object is there or not; nobody in particular gets
        NotFound for everything in a private channel.
        """
        allowed = self.may_read(channel, path, reader)
        if reader is not None and not allowed:
            self._roles.require(reader, channel, path.request)
        if allowed and path.kind in FEED_KINDS:
            found = await self._feeds.document(channel, path)
            if found is None:
                raise NotFound("there is no such object in this channel")
            name = Sha1(hashlib.sha1(found, usedforsecurity=False).hexdigest())
            return name, Content(self._blobs.store_on_volume, found, None)
        reference = await self.find(channel, path.text) if allowed else None
        if reference is None or (reference.on_demand and reader is None):
            raise NotFound("there is no such object in this channel")
        return reference.sha1, await self._blobs.open(reference.sha1)

    # -- writing -------------------------------------------------------------------------------------------------

    async def refer(
        self,
        channel: str,
        path: ObjectPath,
        sha1: Sha1,
        size: int,
        owner: Subject,
        *,
        label: str = "",
        on_demand: bool = False,
        reserved: bool = False,
        then: Callable[[Connection], None] = lambda conn: None,
    ) -> bool:
        """Add a reference, durable on return; whether it is new. `sha1` must be stored. `reserved`: room for it is held
        already; `then` runs in the same commit.

        Raises Forbidden when the right is gone meanwhile, Conflict when a file or message with other content is there,
        StorageFull over a limit of the channel or the owner. An upload ends a tombstone, and makes an on-demand
        reference its own; an on-demand reference changes nothing that is there, and is not made over a tombstone:
        NotFound.
        """
        self._roles.require(owner, channel, path.provide)
        record = {
            "type": "reference",
            "channel": channel,
            "path": path.text,
            "sha1": sha1,
            "size": size,
            "label": label,
            "principal": str(owner),
            "at": int(time.time() * 1000),
            "onDemand": on_demand,
        }
        charge, hold = Charge(channel, path.text, str(owner), size), self.quotas.hold()

        def check(conn: Connection) -> bool:
            known = bucket_index.at(conn, channel, path.text)
            if known is not None and known.sha1 != sha1 and path.immutable:
                raise Conflict(f"another object lies at {path.text} already; it stays")
            if on_demand and known is None and bucket_index.is_deleted(conn, channel, path.text):
                raise _deleted()
            new = known is None or not bucket_index.is_kept(known, sha1, on_demand)
            if new and not reserved:
                hold.take(conn, charge, None if known is None else _charge_of(known))
            return new

        # Looked at before the log is written, so that a refusal leaves no record. A file whose room is held cannot be
        # refused: its path names its content.
        if not (reserved and path.kind == "file" and not on_demand) and not await self._admit(check, charge, hold):
            return False

        def commit(conn: Connection) -> bool | None:
            new = bucket_index.refer(conn, record)
            if new is None:
                return None
            if new and not on_demand:
                count_upload(conn, channel, str(owner), size)
            then(conn)
            hold.release()
            return new

        new = await self._change(record, commit, hold)
        if new is None:
            if on_demand:
                raise _deleted()
            raise Conflict(f"another object was stored at {path.text} meanwhile; it stays")
        return new

    async def _admit(self, check: Callable[[Connection], T], charge: Charge, hold: Hold) -> T:
        """Result of `check`, which takes room. By the one writer where a limit counts it: two that look at the same
        time would both find the last room."""
        look = self._database.write if self.quotas.limits(charge) else self._database.read
        try:
            return await look(check)
        except BaseException:
            hold.release()
            raise

    async def require_not_deleted(self, channel: str, path: ObjectPath) -> None:
        """Raises NotFound when the object was deleted in the channel and not uploaded since."""
        if await self._database.read(lambda conn: bucket_index.is_deleted(conn, channel, path.text)):
            raise _deleted()

    async def require_room(self, channel: str, path: ObjectPath, size: int, owner: Subject) -> None:
        """Raises StorageFull when a new object of this size is over a limit of the channel or the owner now."""
        charge = Charge(channel, path.text, str(owner), size)

        def check(conn: Connection) -> None:
            if bucket_index.at(conn, channel, path.text) is None:
                self.quotas.require(conn, charge)

        await self._database.read(check)

    async def forget(
        self, channel: str, path: ObjectPath, by: Subject, *, recorded: Callable[[Change], Change] = lambda fn: fn
    ) -> None:
        """Delete an object in a channel: the reference goes, a tombstone stays, the bytes are not touched. `recorded`
        adds to the transaction. Of feeds only whole subfeeds can go, by their `subfeed.json`, until somebody provides
        them again. Raises NotFound."""
        if path.kind in FEED_KINDS:
            if not await self._feeds.hide(channel, path):
                raise NotFound("there is no such object in this channel")
            return
        if await self.find(channel, path.text) is None:
            raise NotFound("there is no such object in this channel")
        record = {
            "type": "referenceDelete",
            "channel": channel,
            "path": path.text,
            "by": str(by),
            "at": int(time.time() * 1000),
        }
        await self._change(record, recorded(lambda conn: bucket_index.apply_delete(conn, record)))

    async def restore(self, channel: str, path: ObjectPath, by: Subject) -> Reference:
        """Undo a deletion: the object is back as it was, with its first uploader and time. Raises NotFound for what was
        not deleted or can no longer be restored, Conflict when the bytes are gone, StorageFull."""
        known = await self.deleted(channel, path.text)
        if known is None:
            raise NotFound(
                "there is no deletion that could be undone",
                hint="It was never there, or its time has passed; upload it",
            )
        if await self._blobs.store_on_volume.stat(known.sha1) is None:
            raise Conflict("the bytes are gone from the storage", hint="Upload the file again")
        charge, hold = Charge(channel, path.text, known.principal, known.size), self.quotas.hold()
        await self._admit(lambda conn: hold.take(conn, charge), charge, hold)
        record = {
            "type": "referenceRestore",
            "channel": channel,
            "path": path.text,
            "by": str(by),
            "at": int(time.time() * 1000),
        }

        def commit(conn: Connection) -> None:
            bucket_index.apply_restore(conn, record)
            hold.release()

        await self._change(record, commit, hold)
        found = await self.find(channel, path.text)
        if found is None:
            raise NotFound("the object was deleted again meanwhile")
        return found

    async def deleted(self, channel: str, path: str) -> Reference | None:
        """What a deletion can be undone to; None when there is none."""
        row = await self._database.read(lambda conn: bucket_index.tombstone_at(conn, channel, path))
        return None if row is None or row.sha1 is None else bucket_index.deleted_reference(row)

    async def deletions(self, channel: str, after: str, limit: int) -> Sequence[tuple[Reference, int, str]]:
        """(Object, when it was deleted, by whom) of deletions that can be undone, by path. No rights are checked."""
        statement = select(tombstones).where(
            tombstones.c.channel == channel, tombstones.c.path > after, tombstones.c.sha1.is_not(None)
        )
        statement = statement.order_by(tombstones.c.path).limit(limit)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [(bucket_index.deleted_reference(row), row.deleted_at, row.deleted_by) for row in rows]

    async def forget_deletions(self, days: int) -> int:
        """End the time in which deletions older than `days` can be undone; how many."""
        record = {"type": "deletionsExpire", "before": int((time.time() - days * 86400) * 1000)}
        if not await self._database.read(lambda conn: bucket_index.has_old_deletions(conn, record)):
            return 0
        return await self._change(record, lambda conn: bucket_index.apply_deletions_expire(conn, record))

    async def clear(self, channel: str, *, on_demand_only: bool) -> None:
        """Drop all references of a channel, or those that were made on demand: it is removed, or becomes public."""
        record = {"type": "referenceClear", "channel": channel, "onDemandOnly": on_demand_only}
        await self._change(record, lambda conn: bucket_index.apply_clear(conn, record))
        await self._feeds.clear(channel, gone=not on_demand_only)

    async def used(self, channel: str) -> int:
        """Logical bytes of a channel's objects."""
        return await self._database.read(lambda conn: self._feeds.used(conn, channel))

    async def expire(self) -> int:
        """Drop references older than their channel's stated retention; how many."""
        count = 0
        for channel in list(self._data.channels.values()):
            if channel.retention_days is not None:
                before = int((time.time() - channel.retention_days * 86400) * 1000)
                if await self._database.read(lambda conn, c=channel.name, b=before: self._feeds.is_expired(conn, c, b)):  # type: ignore[misc]
                    count += await self._feeds.expire(channel.name, before)
                count += await self._expire({"type": "referenceExpire", "channel": channel.name, "before": before})
        return count

    async def _expire(self, record: dict[str, Any]) -> int:
        if not await self._database.read(lambda conn: bucket_index.expired(conn, record)):
            return 0
        return await self._change(record, lambda conn: bucket_index.apply_expire(conn, record))


def _charge_of(known: Any) -> Charge:
    return Charge(known.channel, known.path, known.principal, known.size)


def _deleted() -> NotFound:
    return NotFound("this object was deleted in this channel", hint="Upload it again")
