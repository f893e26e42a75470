"""Uploads into a bucket: tickets are issued after a check of rights, and what arrives is verified before it counts."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import lru_cache, partial
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from kachery_lab.blobs.durable import present
from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.rates import Rates
from kachery_lab.core.roles import Role
from kachery_lab.core.tickets import GET_SECONDS, MAX_GET_SECONDS, PUT_SECONDS, Capability, Signer, Ticket
from kachery_lab.errors import ContentMismatch, Forbidden, InvalidInput, TooLarge, TooManyRequests
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.blobs import BlobService, Claim
from kachery_lab.services.bucket_feeds import FEED_KINDS, BucketFeeds
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.origins import OriginService
from kachery_lab.services.pending import Pending, PendingUploads
from kachery_lab.services.principals import Principal
from kachery_lab.services.quotas import Charge
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.task_leases import TaskLeaseService

UTF8_BYTES = 3
"""The most bytes that one UTF-16 unit of a text becomes in UTF-8."""
SMALL_JSON = 256 * 1024
MAX_JSON_OBJECT = 100_000_000
"""Bytes of a feed message or a task result."""
_TICKETS_KNOWN = 4096


class UploadService:
    """Issues tickets and capabilities and honours them."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        signer: Signer,
        blobs: BlobService,
        buckets: BucketService,
        origins: OriginService,
        pending: PendingUploads,
        feeds: BucketFeeds,
        hub_id: NodeId,
        rates: Rates,
    ) -> None:
        self._data = data
        self._roles = roles
        self._signer = signer
        self._blobs = blobs
        self._buckets = buckets
        self._origins = origins
        self._pending = pending
        self._hub_id = hub_id
        self._rates = rates
        self._feeds = feeds
        # A reader of many ranges sends one text each time. What it says never changes; time and rights are looked at.
        self._read_ticket = lru_cache(maxsize=_TICKETS_KNOWN)(self._open_ticket)
        self.task_leases: TaskLeaseService | None = None

    # -- permissions in URLs -------------------------------------------------------------------------------------

    def issue(
        self,
        channel: str,
        path: ObjectPath,
        size: int | None,
        owner: Subject,
        *,
        announced: bool = False,
        on_demand: bool = False,
        lease: str | None = None,
    ) -> str:
        """The URL segment of an upload ticket, good for one hour. `announced`: for an upload that holds its room and
        counts when it is finished; `on_demand`: for what somebody asked for, see `BucketService.refer`; `lease`: of the
        task whose result this is. Raises Forbidden naming role and channel, NotFound, TooLarge over the channel's
        limits, TooManyRequests."""
        self._roles.require(owner, channel, path.provide)
        if on_demand:
            self._require_offer(channel, owner)
        self.check_size(channel, path, size)
        wait = self._rates.wait(str(owner), monotonic())
        if wait:
            raise TooManyRequests(
                f"{owner} asks for too many upload URLs",
                retry_after=int(wait) + 1,
                hint="Wait; KACHERY_LAB_TICKETS_PER_SECOND sets how many it gets",
            )
        now = int(time.time())
        return self._signer.ticket(
            Ticket(
                *("PUT", channel, path.text, str(owner), now, now + PUT_SECONDS, secrets.token_hex(8), size),
                on_demand=on_demand,
                lease=lease,
                ceiling=int(owner.ceiling),
                token=owner.token,
                announced=announced,
            )
        )

    def _require_offer(self, channel: str, owner: Subject) -> None:
        """Raises Forbidden unless the node offers its local files in the channel now."""
        membership = self._data.memberships.get((channel, owner.name))
        if owner.kind != "node" or membership is None or membership.offer != "local":
            raise Forbidden(
                f"{owner.kind} {owner.name} offers in {channel} only what was uploaded",
                hint="An offer of local files is part of a node's membership",
            )

    def issue_read(self, channel: str, path: ObjectPath, reader: Subject, seconds: int = GET_SECONDS) -> str:
        """The text of a ticket that opens one object for GET and HEAD. Raises Forbidden, InvalidInput."""
        self._roles.require(reader, channel, path.request)
        if not 0 < seconds <= MAX_GET_SECONDS:
            raise InvalidInput(f"expected 1 to {MAX_GET_SECONDS} seconds")
        now = int(time.time())
        return self._signer.ticket(
            Ticket(
                *("GET", channel, path.text, str(reader), now, now + seconds, secrets.token_hex(8)),
                ceiling=int(reader.ceiling),
                token=reader.token,
            )
        )

    def open_read(self, text: str, method: str) -> tuple[str, ObjectPath, Subject]:
        """(Channel, path, reader) of a ticket for reading; the reader's rights are not looked at. Raises Forbidden."""
        ticket, path, reader = self._read_ticket(text)
        ticket.check(method, time.time())
        return ticket.channel, path, reader

    def _open_ticket(self, text: str) -> tuple[Ticket, ObjectPath, Subject]:
        ticket = self._signer.open_ticket(text)
        return ticket, ObjectPath.parse(ticket.path), _bound(ticket)

    def check_size(self, channel: str, path: ObjectPath, size: int | None) -> None:
        """Raises TooLarge over the channel's limit of one object, NotFound."""
        limit = self._data.channel(channel).max_object_bytes
        if path.kind != "file":
            limit = min(limit or MAX_JSON_OBJECT, MAX_JSON_OBJECT)
        if size is not None and limit is not None and size > limit:
            raise TooLarge(f"{size} bytes are more than the {limit} that an object of {channel} may have")

    def capability(self, channel: str, reader: Subject) -> str:
        """The URL segment that lets a reader into a private bucket, as far as its roles reach at each use. Raises
        Forbidden for a reader whose credential does not reach the channel, NotFound."""
        if reader.channels is not None and channel not in reader.channels:
            raise Forbidden(f"this credential does not reach the channel {channel}")
        epoch = self._data.channel(channel).epoch
        return self._signer.capability(Capability(str(reader), channel, epoch, int(reader.ceiling), reader.token))

    def reader(self, text: str, channel: str) -> Subject:
        """Who reads with a capability. Raises Forbidden when it is not one of this channel, or of an older epoch."""
        found = self._signer.open_capability(text)
        known = self._data.channels.get(channel)
        if known is None or found.channel != channel or found.epoch != known.epoch:
            raise Forbidden("this address is no longer good", hint="Ask the hub for the bucket's address again")
        return _bound(found)

    # -- receiving -----------------------------------------------------------------------------------------------

    def open(self, segment: str) -> tuple[Ticket, Subject]:
        """An upload ticket, and on whose behalf it was issued. Raises Forbidden for a forged one."""
        ticket = self._signer.open_ticket(segment)
        return ticket, _bound(ticket)

    async def adopt(self, channel: str, sha1: Sha1, size: int, owner: Subject, *, on_demand: bool = False) -> bool:
        """Put a file that is here already into a bucket; whether the reference is new. Raises what `issue` raises,
        and StorageFull."""
        path = ObjectPath.parse(file_path(sha1))
        self._roles.require(owner, channel, path.provide)
        if on_demand:
            self._require_offer(channel, owner)
        self.check_size(channel, path, size)
        return await self._buckets.refer(channel, path, sha1, size, owner, on_demand=on_demand)

    async def receive(self, segment: str, stream: AsyncIterable[bytes], size: int | None, peer: str | None) -> bool:
        """`honour` for a ticket that nobody has opened yet."""
        ticket, owner = self.open(segment)
        return await self.honour(ticket, owner, stream, size, peer)

    async def honour(
        self, ticket: Ticket, owner: Subject, stream: AsyncIterable[bytes], size: int | None, peer: str | None
    ) -> bool:
        """Take what an opened upload ticket is for; whether a file or task result is new. Repeating it with the same
        bytes is no error.

        Raises Forbidden (ticket or rights, checked again after the bytes came), ContentMismatch (hash, size, or a
        message that does not continue its subfeed), Conflict, TooLarge, StorageFull, Unavailable.
        """
        ticket.check("PUT", time.time())
        path = ObjectPath.parse(ticket.path)
        self._roles.require(owner, ticket.channel, path.provide)
        if ticket.on_demand:
            self._require_offer(ticket.channel, owner)
        expected = ticket.size if ticket.size is not None else size
        if size is not None and ticket.size is not None and size != ticket.size:
            raise ContentMismatch(f"{size} bytes are announced, the ticket is for {ticket.size}")
        self.check_size(ticket.channel, path, expected)
        if ticket.announced:
            return await self._receive_announced(ticket, path, owner, stream, size, peer)
        if expected is not None and path.kind not in FEED_KINDS:
            # Before the bytes come; `refer` decides when they are here.
            await self._buckets.require_room(ticket.channel, path, expected, owner)
        principal = Principal("operator", str(owner), peer=peer)
        limit = self._data.channel(ticket.channel).max_object_bytes
        if path.kind == "file":
            assert path.sha1 is not None
            claim = Claim(sha1=path.sha1, size=expected, max_size=limit)
            await self._arriving(path.sha1, ticket.channel)
            stored = await self._blobs.store(stream, claim, principal)
        else:
            data = await _gather(stream, min(limit or MAX_JSON_OBJECT, MAX_JSON_OBJECT))
            if expected is not None and len(data) != expected:
                raise ContentMismatch(f"{len(data)} bytes arrived, {expected} were announced")
            value = await self._document(data)
            if path.kind in FEED_KINDS:
                self._roles.require(owner, ticket.channel, path.provide)
                await self._feeds.put(ticket.channel, path, value)
                return True
            if value is None:
                raise ContentMismatch("a task result may not be null")
            await self._arriving(Sha1(hashlib.sha1(data, usedforsecurity=False).hexdigest()), ticket.channel)
            stored = await self._blobs.store_bytes(data, principal)
        if ticket.on_demand:
            self._require_offer(ticket.channel, owner)
        async with self._committing(ticket, path, owner, stored.sha1):
            return await self._buckets.refer(
                ticket.channel, path, stored.sha1, stored.size, owner, on_demand=ticket.on_demand
            )

    def _committing(
        self, ticket: Ticket, path: ObjectPath, owner: Subject, sha1: Sha1
    ) -> AbstractAsyncContextManager[None]:
        """While it lasts, a task's result may go into the bucket. Raises Conflict when its lease is over."""
        if path.kind != "task" or path.sha1 is None or self.task_leases is None:
            return nullcontext()
        return self.task_leases.committing(ticket.channel, path.sha1, owner, ticket.lease, sha1)

    async def _receive_announced(
        self,
        ticket: Ticket,
        path: ObjectPath,
        owner: Subject,
        stream: AsyncIterable[bytes],
        size: int | None,
        peer: str | None,
    ) -> bool:
        """Store the bytes of an upload that was announced; they get their reference when it is finished."""
        assert path.sha1 is not None
        channel = ticket.channel
        found = self._pending.find(channel, path.text, str(owner))
        # A repetition of what is finished, by a client that did not see the answer.
        finished = None if found is not None else await self._buckets.find(channel, path.text)
        if finished is not None and not finished.on_demand:
            claim = self._claim(channel, path, finished.size, True, size)
        else:
            found = found or await self._announced_anew(ticket, path, owner)
            claim = self._claim(channel, path, found.charge.size, found.exact or found.received, size)
        charge = Charge(channel, path.text, str(owner), 0)
        noted = False

        def note(conn: Connection, stored: int) -> None:
            nonlocal noted
            # Who lost the right meanwhile is refused below; then nothing was received either.
            may = self._roles.roles(owner, channel) & path.provide
            noted = bool(may) and self._pending.receive(conn, charge, stored)

        arriving = partial(self._arriving, path.sha1, channel)
        with self._pending.arriving(charge):
            principal = Principal("operator", str(owner), peer=peer)
            stored = await self._blobs.store(stream, claim, principal, note, arriving)
        if noted:
            self._pending.received(charge, stored.size)
        self._roles.require(owner, channel, path.provide)
        return stored.new

    async def _announced_anew(self, ticket: Ticket, path: ObjectPath, owner: Subject) -> Pending:
        """What a ticket says of an upload that a kill of the server made it forget. Raises Forbidden for one that has
        expired, and what `PendingUploads.reserve` raises."""
        found = None
        if ticket.size is not None and not self._pending.is_over(ticket.issued):
            charge = Charge(ticket.channel, path.text, str(owner), ticket.size)
            await self._pending.reserve(charge, exact=True, label="")
            found = self._pending.find(ticket.channel, path.text, str(owner))
        if found is None:
            raise Forbidden("this upload has expired", hint="Announce it again, for a new URL")
        return found

    def _claim(self, channel: str, path: ObjectPath, announced: int, exact: bool, size: int | None) -> Claim:
        """What may arrive: exactly what was announced, or bytes of a text that was announced in UTF-16 units."""
        most = announced if exact else announced * UTF8_BYTES
        if size is not None and (size > most or (exact and size != announced)):
            raise ContentMismatch(f"{size} bytes are announced, the upload was announced with {announced}")
        limit = self._data.channel(channel).max_object_bytes
        most = most if limit is None else min(most, limit)
        return Claim(sha1=path.sha1, size=announced if exact else size, max_size=most)

    async def _arriving(self, sha1: Sha1, channel: str) -> None:
        """What is uploaded to a channel is not this server's own to offer in others."""
        path = self._blobs.store_on_volume.layout.blob(sha1)
        await self._origins.arriving_unless(sha1, f"{self._hub_id}/{channel}", partial(present, path))

    async def _document(self, data: bytes) -> Any:
        """Raises ContentMismatch for what is no JSON."""
        try:
            # In a thread: a large document would keep every other request waiting.
            return loads_2021(data) if len(data) < SMALL_JSON else await asyncio.to_thread(loads_2021, data)
        except InvalidInput as error:
            raise ContentMismatch(f"the object is not JSON: {error.message}") from error


def _bound(permission: Ticket | Capability) -> Subject:
    """On whose behalf it was issued, with what that credential left of the subject's roles, in its channel only."""
    only = frozenset({permission.channel})
    return Subject.parse(permission.principal, Role(permission.ceiling), only, permission.token)


async def _gather(stream: AsyncIterable[bytes], limit: int) -> bytes:
    data = bytearray()
    async for piece in stream:
        data += piece
        if len(data) > limit:
            raise TooLarge(f"more than the allowed {limit} bytes arrived")
    return bytes(data)
