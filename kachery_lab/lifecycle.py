"""A running node: its services, its background work, and how it ends. Built by `kachery_lab.node`."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import structlog

from kachery_lab.blobs.disk import TROUBLE_LIMIT, Disk
from kachery_lab.blobs.durable import write_file
from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.blobs.volume import HEARTBEAT, VolumeOwner, read_volume_id, require_writable, sweep_leftovers
from kachery_lab.core.ids import NodeLabel, UserName
from kachery_lab.core.tickets import Signer
from kachery_lab.db.engine import Database
from kachery_lab.errors import KacheryLabError, StartRefused
from kachery_lab.services import feed_index, mutables
from kachery_lab.services.access import AccessService
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.authorizations import AuthorizationService
from kachery_lab.services.band_tokens import BandTokenService
from kachery_lab.services.bands import BandHandlers, Dispatcher, JoinedBands, OwnBands
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.broker import HubBands
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.certificates import CertificateService
from kachery_lab.services.channel_files import ChannelFiles
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.client_requests import ClientRequests
from kachery_lab.services.clients import ClientService
from kachery_lab.services.clock import SteadyClock
from kachery_lab.services.events import Events
from kachery_lab.services.facts import Facts
from kachery_lab.services.federation import JoinedHub
from kachery_lab.services.feed_providers import FeedProviders
from kachery_lab.services.feed_requests import FeedRequests
from kachery_lab.services.feeds import FeedService
from kachery_lab.services.file_providers import FileProviders
from kachery_lab.services.file_requests import FileRequests
from kachery_lab.services.files import FileService
from kachery_lab.services.identity import Identity
from kachery_lab.services.links import LinkService
from kachery_lab.services.logs import LogWriter
from kachery_lab.services.mutables import OTHER_CODES, MutableService
from kachery_lab.services.node_requests import NodeRequests
from kachery_lab.services.nodes import NodeService
from kachery_lab.services.offers import ChannelFinder
from kachery_lab.services.origins import OriginService
from kachery_lab.services.pending import PendingUploads
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.profiles import ProfileService
from kachery_lab.services.quotas import QuotaService
from kachery_lab.services.received_feeds import ReceivedFeeds
from kachery_lab.services.resource_providers import ResourceProviders
from kachery_lab.services.resources import ResourceService
from kachery_lab.services.shares import Shares
from kachery_lab.services.stats import Stats
from kachery_lab.services.subfeeds import REQUESTS_KEPT_MS
from kachery_lab.services.subjects import RoleService
from kachery_lab.services.task_functions import TaskFunctionService
from kachery_lab.services.task_leases import TaskLeaseService
from kachery_lab.services.task_registrations import TaskRegistrations
from kachery_lab.services.task_work import TaskWork
from kachery_lab.services.tasks import TaskService
from kachery_lab.services.tokens import ADMIN, TokenService, new_secret
from kachery_lab.services.upload_search import UploadSearch
from kachery_lab.services.uploads import UploadService
from kachery_lab.services.usage import UsageService
from kachery_lab.services.users import UserService
from kachery_lab.services.watches import WatchService
from kachery_lab.settings import Settings

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient

PRUNE_SECONDS = 600.0
VOLUME_ID = "volume_id"

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
    feeds_log: LogWriter
    records_log: LogWriter
    appends: Shares
    feed_requests: FeedRequests
    feed_providers: FeedProviders
    watches: WatchService
    received_feeds: ReceivedFeeds
    mutables: MutableService
    data: AccessData
    audit: AuditService
    roles: RoleService
    users: UserService
    nodes: NodeService
    clients: ClientService
    client_requests: ClientRequests
    channels: ChannelService
    authorizations: AuthorizationService
    buckets: BucketService
    signer: Signer
    uploads: UploadService
    pending: PendingUploads
    channel_files: ChannelFiles
    quotas: QuotaService
    usage: UsageService
    profiles: ProfileService
    search: UploadSearch
    certificates: CertificateService
    band_tokens: BandTokenService
    band_handlers: BandHandlers
    dispatcher: Dispatcher
    hub_bands: HubBands
    own_bands: OwnBands
    joined_bands: JoinedBands | None
    offers: ChannelFinder
    file_requests: FileRequests
    file_providers: FileProviders
    task_functions: TaskFunctionService
    task_leases: TaskLeaseService
    task_work: TaskWork
    task_registrations: TaskRegistrations
    tasks: TaskService
    origins: OriginService
    resources: ResourceService
    resource_providers: ResourceProviders
    node_requests: NodeRequests
    hub: HubClient | None
    joined: JoinedHub | None
    stats: Stats
    report: dict[str, Any]
    volume_id: str

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._clock = SteadyClock()
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
        swept = await self.disk.run(self.store.sweep) + await self.disk.run(sweep_leftovers, self.storage.root)
        swept += await asyncio.to_thread(sweep_leftovers, self.metadata.root)
        if swept:
            log.info("temporary files of an earlier run were removed", files=swept)
        work = [self.access.keep_rotating(), self._heartbeat(), self._prune(), self.usage.keep_flushing()]
        work.append(self.own_bands.run())
        work += [self.task_leases.keep_ending(), self.task_work.keep_leases(), self.tasks.keep_checking()]
        if self.joined is not None:
            work.append(self.joined.keep_reporting())
        if self.joined_bands is not None:
            work.append(self.joined_bands.run())
        self._tasks += [asyncio.create_task(one) for one in work]

    async def _first_admin_token(self) -> None:
        given = self.settings.admin_token
        path = self.metadata.admin_token
        if given is not None:
            await self.tokens.ensure_admin(given.get_secret_value())
        elif not any("admin" in token.scopes for token in self.tokens.list(OPERATOR)):
            secret = new_secret()
            await asyncio.to_thread(write_file, path, f"{secret}\n".encode(), 0o600)
            await self.tokens.ensure_admin(secret)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            self._clock.look()
            try:
                await self.disk.run(self._owner.beat)
            except KacheryLabError as error:
                log.warning("the volume's owner file was not renewed", code=error.code)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            if not self._clock.steady:
                continue
            before = int(time.time() * 1000) - REQUESTS_KEPT_MS
            try:
                await self.database.write(lambda conn, at=before: feed_index.forget_requests(conn, at))  # type: ignore[misc]
                await self.audit.prune()
                await self.buckets.expire()
                await self.buckets.forget_deletions(self.settings.restore_days)
                await self.pending.purge()
                await self.client_requests.prune()
                await self.task_leases.prune()
            except KacheryLabError as error:
                log.warning("what is past its time was not removed", code=error.code)

    def stop(self) -> None:
        """Ask the server to stop; long polls answer at once, bands and providers are closed."""
        self.stopping.set()
        self.hub_bands.close_all()
        self.resource_providers.close_all()
        self.events.close()

    async def close(self) -> None:
        """End background work, finish what was handed in, free everything. Called once, from the loop of `start`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.dispatcher.close()
        await self.file_requests.close()
        await self.file_providers.close()
        await self.feed_requests.close()
        await self.feed_providers.close()
        await self.resources.close()
        for writer in (self.feeds_log, self.records_log):
            await writer.drain()
        await self.usage.close()
        await self.data.flush()
        if self.hub is not None:
            await self.hub.close()
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
