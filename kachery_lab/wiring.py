"""Every service of a node, made in order and given what it works with. No rules: those are the services' own."""

from __future__ import annotations

import os
from pathlib import Path

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.journal import START, Journal, Position
from kachery_lab.blobs.links import LinkPolicy
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.client.feeds import FeedObjects
from kachery_lab.client.tasks import TasksClient
from kachery_lab.core.keys import derive_key
from kachery_lab.core.rates import Rates
from kachery_lab.core.tickets import Signer
from kachery_lab.errors import StartRefused
from kachery_lab.lifecycle import Node
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
from kachery_lab.services.resource_providers import ResourceProviders
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
from kachery_lab.settings import secret_files

FEEDS_LOG = "feeds_log"
RECORDS_LOG = "records_log"
RESOURCE_THREADS = 4
TICKETS_AT_ONCE = 100
"""Seconds' worth of upload URLs that a caller may ask for at once: all messages of a long subfeed come together."""


def open_services(node: Node, gid: int | None, rebuild: bool) -> dict[str, int]:
    """Blocking: every service of a node whose storage, database and identity are open; how many records of each log
    were applied. Raises StartRefused. `rebuild`: access data is taken from the volume first.
    """
    node.stats = Stats()
    policy = _open_store(node)
    node.data = AccessData(node.database, node.disk, node.storage.access)
    node.data.load()
    if rebuild:
        # Before the logs are read: references belong to channels.
        node.data.restore()
    replayed = _open_logs(node)
    _open_access(node, gid)
    bucket_feeds = _open_buckets(node)
    node.resources = _open_resources(node, policy)
    node.blobs.resources = node.channel_files.resources = node.resources
    _open_administration(node)
    _open_bands(node)
    _open_feed_channels(node, bucket_feeds)
    _open_tasks(node)
    return replayed


def _open_store(node: Node) -> LinkPolicy:
    """Blobs and links; the rules of what may be linked."""
    settings, storage, database = node.settings, node.storage, node.database
    node.store = LocalBlobStore(storage, node.disk, node.volume_id)
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
    node.files = FileService(node.blobs, node.links, settings.advertised)
    return policy


def _open_logs(node: Node) -> dict[str, int]:
    """Both logs, the index brought up to their ends, and what is written to them; how many records were applied."""
    database, storage = node.database, node.storage
    records = _open_log(node, RECORDS_LOG, storage.records_log)
    feeds = _open_log(node, FEEDS_LOG, storage.feeds_log)
    # Keys before feeds: a deletion in the feeds log takes the key that the records log made.
    replayed = {
        RECORDS_LOG: replay(RECORDS_LOG, records, database, mutables.apply_record, mutables.clear_records),
        FEEDS_LOG: replay(FEEDS_LOG, feeds, database, received_index.apply_record, feed_index.clear_feeds_log),
    }
    node.records_log = LogWriter(RECORDS_LOG, records, database, node.disk)
    node.feeds_log = LogWriter(FEEDS_LOG, feeds, database, node.disk)
    node.mutables = MutableService(database, node.records_log)
    node.origins = OriginService(database, node.records_log)
    node.blobs.origins = node.origins
    node.watches = WatchService(database, node.events)
    node.received_feeds = ReceivedFeeds(database, node.feeds_log, node.events)
    node.feeds = FeedService(database, node.feeds_log, node.records_log, node.events, node.identity.key)
    node.appends = Shares(node.settings.max_appends, "appends", "KACHERY_LAB_MAX_APPENDS")
    return replayed


def _open_access(node: Node, gid: int | None) -> None:
    """Who is who, and who may do what."""
    node.audit = AuditService(node.database, node.settings.audit_days)
    node.tokens = TokenService(node.database, node.data, node.audit)
    node.tokens.load()
    node.roles = RoleService(node.data, node.tokens.in_force)
    node.node_requests = NodeRequests(node.data, node.identity.node_id)
    node.client_requests = ClientRequests(node.database)
    node.access = AccessService(node.tokens, node.disk, node.storage.client_auth, gid, node.store.check_volume)


