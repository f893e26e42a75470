"""One running node: builds the services in order, keeps their background work, closes them in reverse. No globals."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from kachery_lab import __version__
from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.journal import START, Journal, Position
from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.blobs.links import LinkPolicy
from kachery_lab.blobs.local import LocalBlobStore
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
from kachery_lab.client.feeds import FeedObjects
from kachery_lab.client.hub import HubClient
from kachery_lab.client.tasks import TasksClient
from kachery_lab.core.ids import NodeLabel
from kachery_lab.core.keys import derive_key
from kachery_lab.core.rates import Rates
from kachery_lab.core.tickets import Signer
from kachery_lab.db import filesystem
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import MigrationReport, migrate
from kachery_lab.errors import InvalidInput, StartRefused
from kachery_lab.lifecycle import VOLUME_ID
from kachery_lab.lifecycle import Node as Node
from kachery_lab.services import feed_index, mutables, received_index
from kachery_lab.services.access import AccessService
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.authorizations import AuthorizationService
from kachery_lab.services.band_tokens import BandTokenService
from kachery_lab.services.bands import BandHandlers, Dispatcher, JoinedBands, OwnBands
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.broker import HubBands
from kachery_lab.services.bucket_feeds import BucketFeeds
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.certificates import CertificateService
from kachery_lab.services.channel_files import ChannelFiles
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.client_requests import ClientRequests
from kachery_lab.services.clients import ClientService
from kachery_lab.services.facts import Facts
from kachery_lab.services.federation import JoinedHub
from kachery_lab.services.feed_channels import (
    FeedChannelFinder,
    FeedChannels,
    JoinedFeedChannels,
    OwnFeedChannels,
)
from kachery_lab.services.feed_providers import FeedProviders
from kachery_lab.services.feed_requests import FeedRequests
from kachery_lab.services.feeds import FeedService
from kachery_lab.services.file_providers import FileProviders
from kachery_lab.services.file_requests import FileRequests
from kachery_lab.services.files import FileService
from kachery_lab.services.hub_tasks import JoinedHubTasks, OwnHubTasks, TaskHubs
from kachery_lab.services.identity import open_identity
from kachery_lab.services.links import LinkService
from kachery_lab.services.logs import LogWriter, replay
from kachery_lab.services.mutables import MutableService
from kachery_lab.services.node_requests import NodeRequests
from kachery_lab.services.nodes import NodeService
from kachery_lab.services.offers import ChannelFinder, OwnHub
from kachery_lab.services.origins import OriginService
from kachery_lab.services.pending import PendingUploads
from kachery_lab.services.profiles import ProfileService
from kachery_lab.services.quotas import QuotaService
from kachery_lab.services.received_feeds import ReceivedFeeds
from kachery_lab.services.resources import ResourceService
from kachery_lab.services.shares import Shares
from kachery_lab.services.shelves import JoinedShelf, OwnShelf
from kachery_lab.services.stats import Stats
from kachery_lab.services.subjects import RoleService
from kachery_lab.services.task_functions import TaskFunctionService
from kachery_lab.services.task_leases import TaskLeaseService
from kachery_lab.services.task_registrations import TaskRegistrations
from kachery_lab.services.task_work import TaskWork
from kachery_lab.services.tasks import TaskService
from kachery_lab.services.tokens import TokenService
from kachery_lab.services.upload_search import UploadSearch
from kachery_lab.services.uploads import UploadService
from kachery_lab.services.usage import UsageService
from kachery_lab.services.users import UserService
from kachery_lab.services.watches import WatchService
from kachery_lab.settings import Settings, secret_files

FEEDS_LOG = "feeds_log"
RECORDS_LOG = "records_log"
RESOURCE_THREADS = 4
TICKETS_AT_ONCE = 100
"""Seconds' worth of upload URLs that a caller may ask for at once: all messages of a long subfeed come together."""

log = structlog.get_logger(__name__)


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
    replayed = _open_services(node, gid, rebuild)
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


