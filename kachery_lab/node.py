"""One running node: builds the services in order, keeps their background work, closes them in reverse. No globals."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import structlog

from kachery_lab import __version__
from kachery_lab.blobs.disk import TROUBLE_LIMIT, Disk
from kachery_lab.blobs.durable import write_file
from kachery_lab.blobs.journal import START, Journal, Position
from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.blobs.links import LinkPolicy
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.blobs.volume import (
    HEARTBEAT,
    ProcessLock,
    VolumeOwner,
    ensure_directory,
    group_id,
    read_volume_id,
    require_writable,
    write_volume_id,
)
from kachery_lab.core.ids import NodeLabel, UserName
from kachery_lab.core.keys import derive_key
from kachery_lab.core.tickets import Signer
from kachery_lab.db import filesystem
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import MigrationReport, migrate
from kachery_lab.errors import InvalidInput, KacheryLabError, StartRefused
from kachery_lab.services import feed_index, mutables
from kachery_lab.services.access import AccessService
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.authorizations import AuthorizationService
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.events import Events
from kachery_lab.services.facts import Facts
from kachery_lab.services.feeds import FeedService
from kachery_lab.services.files import FileService
from kachery_lab.services.identity import Identity, open_identity
from kachery_lab.services.links import LinkService
from kachery_lab.services.logs import LogWriter, replay
from kachery_lab.services.mutables import OTHER_CODES, MutableService
from kachery_lab.services.nodes import NodeService
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.stats import Stats
from kachery_lab.services.subjects import RoleService
from kachery_lab.services.tokens import ADMIN, TokenService, new_secret
from kachery_lab.services.uploads import UploadService
from kachery_lab.services.users import UserService
from kachery_lab.services.watches import WatchService
from kachery_lab.settings import Settings

FEEDS_LOG = "feeds_log"
RECORDS_LOG = "records_log"
VOLUME_ID = "volume_id"
PRUNE_SECONDS = 3600.0

log = structlog.get_logger(__name__)


class Node:
    """Everything a running server has. Made by `open_node`; `start` and `close` belong to one event loop."""

    settings: Settings
    storage: StorageLayout
    metadata: MetadataLayout
    identity: Identity
    disk: Disk
    database: Database
    store: LocalBlobStore
    facts: Facts
    tokens: TokenService
    access: AccessService
    links: LinkService
    blobs: BlobService
    files: FileService
    feeds: FeedService
    watches: WatchService
    mutables: MutableService
    data: AccessData
    audit: AuditService
    roles: RoleService
    users: UserService
    nodes: NodeService
    channels: ChannelService
    authorizations: AuthorizationService
    buckets: BucketService
    uploads: UploadService
    stats: Stats
    report: dict[str, Any]
    volume_id: str

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._logs: list[LogWriter] = []
        self._owner: VolumeOwner
        self.stopping = asyncio.Event()
        self.events = Events()

    # -- running -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Publish the client code, make the first admin token, begin the background work."""
        await self._first_admin_token()
        owner = UserName(self.identity.owner or ADMIN)
        await self.nodes.ensure_own(self.identity.node_id, owner, NodeLabel(self.identity.label))
        await self.channels.ensure_default(self.identity.node_id)
        found, codes = await self.mutables.get(OTHER_CODES, OPERATOR)
        self.access.set_other_codes(codes if found else None)
        await self.access.start()
        swept = await self.disk.run(self.store.sweep)
        if swept:
            log.info("temporary files of an earlier run were removed", files=swept)
        for work in (self.access.keep_rotating(), self._heartbeat(), self._prune()):
            self._tasks.append(asyncio.create_task(work))

    async def _first_admin_token(self) -> None:
        given = self.settings.admin_token
        path = self.metadata.admin_token
        if given is not None:
            await self.tokens.ensure_admin(given.get_secret_value())
        elif not await self.tokens.list():
            secret = new_secret()
            await asyncio.to_thread(write_file, path, f"{secret}\n".encode(), 0o600)
            await self.tokens.ensure_admin(secret)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            try:
                await self.disk.run(self._owner.beat)
            except KacheryLabError as error:
                log.warning("the volume's owner file was not renewed", code=error.code)

    async def _prune(self) -> None:
        from kachery_lab.services.subfeeds import REQUESTS_KEPT_MS

        while True:
            before = int(time.time() * 1000) - REQUESTS_KEPT_MS
            try:
                await self.database.write(lambda conn, at=before: feed_index.forget_requests(conn, at))  # type: ignore[misc]
                await self.audit.prune()
                await self.buckets.expire()
            except KacheryLabError as error:
                log.warning("old request ids were not removed", code=error.code)
            await asyncio.sleep(PRUNE_SECONDS)

    def stop(self) -> None:
        """Ask the server to stop; long polls answer at once."""
        self.stopping.set()
        self.events.close()

    async def close(self) -> None:
        """End background work, finish what was handed in, free everything. Called once, from the loop of `start`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._logs:
            await writer.drain()
        await self.data.flush()
        await asyncio.to_thread(self.release)

    def release(self) -> None:
        """Blocking: free everything of a node that was never started, or whose work has ended."""
        self._stack.close()

    # -- looking -------------------------------------------------------------------------------------------------

    async def problems(self) -> list[str]:
        """Why the node cannot do its work now; empty when it can. Touches volume and database."""
        found = []
        try:
            if await self.disk.run(read_volume_id, self.storage) != self.volume_id:
                found.append(f"{self.storage.root} is not the volume that this node was started with")
            elif self.disk.trouble >= TROUBLE_LIMIT:
                await self.disk.run(require_writable, self.storage.root)
                self.disk.trouble = 0
        except (KacheryLabError, StartRefused) as error:
            found.append(f"storage: {error.message}")
        try:
            await self.facts.get(VOLUME_ID)
        except KacheryLabError as error:
            found.append(f"database: {error.message}")
        return found

    async def acknowledge_volume(self) -> None:
        """Say in the database that its index is this volume's. The last step of a rebuild."""
        await self.facts.set(VOLUME_ID, self.volume_id)

    async def index_counts(self) -> tuple[int, int, int]:
        """(Feeds, messages, mutables) in the index."""
        feeds, messages = await self.database.read(feed_index.counts)
        return feeds, messages, await self.database.read(mutables.count)