def _open_buckets(node: Node) -> BucketFeeds:
    """What lies in channels, and what goes in and out."""
    settings, database, hub_id = node.settings, node.database, node.identity.node_id
    bucket_feeds = BucketFeeds(node.data, node.received_feeds, node.watches, hub_id)
    node.buckets = BucketService(node.data, node.roles, database, node.records_log, node.blobs, bucket_feeds)
    node.signer = Signer(derive_key(node.identity.key, "kachery-lab/tickets/1"))
    rates = Rates(settings.tickets_per_second, TICKETS_AT_ONCE * settings.tickets_per_second)
    pending = node.pending = PendingUploads(database, node.data, node.buckets.quotas)
    pending.load()
    kept = (node.blobs, node.buckets, node.origins, pending, bucket_feeds)
    node.uploads = UploadService(node.data, node.roles, node.signer, *kept, hub_id, rates)
    node.channel_files = ChannelFiles(
        node.data, node.roles, node.blobs, node.buckets, node.uploads, pending, node.origins, hub_id
    )
    node.usage = UsageService(database)
    node.quotas = QuotaService(database, node.data, node.audit, pending.unwritten)
    return bucket_feeds


def _open_administration(node: Node) -> None:
    """Users, nodes, client keys, channels, and what is granted in them."""
    data, audit = node.data, node.audit
    node.users = UserService(data, audit)
    node.nodes = NodeService(data, audit, node.identity.node_id)
    node.clients = ClientService(data, audit)
    node.channels = ChannelService(data, audit, node.buckets, node.identity.key)
    node.search = UploadSearch(node.database, node.channels, node.usage)
    node.authorizations = AuthorizationService(data, audit, node.channels, node.nodes, node.identity.key)
    node.certificates = CertificateService(data, node.channels, node.uploads)
    node.profiles = ProfileService(node.database, data, audit, node.tokens)


def _open_bands(node: Node) -> None:
    """Bands of this hub and of the joined one, and files that are asked for and provided over them."""
    settings, own_node = node.settings, node.identity.node_id
    node.band_tokens = BandTokenService(node.signer, node.roles)
    node.band_handlers = BandHandlers()
    node.dispatcher = Dispatcher(node.band_handlers)
    node.hub_bands = HubBands(node.data, node.audit)
    node.own_bands = OwnBands(node.hub_bands, node.identity.key, node.dispatcher, node.band_handlers)
    node.file_requests = FileRequests(node.band_handlers)
    node.file_providers = FileProviders(node.band_handlers, node.blobs, node.files, node.origins, own_node)
    own_hub = OwnHub(
        *(node.data, node.roles, node.audit, node.blobs, node.buckets, node.uploads, own_node),
        bands=node.own_bands,
        requests=node.file_requests,
    )
    own_shelf = OwnShelf(node.data, node.roles, node.buckets, node.uploads, node.files, own_node)
    node.file_providers.serve(node.own_bands, own_shelf)
    node.offers = ChannelFinder(own_hub)
    node.hub = node.joined = node.joined_bands = None
    if settings.hub_url:
        # Only here: importing an HTTP client takes a tenth of the time of a start, and most nodes have no other hub.
        from kachery_lab.client.hub import HubClient

        node.hub = HubClient(settings.hub_url, node.identity.key)
        node.joined_bands = JoinedBands(node.hub, node.identity.key, node.dispatcher, node.band_handlers)
        node.joined = JoinedHub(
            *(node.hub, node.blobs, node.origins, node.identity, node.stats, node.audit),
            bands=node.joined_bands,
            requests=node.file_requests,
        )
        node.file_providers.serve(node.joined_bands, JoinedShelf(node.hub, node.joined, node.stats))
        node.offers.prefer(node.joined)


def _open_resources(node: Node, policy: LinkPolicy) -> ResourceService:
    """What zones offer on demand. Raises StartRefused for a directory that holds files of the server."""
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
    node.resource_providers = ResourceProviders(node.data, node.roles)
    rules = (node.roles, node.blobs, node.buckets, node.origins, node.identity.node_id, node.resource_providers)
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