def _open_services(node: Node, gid: int | None, rebuild: bool) -> dict[str, int]:
    settings, storage, database, disk = node.settings, node.storage, node.database, node.disk
    events = node.events
    node.stats = Stats()
    node.store = LocalBlobStore(storage, disk, node.volume_id)
    policy = LinkPolicy(
        roots=settings.link_roots,
        path_map=settings.path_map,
        forbidden=[
            *(storage.root, storage.private_key, storage.client_auth),
            *(node.metadata.root, node.metadata.admin_token, node.metadata.database),
            *secret_files(settings),
        ],
        own_files_only=settings.auth_group is None,
    )
    node.links = LinkService(node.store, database, policy)
    node.blobs = BlobService(
        node.store, database, node.links, min_free=settings.min_free, max_uploads=settings.max_uploads
    )
    node.appends = Shares(settings.max_appends, "appends", "KACHERY_LAB_MAX_APPENDS")
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
        FEEDS_LOG: replay(FEEDS_LOG, feeds, database, received_index.apply_record, feed_index.clear_feeds_log),
    }
    records_log = LogWriter(RECORDS_LOG, records, database, disk)
    feeds_log = LogWriter(FEEDS_LOG, feeds, database, disk)
    node._logs = [feeds_log, records_log]
    node.mutables = MutableService(database, records_log)
    node.audit = AuditService(database, settings.audit_days)
    node.tokens = TokenService(database, node.data, node.audit)
    node.tokens.load()
    node.roles = RoleService(node.data, node.tokens.in_force)
    hub_id = node.identity.node_id
    node.watches = WatchService(database, events)
    node.received_feeds = ReceivedFeeds(database, feeds_log, events)
    bucket_feeds = BucketFeeds(node.data, node.received_feeds, node.watches, hub_id)
    node.buckets = BucketService(node.data, node.roles, database, records_log, node.blobs, bucket_feeds)
    signer = Signer(derive_key(node.identity.key, "kachery-lab/tickets/1"))
    node.origins = OriginService(database, records_log)
    node.blobs.origins = node.origins
    rates = Rates(settings.tickets_per_second, TICKETS_AT_ONCE * settings.tickets_per_second)
    pending = node.pending = PendingUploads(database, node.buckets.quotas)
    node.uploads = UploadService(
        *(node.data, node.roles, signer, node.blobs, node.buckets, node.origins, pending, bucket_feeds, hub_id, rates)
    )
    node.channel_files = ChannelFiles(
        node.data, node.roles, node.blobs, node.buckets, node.uploads, pending, node.origins, hub_id
    )
    node.usage = UsageService(database)
    node.quotas = QuotaService(database, node.data, node.audit)
    node.resources = _open_resources(node, policy)
    node.blobs.resources = node.channel_files.resources = node.resources
    node.node_requests = NodeRequests(node.data, hub_id)
    node.hub = HubClient(settings.hub_url, node.identity.key) if settings.hub_url else None
    node.users = UserService(node.data, node.audit)
    node.nodes = NodeService(node.data, node.audit, node.identity.node_id)
    node.clients = ClientService(node.data, node.audit)
    node.client_requests = ClientRequests(database)
    node.channels = ChannelService(node.data, node.audit, node.buckets, node.identity.key)
    node.search = UploadSearch(database, node.channels, node.usage)
    node.authorizations = AuthorizationService(node.data, node.audit, node.channels, node.nodes, node.identity.key)
    node.certificates = CertificateService(node.data, node.channels, node.uploads)
    node.band_tokens = BandTokenService(signer, node.roles)
    node.band_handlers = BandHandlers()
    node.dispatcher = Dispatcher(node.band_handlers)
    node.hub_bands = HubBands(node.data, node.audit)
    node.own_bands = OwnBands(node.hub_bands, node.identity.key, node.dispatcher, node.band_handlers)
    node.file_requests = FileRequests(node.band_handlers)
    node.file_providers = FileProviders(node.band_handlers, node.blobs, node.files, node.origins, hub_id)
    own_hub = OwnHub(
        *(node.data, node.roles, node.audit, node.blobs, node.buckets, node.uploads, hub_id),
        bands=node.own_bands,
        requests=node.file_requests,
    )
    own_shelf = OwnShelf(node.data, node.roles, node.buckets, node.uploads, node.files, hub_id)
    node.file_providers.serve(node.own_bands, own_shelf)
    node.offers = ChannelFinder(own_hub)
    node.joined = node.joined_bands = None
    if node.hub is not None:
        node.joined_bands = JoinedBands(node.hub, node.identity.key, node.dispatcher, node.band_handlers)
        node.joined = JoinedHub(
            *(node.hub, node.blobs, node.origins, node.identity, node.stats, node.audit),
            bands=node.joined_bands,
            requests=node.file_requests,
        )
        node.file_providers.serve(node.joined_bands, JoinedShelf(node.hub, node.joined, node.stats))
        node.offers.prefer(node.joined)
    node.feeds = FeedService(database, feeds_log, records_log, events, node.identity.key)
    node.profiles = ProfileService(database, node.data, node.audit, node.tokens)
    _open_feed_channels(node, bucket_feeds)
    _open_tasks(node)
    node.access = AccessService(node.tokens, disk, storage.client_auth, gid, node.store.check_volume)
    return replayed


