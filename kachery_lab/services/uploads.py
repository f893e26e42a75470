"""Uploads into a bucket: tickets are issued after a check of rights, and what arrives is verified before it counts."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterable
from dataclasses import replace
from time import monotonic

from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.feeds import accept_chain, parse_signed_message
from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.rates import Rates
from kachery_lab.core.roles import Role
from kachery_lab.core.tickets import PUT_SECONDS, Capability, Signer, Ticket
from kachery_lab.errors import Conflict, ContentMismatch, Forbidden, InvalidInput, TooLarge, TooManyRequests
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.blobs import BlobService, Claim
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.origins import OriginService
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import RoleService, Subject

SMALL_JSON = 256 * 1024
MAX_JSON_OBJECT = 100_000_000
"""Bytes of a feed message or a task result."""


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
        hub_id: NodeId,
        rates: Rates,
    ) -> None:
        self._data = data
        self._roles = roles
        self._signer = signer
        self._blobs = blobs
        self._buckets = buckets
        self._origins = origins
        self._hub_id = hub_id
        self._rates = rates

    # -- permissions in URLs -------------------------------------------------------------------------------------

    def issue(self, channel: str, path: ObjectPath, size: int | None, owner: Subject) -> str:
        """The URL segment of an upload ticket, good for one hour. Raises Forbidden naming role and channel, NotFound,
        TooLarge over the channel's limits, TooManyRequests."""
        self._roles.require(owner, channel, path.provide)
        self._check_size(channel, path, size)
        wait = self._rates.wait(str(owner), monotonic())
        if wait:
            raise TooManyRequests(
                f"{owner} asks for too many upload URLs",
                retry_after=int(wait) + 1,
                hint="Wait; KACHERY_LAB_TICKETS_PER_SECOND sets how many it gets",
            )
        now = int(time.time())
        ticket = Ticket("PUT", channel, path.text, str(owner), now, now + PUT_SECONDS, secrets.token_hex(8), size)
        return self._signer.ticket(replace(ticket, ceiling=int(owner.ceiling), token=owner.token))

    def _check_size(self, channel: str, path: ObjectPath, size: int | None) -> None:
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

    def holder(self, segment: str) -> tuple[Subject, str]:
        """On whose behalf an upload ticket was issued, and for which channel. Raises Forbidden for a forged one."""
        ticket = self._signer.open_ticket(segment)
        return _bound(ticket), ticket.channel

    async def adopt(self, channel: str, sha1: Sha1, size: int, owner: Subject) -> bool:
        """Put a file that is here already into a bucket; whether the reference is new. Raises what `issue` raises,
        and StorageFull."""
        path = ObjectPath.parse(file_path(sha1))
        self._roles.require(owner, channel, path.provide)
        self._check_size(channel, path, size)
        return await self._buckets.refer(channel, path, sha1, size, owner)

    async def receive(self, segment: str, stream: AsyncIterable[bytes], size: int | None, peer: str | None) -> bool:
        """Honour an upload ticket; whether the object is new. Repeating it with the same bytes is no error.

        Raises Forbidden (ticket or rights, checked again after the bytes came), ContentMismatch (hash, size, or a
        message that does not continue its subfeed), Conflict, TooLarge, StorageFull, Unavailable.
        """
        ticket = self._signer.open_ticket(segment)
        ticket.check("PUT", time.time())
        path = ObjectPath.parse(ticket.path)
        owner = _bound(ticket)
        self._roles.require(owner, ticket.channel, path.provide)
        expected = ticket.size if ticket.size is not None else size
        if size is not None and ticket.size is not None and size != ticket.size:
            raise ContentMismatch(f"{size} bytes are announced, the ticket is for {ticket.size}")
        self._check_size(ticket.channel, path, expected)
        if expected is not None:
            # Before the bytes come; `refer` decides when they are here.
            await self._buckets.require_room(ticket.channel, path, expected)
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
            await self._check_document(ticket.channel, path, data)
            await self._arriving(Sha1(hashlib.sha1(data, usedforsecurity=False).hexdigest()), ticket.channel)
            stored = await self._blobs.store_bytes(data, principal)
        return await self._buckets.refer(ticket.channel, path, stored.sha1, stored.size, owner)

    async def _arriving(self, sha1: Sha1, channel: str) -> None:
        """What is uploaded to a channel is not this server's own to offer in others."""
        here = await self._blobs.store_on_volume.stat(sha1) is not None
        await self._origins.arriving(sha1, f"{self._hub_id}/{channel}", here=here)

    async def _check_document(self, channel: str, path: ObjectPath, data: bytes) -> None:
        try:
            # In a thread: a large document would keep every other request waiting.
            value = loads_2021(data) if len(data) < SMALL_JSON else await asyncio.to_thread(loads_2021, data)
        except InvalidInput as error:
            raise ContentMismatch(f"the object is not JSON: {error.message}") from error
        if path.kind == "subfeed":
            count = value.get("messageCount") if isinstance(value, dict) else None
            if isinstance(count, bool) or not isinstance(count, int | float) or count < 0:
                raise ContentMismatch("subfeed.json: expected an object with a number `messageCount`")
        elif path.kind == "message":
            await self._check_message(channel, path, value)
        elif value is None:
            raise ContentMismatch("a task result may not be null")

    async def _check_message(self, channel: str, path: ObjectPath, value: object) -> None:
        """Signature, number and predecessor of a feed message."""
        assert path.position is not None and path.feed_id is not None
        previous = None
        if path.position > 0:
            reference = await self._buckets.find(channel, path.neighbour(path.position - 1))
            if reference is None:
                raise Conflict(f"message {path.position - 1} is not here yet", hint="Upload messages in order")
            content = await self._blobs.open(reference.sha1)
            try:
                before = b"".join([piece async for piece in content.read(0, content.size)])
            finally:
                content.close()
            previous = parse_signed_message(loads_2021(before)).signature
        try:
            message = parse_signed_message(value)
            accepted = accept_chain(path.feed_id, path.position, previous, [message])
        except InvalidInput as error:
            raise ContentMismatch(error.message) from error
        if len(accepted) != 1:
            raise ContentMismatch(f"the message is not number {path.position} of its subfeed")


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
