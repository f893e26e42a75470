"""Channels: made, changed and removed by their owners."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, insert, update

from kachery_lab.core.ids import ChannelName, UserName
from kachery_lab.core.keys import PrivateKey, derive_key, seal, unseal
from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.roles import Role
from kachery_lab.core.strict_json import MAX_SAFE_INTEGER
from kachery_lab.db.models import authorizations, channels, memberships
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData, Channel
from kachery_lab.services.audit import AuditService
from kachery_lab.services.buckets import BucketService, Reference
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import Subject
from kachery_lab.services.users import add_user

DEFAULT = ChannelName("default")
LIMITS = {
    "max_bytes": MAX_SAFE_INTEGER,
    "max_object_bytes": MAX_SAFE_INTEGER,
    "max_objects": MAX_SAFE_INTEGER,
    "retention_days": 36_500,
}
"""The largest value of each limit."""


class ChannelService:
    """Every method takes the caller and decides by one rule: admins may, owners with the scope `channel-owner` may for
    their own channels. What a caller may not see does not exist for it."""

    def __init__(self, data: AccessData, audit: AuditService, buckets: BucketService, secret: PrivateKey) -> None:
        self._data = data
        self._buckets = buckets
        self._audit = audit
        self._sealing_key = derive_key(secret, "kachery-lab/channel-keys/1")

    # -- asking --------------------------------------------------------------------------------------------------

    def list(self, actor: Principal) -> list[Channel]:
        """All channels for an admin, their own for others, by name."""
        actor.require("admin", "channel-owner")
        found = sorted(self._data.channels.values(), key=lambda channel: channel.name)
        return [channel for channel in found if self._owns(actor, channel)]

    def require_owner(self, actor: Principal, name: str) -> Channel:
        """The channel, if the caller may change it. Raises Forbidden (no such scope), NotFound."""
        actor.require("admin", "channel-owner")
        channel = self._data.channels.get(name)
        if channel is None or not self._owns(actor, channel):
            raise NotFound(f"there is no channel {name!r}")
        return channel

    @staticmethod
    def _owns(actor: Principal, channel: Channel) -> bool:
        if actor.may("admin"):
            return True
        return actor.may("channel-owner") and channel.owner == actor.name and actor.covers(channel.name)

    def resource_key(self, channel: Channel) -> PrivateKey:
        """The key that signs certificates of this channel."""
        seed = unseal(self._sealing_key, channel.sealed_resource_key, channel.name.encode())
        return PrivateKey.from_seed(seed.hex())

    # -- the bucket ----------------------------------------------------------------------------------------------

    async def used(self, actor: Principal, name: str) -> int:
        """Logical bytes of the channel's objects."""
        self.require_owner(actor, name)
        return await self._buckets.used(name)

    async def objects(self, actor: Principal, name: str, after: str, limit: int) -> Sequence[Reference]:
        """Objects whose path comes after `after`, by path."""
        self.require_owner(actor, name)
        return await self._buckets.list(name, after, limit)

    async def remove_object(self, actor: Principal, name: str, path: str) -> None:
        """Delete an object in this channel; a tombstone stays, the bytes are not touched. Raises NotFound."""
        async with self._audit.action(actor, "object.delete", f"{name}/{path}") as act:
            self.require_owner(actor, name)
            by = Subject("user", actor.owner_name)
            await self._buckets.forget(name, ObjectPath.parse(path), by, recorded=act.recorded)

    async def deletions(
        self, actor: Principal, name: str, after: str, limit: int
    ) -> Sequence[tuple[Reference, int, str]]:
        """(Object, when it was deleted, by whom) of deletions that can be undone, by path."""
        self.require_owner(actor, name)
        return await self._buckets.deletions(name, after, limit)

    async def restore_object(self, actor: Principal, name: str, path: str) -> Reference:
        """Undo a deletion. Raises NotFound, Conflict when the bytes are gone, StorageFull."""
        async with self._audit.action(actor, "object.restore", f"{name}/{path}"):
            self.require_owner(actor, name)
            return await self._buckets.restore(name, ObjectPath.parse(path), Subject("user", actor.owner_name))

    # -- changing ------------------------------------------------------------------------------------------------

    async def create(
        self, actor: Principal, name: ChannelName, owner: UserName | None = None, *, public: bool = False, **limits: Any
    ) -> Channel:
        """A new channel; the caller owns it unless an admin names another owner. Raises Conflict for a taken name."""
        owner = owner or UserName(actor.owner_name)
        async with self._audit.action(actor, "channel.create", name, f"owner {owner}") as act:
            actor.require("admin", "channel-owner")
            if not actor.may("admin") and (owner != actor.name or not actor.covers(name)):
                raise Forbidden("only an admin makes channels for others")
            if name in self._data.channels:
                raise Conflict(f"there is a channel {name!r} already")
            _check_limits(limits)
            make = act.recorded(lambda conn: self.insert(conn, name, owner, public=public, **limits))
            await self._data.change(make)
            return self._data.channels[name]

    def insert(self, conn: Connection, name: str, owner: str, *, public: bool, **limits: Any) -> None:
        """The rows of a new channel with a resource key of its own. For use inside a change."""
        key = PrivateKey.generate()
        add_user(conn, owner)
        conn.execute(
            insert(channels).values(
                name=name,
                owner=owner,
                public=public,
                public_local=False,
                created_at=int(time.time() * 1000),
                resource_id=key.public_hex,
                sealed_resource_key=seal(self._sealing_key, bytes.fromhex(key.seed_hex()), name.encode()),
                epoch=1,
                **{limit: limits.get(limit) for limit in LIMITS},
            )
        )

    async def ensure_default(self, node_id: str) -> None:
        """The channel `default`: private, with every role for this node and for user `admin`, made at first start."""
        if DEFAULT in self._data.channels:
            return
        now = int(time.time() * 1000)

        def make(conn: Connection) -> None:
            self.insert(conn, DEFAULT, "admin", public=False)
            everything = {"channel": DEFAULT, "created_at": now}
            conn.execute(insert(memberships).values(node_id=node_id, asked=int(Role.ALL), offer="local", **everything))
            for kind, subject in (("node", node_id), ("user", "admin")):
                grant = {"subject_kind": kind, "subject": subject, "granted": int(Role.ALL)}
                conn.execute(insert(authorizations).values(**grant, **everything))

        await self._data.change(make)

    async def update(self, actor: Principal, name: str, changes: dict[str, Any]) -> Channel:
        """Change `owner`, `public`, `public_local` or limits (None: no limit). Making a channel public drops what was
        only offered on demand and turns `local` offers into `uploaded`, unless `public_local` is set with it. Raises
        InvalidInput, Forbidden, NotFound."""
        async with self._audit.action(actor, "channel.update", name, ", ".join(sorted(changes))) as act:
            channel = self.require_owner(actor, name)
            _check_limits({key: value for key, value in changes.items() if key in LIMITS})
            for key in ("public", "public_local"):
                if not isinstance(changes.get(key, False), bool):
                    raise InvalidInput(f"{key}: expected true or false")
            if unknown := set(changes) - {*LIMITS, "owner", "public", "public_local"}:
                raise InvalidInput(f"a channel has no {', '.join(sorted(unknown))}")
            becomes_public = changes.get("public", channel.public) and not channel.public
            if becomes_public:
                await self._buckets.clear(name, on_demand_only=True)

            def change(conn: Connection) -> None:
                values = dict(changes)
                if "owner" in values:
                    add_user(conn, values["owner"])
                if becomes_public:
                    values["epoch"] = channel.epoch + 1
                    if not changes.get("public_local"):
                        conn.execute(update(memberships).where(memberships.c.channel == name).values(offer="uploaded"))
                if values:
                    conn.execute(update(channels).where(channels.c.name == name).values(**values))

            await self._data.change(act.recorded(change))
            return self._data.channel(name)

    async def remove(self, actor: Principal, name: str) -> None:
        """Remove a channel with its memberships, rights and references. Blobs that something else refers to stay."""
        async with self._audit.action(actor, "channel.remove", name) as act:
            self.require_owner(actor, name)
            if name == DEFAULT:
                raise Conflict("the channel `default` stays", hint="Take away its authorizations instead")
            await self._buckets.clear(name, on_demand_only=False)
            statement = delete(channels).where(channels.c.name == name)
            await self._data.change(act.recorded(lambda conn: conn.execute(statement).rowcount))


def _check_limits(limits: dict[str, Any]) -> None:
    for key, value in limits.items():
        if key not in LIMITS:
            raise InvalidInput(f"{key}: a channel has no such limit")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 0 < value <= LIMITS[key]):
            raise InvalidInput(f"{key}: expected a whole number from 1 to {LIMITS[key]}, or null for no limit")