def _open_resources(node: Node, policy: LinkPolicy) -> ResourceService:
    """The directories that zones offer on demand. Raises StartRefused for one that holds files of the server."""
    for zone, directories in node.settings.resources.items():
        for directory in directories:
            for own in (node.storage.root, node.metadata.root):
                here, there = Path(os.path.realpath(directory)), Path(os.path.realpath(own))
                if here == there or here in there.parents or there in here.parents:
                    raise StartRefused(
                        f"the resource directory {directory} of the zone {zone} and {own} are not apart",
                        hint="KACHERY_LAB_RESOURCE_DIRS names directories of other programs only",
                    )
    # A pool of its own: a resource mount that hangs must not stop the storage.
    disk = Disk(RESOURCE_THREADS, node.settings.disk_deadline)
    node._stack.callback(disk.close)
    rules = (node.roles, node.blobs, node.buckets, node.origins, node.identity.node_id)
    return ResourceService(node.settings.resources, policy, disk, node.database, *rules)


def _open_feed_channels(node: Node, bucket_feeds: BucketFeeds) -> None:
    """Feeds between nodes: following those of others, providing those that are here."""
    own_node = node.identity.node_id
    sides: list[FeedChannels] = []
    if node.joined is not None and node.hub is not None:
        objects = FeedObjects(node.hub)
        sides.append(JoinedFeedChannels(node.joined, objects, node.watches, node.identity, node.stats, node.audit))
    sides.append(OwnFeedChannels(node.data, node.roles, node.audit, bucket_feeds, own_node, node.own_bands))
    finder = FeedChannelFinder(node.offers, *sides)
    handlers, received = node.band_handlers, node.received_feeds
    node.feed_requests = FeedRequests(finder, received, node.feeds, node.watches, handlers, own_node)
    node.feed_providers = FeedProviders(finder, received, node.watches, node.events, handlers, own_node)


def _open_tasks(node: Node) -> None:
    """Tasks: leases of this hub's own channels, backends and requesters of this node."""
    own_node, database = node.identity.node_id, node.database
    node.task_functions = TaskFunctionService(node.data, node.roles, node.audit, node.channels)
    node.task_leases = TaskLeaseService(
        node.data, node.roles, node.task_functions, database, node.settings.task_lease_seconds
    )
    node.task_leases.load()
    node.uploads.task_leases = node.task_leases
    hubs = TaskHubs(node.offers)
    own = OwnHubTasks(node.data, node.roles, node.audit, node.task_leases, node.uploads, own_node)
    hubs.add(node.own_bands, own, remote=False)
    if node.hub is not None and node.joined is not None and node.joined_bands is not None:
        hubs.add(node.joined_bands, JoinedHubTasks(node.joined, TasksClient(node.hub)), remote=True)
    node.task_work = TaskWork(hubs, database, own_node)
    node.task_registrations = TaskRegistrations(hubs, node.task_work, node.band_handlers, node.stopping)
    node.tasks = TaskService(hubs, node.band_handlers, node.events, own_node)


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
