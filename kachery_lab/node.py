"""Opening a node: its volume, its database, then its services; closed in reverse. No globals."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kachery_lab import __version__
from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.blobs.volume import (
    ProcessLock,
    VolumeOwner,
    ensure_directory,
    group_id,
    read_volume_id,
    require_access,
    require_writable,
    write_volume_id,
)
from kachery_lab.core.ids import NodeLabel
from kachery_lab.db import filesystem
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import MigrationReport, migrate
from kachery_lab.errors import InvalidInput, StartRefused
from kachery_lab.lifecycle import VOLUME_ID
from kachery_lab.lifecycle import Node as Node
from kachery_lab.services.facts import Facts
from kachery_lab.services.identity import open_identity
from kachery_lab.settings import Settings
from kachery_lab.wiring import open_services


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
    if known is None and not rebuild:
        # Before the logs are made: a first start that is killed there must not look like a volume without its database.
        node.facts.set_sync(VOLUME_ID, node.volume_id)
    node.disk = Disk(deadline=settings.disk_deadline)
    node._stack.callback(node.disk.close)
    replayed = open_services(node, gid, rebuild)
    node.report = _self_check(node, warning, migration, replayed, time.monotonic() - started)


def _open_metadata(node: Node) -> str | None:
    settings, storage = node.settings, node.storage
    root = settings.metadata_dir or storage.default_metadata
    node.metadata = MetadataLayout(root)
    warning = filesystem.require_local(root if root.exists() else root.parent, settings.allow_network_metadata)
    if storage.root in root.parents:
        # Else the message would be about the metadata, and the next one about the storage.
        require_access(storage.root)
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
        "public_url": node.settings.public_url,
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