def open_node(settings: Settings, *, rebuild: bool = False) -> Node:
    """Blocking: open or make the storage, the database and every service. Raises StartRefused, having changed nothing
    on a volume that is not the one the database knows. `rebuild`: an empty database may be filled from the volume.
    """
    node = Node()
    try:
        _open(node, settings, rebuild)
    except BaseException as error:
        node.release()
        if isinstance(error, OSError):
            raise StartRefused(f"{error.filename or settings.storage_dir}: {error.strerror}") from error
        raise
    return node


def _open(node: Node, settings: Settings, rebuild: bool) -> None:
    started = time.monotonic()
    node.settings = settings
    node.storage = storage = StorageLayout(settings.storage_dir)
    ensure_directory(storage.root)
    gid = None if settings.auth_group is None else group_id(settings.auth_group)
    warning = _open_metadata(node)
    known = _open_database_if_any(node)
    found = read_volume_id(storage)
    _compare_volumes(storage, known, found, rebuild)
    require_writable(storage.root)
    storage.tmp.mkdir(mode=0o755, exist_ok=True)
    node._owner = VolumeOwner(storage)
    node._owner.acquire()
    node._stack.callback(node._owner.release)
    migration = _open_database(node) if known is None else MigrationReport(None, "", None)
    node.facts = Facts(node.database)
    node.volume_id = found or write_volume_id(storage)
    node.identity = open_identity(storage, settings.node_key_file, _label(settings.label), settings.owner)
    node.disk = Disk(deadline=settings.disk_deadline)
    node._stack.callback(node.disk.close)
    replayed = _open_services(node, gid, rebuild)
    if known is None and not rebuild:
        node.facts.set_sync(VOLUME_ID, node.volume_id)
    node.report = _self_check(node, warning, migration, replayed, time.monotonic() - started)


def _open_metadata(node: Node) -> str | None:
    settings, storage = node.settings, node.storage
    root = settings.metadata_dir or storage.default_metadata
    node.metadata = MetadataLayout(root)
    warning = filesystem.require_local(root if root.exists() else root.parent, settings.allow_network_metadata)
    ensure_directory(root, mode=0o700)
    require_writable(root)
    lock = ProcessLock(node.metadata.lock)
    lock.acquire()
    node._stack.callback(lock.release)
    return warning


def _open_database_if_any(node: Node) -> str | None:
    """The volume id that an existing database knows. None: there is no database, or one that knows no volume."""
    if not node.metadata.database.exists():
        return None
    _open_database(node)
    known = Facts(node.database).get_sync(VOLUME_ID)
    if known is None:
        node.database.close()
    return known


def _open_database(node: Node) -> MigrationReport:
    report = migrate(node.metadata.database, backup_dir=node.metadata.backups)
    node.database = Database.open(node.metadata.database)
    node._stack.callback(node.database.close)
    return report


