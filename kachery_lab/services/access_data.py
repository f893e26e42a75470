"""Users, nodes, channels and rights, held in memory: every decision is a few dictionary look-ups.

The tables are small and change rarely. A change takes force at its commit; then `access.json` on the volume is written
anew, from which `reindex` restores it when the database is lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, Table, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.durable import write_file
from kachery_lab.core.roles import Role
from kachery_lab.db import models
from kachery_lab.db.engine import Database
from kachery_lab.errors import Conflict, KacheryLabError, NotFound, StartRefused

T = TypeVar("T")

TABLES: tuple[Table, ...] = (
    models.users,
    models.tokens,
    models.nodes,
    models.channels,
    models.memberships,
    models.authorizations,
    models.passcodes,
    models.membership_passcodes,
    models.clients,
    models.enrolment_codes,
    models.user_profiles,
    models.quotas,
    models.task_functions,
    models.task_grants,
)
"""In the order in which rows can be inserted."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A registered node. Times in ms since 1970."""

    node_id: str
    owner: str
    label: str
    created_at: int
    approved_at: int | None
    reported_at: int | None


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel and its limits: bytes and objects in all, bytes of one object, days that an object stays. None: no
    limit."""

    name: str
    owner: str
    public: bool
    public_local: bool
    created_at: int
    max_bytes: int | None
    max_object_bytes: int | None
    retention_days: int | None
    resource_id: str
    sealed_resource_key: bytes
    epoch: int
    max_objects: int | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """What a node's owner asks for in a channel, and which blobs the node offers there."""

    channel: str
    node_id: str
    asked: Role
    offer: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Passcode:
    """A granted passcode, without its text."""

    id: str
    channel: str
    label: str
    granted: Role
    created_at: int


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client key. `user`: whose it is; None while it waits for approval. Times in ms since 1970."""

    client_id: str
    user: str | None
    label: str
    created_at: int
    approved_at: int | None
    asked_as: str
    asked_from: str | None


@dataclass(frozen=True, slots=True)
class EnrolmentCode:
    """A code that registers client keys of one user, without its text. Times in ms since 1970."""

    id: str
    user: str
    label: str
    created_at: int
    expires_at: int
    uses_left: int


@dataclass(frozen=True, slots=True)
class Quota:
    """What one subject may have in all channels together. None: no limit."""

    subject: str
    max_bytes: int | None
    max_objects: int | None


@dataclass(slots=True)
class _Snapshot:
    users: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    channels: dict[str, Channel] = field(default_factory=dict)
    memberships: dict[tuple[str, str], Membership] = field(default_factory=dict)
    authorizations: dict[tuple[str, str, str], Role] = field(default_factory=dict)
    passcodes: dict[tuple[str, str], Passcode] = field(default_factory=dict)
    shown: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    enrolment_codes: dict[str, EnrolmentCode] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)
    run_limits: dict[tuple[str, str], int] = field(default_factory=dict)
    task_grants: dict[tuple[str, str], dict[tuple[str, str], Role]] = field(default_factory=dict)


class AccessData:
    """The snapshot in force, and the one way to change it."""

    def __init__(self, database: Database, disk: Disk, file: Path) -> None:
        self._database = database
        self._disk = disk
        self._file = file
        self._now = _Snapshot()
        self._dirty = False
        self._writer: asyncio.Task[None] | None = None
        self.listeners: list[Callable[[], None]] = []

    def load(self) -> None:
        """Blocking: read the tables, at start."""
        self._now = self._database.read_sync(_read)

    async def change(self, fn: Callable[[Connection], T]) -> T:
        """Run a change; it is in force, for open connections too, when this returns. Raises Conflict when what it
        refers to was removed, or added, between the caller's look and the change."""

        def run(conn: Connection) -> tuple[T, _Snapshot]:
            return fn(conn), _read(conn)

        try:
            result, self._now = await self._database.write(run)
        except IntegrityError as error:
            raise Conflict("something that this refers to changed meanwhile", hint="Try again") from error
        for listener in self.listeners:
            listener()
        self._dirty = True
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_snapshots())
        return result

    # -- asking --------------------------------------------------------------------------------------------------

    @property
    def users(self) -> dict[str, int]:
        """When each user was made, by name."""
        return self._now.users

    @property
    def nodes(self) -> dict[str, NodeRecord]:
        """Registered nodes by id."""
        return self._now.nodes

    @property
    def channels(self) -> dict[str, Channel]:
        """Channels by name."""
        return self._now.channels

    @property
    def memberships(self) -> dict[tuple[str, str], Membership]:
        """By channel and node id."""
        return self._now.memberships

    @property
    def authorizations(self) -> dict[tuple[str, str, str], Role]:
        """What is granted, by channel, kind and name of the subject."""
        return self._now.authorizations

    @property
    def passcodes(self) -> dict[tuple[str, str], Passcode]:
        """By channel and digest."""
        return self._now.passcodes

    @property
    def clients(self) -> dict[str, ClientRecord]:
        """Client keys by id, those that wait included."""
        return self._now.clients

    @property
    def enrolment_codes(self) -> dict[str, EnrolmentCode]:
        """By digest."""
        return self._now.enrolment_codes

    @property
    def quotas(self) -> dict[str, Quota]:
        """By subject, as `kind:name`."""
        return self._now.quotas

    def shown_passcodes(self, channel: str, node_id: str) -> frozenset[str]:
        """Digests of the passcodes that a membership shows."""
        return self._now.shown.get((channel, node_id), frozenset())

    @property
    def run_limits(self) -> dict[tuple[str, str], int]:
        """Seconds that a backend may keep a task, by channel and function; `*`: functions without an entry."""
        return self._now.run_limits

    @property
    def task_grants(self) -> dict[tuple[str, str], dict[tuple[str, str], Role]]:
        """By channel and function: who alone may request or provide it, by kind and name of the subject."""
        return self._now.task_grants

    def channel(self, name: str) -> Channel:
        """Raises NotFound."""
        found = self._now.channels.get(name)
        if found is None:
            raise NotFound(f"there is no channel {name!r}")
        return found

    def node_grant(self, channel: str, node_id: str) -> Role:
        """What a channel grants a node: its authorization, and every valid passcode that its membership shows."""
        now = self._now
        granted = now.authorizations.get((channel, "node", node_id), Role.NONE)
        for digest in now.shown.get((channel, node_id), ()):
            passcode = now.passcodes.get((channel, digest))
            if passcode is not None:
                granted |= passcode.granted
        return granted

    def node_roles(self, channel: str, node_id: str) -> Role:
        """Effective roles of a node: asked and granted. A node that waits for approval has none."""
        node, membership = self._now.nodes.get(node_id), self._now.memberships.get((channel, node_id))
        if node is None or node.approved_at is None or membership is None:
            return Role.NONE
        return membership.asked & self.node_grant(channel, node_id)

    def user_roles(self, channel: str, user: str) -> Role:
        """Effective roles of a user, who needs no membership. The channel's owner has all."""
        found = self._now.channels.get(channel)
        if found is None:
            return Role.NONE
        if found.owner == user:
            return Role.ALL
        return self._now.authorizations.get((channel, "user", user), Role.NONE)

    def client_roles(self, channel: str, client_id: str) -> Role:
        """Effective roles of a client key: its own authorization if it has one, else its user's roles. A key that
        nobody registered, or that waits for approval, has none."""
        client = self._now.clients.get(client_id)
        if client is None or client.user is None:
            return Role.NONE
        own = self._now.authorizations.get((channel, "client", client_id))
        return self.user_roles(channel, client.user) if own is None else own

    # -- the copy on the volume ----------------------------------------------------------------------------------

    async def _write_snapshots(self) -> None:
        try:
            while self._dirty:
                self._dirty = False
                try:
                    tables = await self._database.read(dump)
                    data = json.dumps({"version": 1, "tables": tables}, indent=1, sort_keys=True).encode()
                    await self._disk.run(write_file, self._file, data, 0o600)
                except KacheryLabError as error:
                    # The database has it; the next change, or the next start, writes the copy.
                    log.warning("access.json was not written", code=error.code, reason=error.message)
        finally:
            self._writer = None

    async def flush(self) -> None:
        """Wait until the copy on the volume is written."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    def restore(self) -> int:
        """Blocking: fill empty tables from `access.json`; how many rows. 0 when there is none or nothing is missing.

        Raises StartRefused for a file that cannot be read as one.
        """
        if self._now.users or self._now.channels or not self._file.exists():
            return 0
        try:
            tables = json.loads(self._file.read_text(encoding="utf-8"))["tables"]
            rows = self._database.write_sync(lambda conn: _insert(conn, tables))
        except (ValueError, KeyError, TypeError, AttributeError, SQLAlchemyError) as error:
            raise StartRefused(
                f"{self._file} cannot be read: {error}", hint="Restore it from a backup, or move it away"
            ) from error
        self.load()
        return rows


def _read(conn: Connection) -> _Snapshot:
    new = _Snapshot()
    new.users = {row.name: row.created_at for row in conn.execute(select(models.users))}
    for row in conn.execute(select(models.nodes)):
        new.nodes[row.node_id] = NodeRecord(*row)
    for row in conn.execute(select(models.channels)):
        new.channels[row.name] = Channel(*row)
    for row in conn.execute(select(models.memberships)):
        membership = Membership(row.channel, row.node_id, Role(row.asked), row.offer, row.created_at)
        new.memberships[row.channel, row.node_id] = membership
    for row in conn.execute(select(models.authorizations)):
        new.authorizations[row.channel, row.subject_kind, row.subject] = Role(row.granted)
    for row in conn.execute(select(models.passcodes)):
        passcode = Passcode(row.id, row.channel, row.label, Role(row.granted), row.created_at)
        new.passcodes[row.channel, row.digest] = passcode
    for row in conn.execute(select(models.membership_passcodes)):
        key = (row.channel, row.node_id)
        new.shown[key] = new.shown.get(key, frozenset()) | {row.digest}
    for row in conn.execute(select(models.clients)):
        new.clients[row.client_id] = ClientRecord(*row)
    for row in conn.execute(select(models.enrolment_codes)):
        new.enrolment_codes[row.digest] = EnrolmentCode(
            row.id, row.user, row.label, row.created_at, row.expires_at, row.uses_left
        )
    for row in conn.execute(select(models.quotas)):
        new.quotas[row.subject] = Quota(*row)
    for row in conn.execute(select(models.task_functions)):
        new.run_limits[row.channel, row.function_id] = row.max_run_seconds
    for row in conn.execute(select(models.task_grants)):
        granted = new.task_grants.setdefault((row.channel, row.function_id), {})
        granted[row.subject_kind, row.subject] = Role(row.granted)
    return new


def dump(conn: Connection) -> dict[str, list[dict[str, Any]]]:
    """Every row of the access tables as JSON; secrets in them are hashed or encrypted already."""
    return {
        table.name: [
            {key: {"hex": value.hex()} if isinstance(value, bytes) else value for key, value in row._mapping.items()}
            for row in conn.execute(select(table))
        ]
        for table in TABLES
    }


def _insert(conn: Connection, tables: dict[str, list[dict[str, Any]]]) -> int:
    rows = 0
    for table in TABLES:
        found = [
            {key: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value for key, value in row.items()}
            for row in tables.get(table.name, [])
        ]
        if found:
            conn.execute(table.insert(), found)
            rows += len(found)
    return rows
