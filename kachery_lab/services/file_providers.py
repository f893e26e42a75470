"""Providing files that nodes of a channel ask for (spec/pubsub-bands.md section 4).

A node answers only for what its membership offers in that channel and what it has verified. There is no failure status
on the wire: whatever goes wrong here is in the log, and the asker hears nothing, or nothing more.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from kachery_lab.core.ids import FileKey, NodeId, Sha1
from kachery_lab.core.rates import Allowance
from kachery_lab.errors import Gone, InvalidInput, KacheryLabError, NotFound, Unavailable
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.content import Content
from kachery_lab.services.files import FileService
from kachery_lab.services.origins import LOCAL, OriginService

LOOKS_AT_ONCE = 4
UPLOADS_AT_ONCE = 6
UPLOADS_PER_PEER = 5
JOBS = 10_000
"""Requests that are worked on or wait, of all peers."""
JOBS_PER_PEER = 500
REQUESTS_PER_SECOND = 100.0
"""One peer's requests that are looked at for long; after REQUESTS_AT_ONCE of them the others wait."""
REQUESTS_AT_ONCE = 300.0
STARTED_AFTER = 0.5
"""Seconds after which an upload is announced before it is finished; a quick one needs no `started`."""
LINGER = 0.2
"""Seconds in which all who ask for the same again get one answer."""
PUT_SECONDS, SLOWEST = 60.0, 100_000.0
"""An upload may take so many seconds, and one more for each so many bytes."""
_PEERS = 10_000

_Place = tuple[ChannelBands, str, str]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """What this node may offer in a channel. `origin` is what blobs that came through the channel carry; with
    `adds` it also puts there what was not uploaded."""

    origin: str
    adds: bool


@dataclass(slots=True)
class Found:
    """Bytes `start` to `end` of an open content that is verified as a whole. `part`: they are a range of it that has to
    be verified on its own."""

    content: Content
    start: int
    end: int
    part: bool = False


class Shelf(Protocol):
    """Where a provider puts what is asked for: the buckets of one hub's channels."""

    async def terms(self, channel: str, asker: NodeId) -> Terms | None:
        """What this node may offer the asker there now; None without the roles. Raises Unavailable."""

    async def shows(self, channel: str, sha1: Sha1) -> bool:
        """Whether the bucket has a file."""

    async def put(self, channel: str, key: FileKey, found: Found) -> None:
        """Make verified bytes the file of this key there, on demand; durable on return. Nothing is moved when it is
        there already. Raises Forbidden, NotFound (it was deleted there), TooLarge, StorageFull, ContentMismatch,
        Unavailable."""


@dataclass(slots=True)
class _Peer:
    """What one node has asked for lately."""

    jobs: int = 0
    allowance: Allowance = field(default_factory=lambda: Allowance(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE))
    # Of the peers that wait for a look each has one in the line, so that nobody waits behind all of another's.
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS_PER_PEER))


@dataclass(slots=True)
class _Job:
    """A request for one file key in one channel. `again`: asked for since the last answer."""

    message: BandMessage
    bands: ChannelBands
    shelf: Shelf
    key: FileKey
    again: bool = False