def _compare_volumes(storage: StorageLayout, known: str | None, found: str | None, rebuild: bool) -> None:
    if known is not None and known != found:
        raise StartRefused(
            f"{storage.root} holds {f'the volume {found}' if found else 'no kachery volume'}, "
            f"the database belongs to the volume {known}",
            hint="Mount the right volume. Nothing was written",
        )
    # An empty volume that the database does not know was left by a first start that was cut short.
    if known is None and found is not None and not rebuild and (storage.blobs.exists() or storage.feeds_log.exists()):
        raise StartRefused(
            f"{storage.root} holds the volume {found}, the database knows nothing of it",
            hint="Restore the database, or run `kachery-lab reindex` to build it from the volume",
        )


def _label(label: str | None) -> str:
    if label is not None:
        return label
    try:
        return NodeLabel.parse(socket.gethostname().partition(".")[0][:20])
    except InvalidInput:
        return "node"


def _open_services(node: Node, gid: int | None, rebuild: bool) -> dict[str, int]:
    settings, storage, database, disk = node.settings, node.storage, node.database, node.disk
    events = node.events
    node.stats = Stats()
    node.store = LocalBlobStore(storage, disk, node.volume_id)
    policy = LinkPolicy(
        roots=settings.link_roots,
        path_map=settings.path_map,
        forbidden=[storage.root, node.metadata.root],
        own_files_only=settings.auth_group is None,
    )
    node.links = LinkService(node.store, database, policy)
    node.blobs = BlobService(node.store, database, node.links, min_free=settings.min_free)
    node.files = FileService(node.blobs, node.links, settings.advertised)
    node.data = AccessData(database, disk, storage.access)
    node.data.load()
    if rebuild:
        # Before the logs are read: references belong to channels.
        node.data.restore()
    records = _open_log(node, RECORDS_LOG, storage.records_log)
    feeds = _open_log(node, FEEDS_LOG, storage.feeds_log)
    # Keys before feeds: a deletion in the feeds log takes the key that the records log made.
    replayed = {
        RECORDS_LOG: replay(RECORDS_LOG, records, database, mutables.apply_record, mutables.clear_records),
        FEEDS_LOG: replay(FEEDS_LOG, feeds, database, feed_index.apply_record, feed_index.clear_feeds_log),
    }
    records_log = LogWriter(RECORDS_LOG, records, database, disk)
    feeds_log = LogWriter(FEEDS_LOG, feeds, database, disk)
    node._logs = [feeds_log, records_log]
    node.mutables = MutableService(database, records_log)
    node.audit = AuditService(database, settings.audit_days)
    node.roles = RoleService(node.data)
    node.buckets = BucketService(node.data, node.roles, database, records_log, node.blobs)
    signer = Signer(derive_key(node.identity.key, "kachery-lab/tickets/1"))
    node.uploads = UploadService(node.data, node.roles, signer, node.blobs, node.buckets)
    node.users = UserService(node.data, node.audit)
    node.nodes = NodeService(node.data, node.audit)
    node.channels = ChannelService(node.data, node.audit, node.buckets, node.identity.key)
    node.authorizations = AuthorizationService(node.data, node.audit, node.channels, node.nodes, node.identity.key)
    node.feeds = FeedService(database, feeds_log, records_log, events, node.identity.key)
    node.watches = WatchService(database, events)
    node.tokens = TokenService(database, node.data)
    node.tokens.load()
    node.access = AccessService(node.tokens, disk, storage.client_auth, gid, node.store.check_volume)
    return replayed


def _open_log(node: Node, name: str, directory: Path) -> Journal:
    known = node.facts.get_sync(name)
    journal = Journal(directory)
    journal.open(Position.parse(known) if known else START)
    node._stack.callback(journal.close)
    return journal


def _self_check(
    node: Node, warning: str | None, migration: MigrationReport, replayed: dict[str, int], seconds: float
) -> dict[str, Any]:
    """What was checked and found at start, for one line of the log."""
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "sqlite": sqlite3.sqlite_version,
        "node_id": node.identity.node_id,
        "label": node.identity.label,
        "volume": node.volume_id,
        "storage": str(node.storage.root),
        "storage_file_system": filesystem.file_system_of(node.storage.root)[0],
        "storage_free_bytes": node.store.free_bytes(),
        "metadata": str(node.metadata.root),
        "metadata_file_system": filesystem.file_system_of(node.metadata.root)[0],
        "uid": os.getuid(),
        "gid": os.getgid(),
        "clock": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "migrated_from": migration.from_revision if migration.to_revision else None,
        "replayed": replayed,
        "warning": warning,
        "seconds": round(seconds, 3),
    }


Work = Callable[[Node], Coroutine[Any, Any, Any]]


async def with_node(settings: Settings, work: Work, *, rebuild: bool = False) -> Any:
    """Run `work` on a node that no server runs. Raises StartRefused, naming the server that does."""
    node = await asyncio.to_thread(open_node, settings, rebuild=rebuild)
    try:
        return await work(node)
    finally:
        await node.close()