class FileProviders:
    """Answers `requestFile` in the channels of every hub that has a shelf here."""

    def __init__(
        self, handlers: BandHandlers, blobs: BlobService, files: FileService, origins: OriginService, own_node: NodeId
    ) -> None:
        self._blobs = blobs
        self._files = files
        self._origins = origins
        self._own_node = own_node
        self._shelves: dict[ChannelBands, Shelf] = {}
        self._peers: OrderedDict[NodeId, _Peer] = OrderedDict()
        self._jobs: dict[_Place, _Job] = {}
        self._puts: dict[_Place, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes = RateLimited()
        self._looks = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)
        handlers.on("requestFile", self._requested)

    def serve(self, bands: ChannelBands, shelf: Shelf) -> None:
        """Answer what comes in on these bands from this shelf."""
        self._shelves[bands] = shelf

    async def close(self) -> None:
        """End all uploads. Their askers hear nothing."""
        tasks = [*self._tasks, *self._puts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- a request comes in --------------------------------------------------------------------------------------

    async def _requested(self, message: BandMessage, bands: ChannelBands) -> None:
        shelf = self._shelves.get(bands)
        # This node looked at its own files before it asked the others.
        if shelf is None or message.sender == self._own_node:
            return
        try:
            key = FileKey.parse(message.body["fileKey"])
        except InvalidInput as error:
            self._notes.note("file_request_malformed", node=message.sender, reason=error.message)
            return
        if key.chunk_of is not None and key.chunk_of.file_key.chunk_of is not None:
            self._notes.note("file_request_malformed", node=message.sender, reason="a chunk of a chunk")
            return
        place = (bands, message.channel, key.hash())
        running = self._jobs.get(place)
        if running is not None:
            running.again = True
            return
        peer = self._peer(message.sender)
        if len(self._jobs) >= JOBS or peer.jobs >= JOBS_PER_PEER:
            self._notes.note("file_request_dropped", channel=message.channel, node=message.sender)
            return
        job = self._jobs[place] = _Job(message, bands, shelf, key)
        peer.jobs += 1
        task = asyncio.create_task(self._work(place, job, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, place: _Place, job: _Job, peer: _Peer) -> None:
        try:
            await self._serve(job, peer)
        except KacheryLabError as error:
            self._notes.note(
                "file_not_provided",
                channel=job.message.channel,
                node=job.message.sender,
                sha1=job.key.sha1,
                code=error.code,
                reason=error.message,
            )
        finally:
            # Here, not when the task is gone: who asks a moment later must not be taken for answered.
            del self._jobs[place]
            peer.jobs -= 1

    def _peer(self, node: NodeId) -> _Peer:
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = _Peer()
        self._peers.move_to_end(node)
        if len(self._peers) > _PEERS:
            self._peers.popitem(last=False)
        return peer

    async def _serve(self, job: _Job, peer: _Peer) -> None:
        """Look, provide, answer; then answer those who asked again meanwhile, together."""
        async with peer.turn:
            await asyncio.sleep(peer.allowance.take(1, time.monotonic()))
            async with self._looks:
                answer = await self._look(job)
        if answer == "absent":
            return
        if answer == "put":
            put = asyncio.ensure_future(asyncio.shield(self._put_once(job, peer)))
            if not (await asyncio.wait({put}, timeout=STARTED_AFTER))[0]:
                await self._say(job, "started")
            await put
        job.again = True
        while job.again:
            job.again = False
            await self._say(job, "finished")
            await asyncio.sleep(LINGER)

    async def _say(self, job: _Job, status: str) -> None:
        body = {"type": "uploadFileStatus", "fileKey": job.message.body["fileKey"], "status": status}
        await job.bands.publish(job.message.channel, body)

    # -- what is offered -----------------------------------------------------------------------------------------

    async def _look(self, job: _Job) -> Literal["absent", "shown", "put"]:
        """`put`; or `shown`: it was uploaded, which is all that is offered; or `absent`: not here, or not offered."""
        terms = await job.shelf.terms(job.message.channel, job.message.sender)
        if terms is None:
            return "absent"
        found = await self._source(job.key, terms)
        if found is None:
            return "absent"
        found.content.close()
        if terms.adds:
            return "put"
        return "shown" if await job.shelf.shows(job.message.channel, job.key.sha1) else "absent"

    async def _source(self, key: FileKey, terms: Terms) -> Found | None:
        """Where the file is here; None when it is not, or came from elsewhere. The caller closes the content."""
        content = await self._offered(key.sha1, terms)
        if content is not None:
            return Found(content, 0, content.size)
        chunk = key.chunk_of
        parent = None if chunk is None else await self._offered(chunk.file_key.sha1, terms)
        if chunk is None or parent is None:
            return None
        if chunk.end_byte > parent.size:
            parent.close()
            return None
        return Found(parent, chunk.start_byte, chunk.end_byte, part=True)

    async def _offered(self, sha1: Sha1, terms: Terms) -> Content | None:
        try:
            content = await self._blobs.open(sha1)
        except NotFound:
            return None
        except Gone as error:
            self._notes.note("requested_file_damaged", sha1=sha1, code=error.code, reason=error.message)
            return None
        try:
            origins = await self._origins.of(sha1)
        except BaseException:
            content.close()
            raise
        if LOCAL in origins or terms.origin in origins:
            return content
        content.close()
        return None

    # -- providing -----------------------------------------------------------------------------------------------

    def _put_once(self, job: _Job, peer: _Peer) -> asyncio.Task[None]:
        """The one upload of this object to this channel that runs, or begins now."""
        place = (job.bands, job.message.channel, str(job.key.sha1))
        task = self._puts.get(place)
        if task is None:
            task = self._puts[place] = asyncio.create_task(self._put(job, peer))
            task.add_done_callback(lambda done: self._ended(place, done))
        return task

    def _ended(self, place: _Place, task: asyncio.Task[None]) -> None:
        del self._puts[place]
        # Those who waited for it may be gone.
        _ = task.cancelled() or task.exception()

    async def _put(self, job: _Job, peer: _Peer) -> None:
        async with peer.gate, self._slots:
            # While it waited, roles and offers may have changed, and so may the file.
            terms = await job.shelf.terms(job.message.channel, job.message.sender)
            found = None if terms is None or not terms.adds else await self._source(job.key, terms)
            if found is None:
                raise NotFound("it is no longer here, or no longer offered")
            try:
                if found.part:
                    await self._files.verify_range(found.content, found.start, found.end, job.key.sha1)
                async with asyncio.timeout(PUT_SECONDS + (found.end - found.start) / SLOWEST):
                    await job.shelf.put(job.message.channel, job.key, found)
            except TimeoutError:
                raise Unavailable("the upload is too slow") from None
            finally:
                found.content.close()
        log.info(
            "a file was provided",
            channel=job.message.channel,
            node=job.message.sender,
            sha1=job.key.sha1,
            size=found.end - found.start,
        )
