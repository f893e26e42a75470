"""Backends that ask this node for tasks, and requests that wait for one: who gets which.

A request goes to the registration that has waited longest among those with its backend id, function, kind and channel.
Before a backend gets it the hub must have leased it to this node; of all nodes that try, one succeeds. A registration
lasts as long as its call. Requests wait here for PENDING_SECONDS; requesters repeat them while nobody has taken them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from kachery_lab.core.ids import ChannelName, NodeId, TaskFunctionId
from kachery_lab.core.tasks import FINAL, TaskKind, TaskRequest, parse_kind, task_hash
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, KacheryLabError, NotFound, Unavailable
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.hub_tasks import TaskHub, TaskHubs
from kachery_lab.services.task_work import PollKey, TaskWork, new_lease_id

PENDING_SECONDS = 15.0
MAX_PENDING = 10_000
MAX_PENDING_BYTES = 64 << 20
MAX_WAITING = 2_000
"""Registrations at the same time."""
MAX_FUNCTIONS = 10_000
"""Functions times channels of one registration."""
AT_ONCE = 4
"""Tasks in one answer. A backend does one after the other; those that it has not begun could run elsewhere."""
HESITATION = 0.02
MAX_HESITATION = 0.4
"""A node whose backends have tasks already lets others claim first: seconds for each such task, and at most."""
MISMATCH_SECONDS = 1.0
"""A request whose function is offered here only with another type is refused when nobody takes it within this time."""
PROBE_SECONDS = 0.5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OfferedFunction:
    """A function that a backend offers in a channel."""

    channel: ChannelName
    function_id: TaskFunctionId
    kind: TaskKind


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task for a backend, leased to this node."""

    channel: str
    request: TaskRequest
    kwargs: dict[str, Any]
    lease_id: str


@dataclass(eq=False, slots=True)
class _Request:
    """A request that came over a band. `received` by the monotonic clock, `size` in bytes of its arguments."""

    hub: TaskHub
    channel: str
    request: TaskRequest
    kwargs: dict[str, Any]
    requester: NodeId
    received: float
    size: int
    lease_id: str

    @property
    def place(self) -> tuple[TaskHub, str, str]:
        return self.hub, self.channel, self.request.task_id

    @property
    def key(self) -> PollKey:
        return self.hub, self.channel, self.request.function_id, self.request.backend_id


@dataclass(eq=False, slots=True)
class _Registration:
    """One call of a backend that waits."""

    offered: dict[PollKey, TaskKind]
    taken: list[_Request] = field(default_factory=list)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def fits(self, request: _Request) -> bool:
        return len(self.taken) < AT_ONCE and self.offered.get(request.key) == request.request.kind

    def give(self, request: _Request) -> None:
        self.taken.append(request)
        self.woken.set()


class TaskRegistrations:
    """Matches requests with backends. `stopping` ends all waits."""

    def __init__(
        self,
        hubs: TaskHubs,
        work: TaskWork,
        handlers: BandHandlers,
        stopping: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hubs = hubs
        self._work = work
        self._stopping = stopping
        self._clock = clock
        self._waiting: dict[_Registration, None] = {}
        self._pending: OrderedDict[tuple[TaskHub, str, str], _Request] = OrderedDict()
        self._pending_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        handlers.on("requestTask", self.on_request)
        handlers.on("updateTaskStatus", self.on_status)
        handlers.on("probeTaskFunctions", self.on_probe)

    # -- backends ------------------------------------------------------------------------------------------------

    async def poll(
        self, functions: Sequence[OfferedFunction], backend_id: str | None, wait_ms: float
    ) -> list[Assignment]:
        """Tasks for a backend: those that wait, else the first that come within `wait_ms`; none after that.

        Channels in which this node provides no tasks are no error; nothing comes from there. Who does not hand the
        tasks on calls `TaskWork.give_back`. Cancelling it leaves the requests to others.
        """
        if len(functions) > MAX_FUNCTIONS:
            raise InvalidInput(f"taskFunctions: expected at most {MAX_FUNCTIONS}")
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} backends wait here already", retry_after=10)
        registration = _Registration(await self._offered(functions, backend_id))
        until = self._clock() + wait_ms / 1000
        self._waiting[registration] = None
        self._work.poll_begins(registration.offered)
        try:
            self._match_pending(registration)
            while not self._stopping.is_set():
                if registration.taken:
                    found = await self._claim_all(registration)
                    if found:
                        return found
                    continue
                if not await self._wait(registration, until - self._clock()):
                    break
            return []
        finally:
            del self._waiting[registration]
            self._work.poll_ends(registration.offered)
            for request in registration.taken:
                self._place(request)

    async def _offered(self, functions: Sequence[OfferedFunction], backend_id: str | None) -> dict[PollKey, TaskKind]:
        hubs = {channel: await self._hubs.find(channel) for channel in {one.channel for one in functions}}
        return {(hubs[one.channel], one.channel, one.function_id, backend_id): one.kind for one in functions}

    async def _wait(self, registration: _Registration, seconds: float) -> bool:
        """Whether there is something to do before the time is over."""
        waits = [asyncio.create_task(event.wait()) for event in (registration.woken, self._stopping)]
        try:
            done, _ = await asyncio.wait(waits, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        registration.woken.clear()
        return bool(done)

    async def _claim_all(self, registration: _Registration) -> list[Assignment]:
        """Claim what the registration was given; what this node has now."""
        requests, registration.taken = registration.taken, []
        work = asyncio.create_task(self._claim_each(requests))
        try:
            found = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(self._return_claimed)
            raise
        return [Assignment(one.channel, one.request, one.kwargs, one.lease_id) for one in found]

    async def _claim_each(self, requests: Sequence[_Request]) -> list[_Request]:
        open_tasks = max(self._work.open_tasks(request.key) for request in requests)
        if open_tasks:
            await asyncio.sleep(min(HESITATION * open_tasks, MAX_HESITATION))
        results = await asyncio.gather(*(self._claim(request) for request in requests))
        return [request for request, granted in zip(requests, results, strict=True) if granted]

    async def _claim(self, request: _Request) -> bool:
        try:
            return await self._work.claim(
                request.hub, request.channel, request.request, request.requester, request.lease_id, request.received
            )
        except Unavailable as error:
            # The requester announces it again; then it gets another lease id, for this one may have been granted.
            log.info("a task could not be claimed now", task=request.request.task_id, reason=error.message)
        except (Forbidden, NotFound, Conflict) as error:
            log.warning(
                "a task was not leased to this node",
                task=request.request.task_id,
                function=request.request.function_id,
                channel=request.channel,
                reason=error.message,
            )
        return False

    def _return_claimed(self, work: asyncio.Task[list[_Request]]) -> None:
        """The backend is gone; another one here may take what was claimed for it."""
        if not work.cancelled() and work.exception() is None:
            self._work.give_back(request.lease_id for request in work.result())

    # -- requests ------------------------------------------------------------------------------------------------

    async def on_request(self, message: BandMessage, bands: ChannelBands) -> None:
        """A `requestTask`."""
        body = message.body
        if not isinstance(body["taskKwargs"], dict):
            raise InvalidInput("taskKwargs: expected an object")
        function_id, kind = TaskFunctionId(body["taskFunctionId"]), parse_kind(body["taskFunctionType"])
        digest = task_hash(function_id, body["taskKwargs"])
        if kind == "pure-calculation" and body["taskId"] != digest:
            raise InvalidInput("taskId: expected the hash of function and arguments")
        hub = self._hubs.of(bands)
        known = self._pending.get((hub, message.channel, body["taskId"]))
        self._place(
            _Request(
                hub,
                message.channel,
                TaskRequest(body["taskId"], digest, function_id, kind, body.get("backendId")),
                body["taskKwargs"],
                message.sender,
                self._clock(),
                len(json.dumps(body["taskKwargs"])),
                new_lease_id() if known is None else known.lease_id,
            )
        )

    async def on_status(self, message: BandMessage, bands: ChannelBands) -> None:
        """An `updateTaskStatus`: what somebody has done, an older node perhaps, waits for nobody any more."""
        if message.body["status"] in FINAL:
            self._remove((self._hubs.of(bands), message.channel, message.body["taskId"]))

    def _place(self, request: _Request) -> None:
        """Give a request to a backend that waits, or keep it for one that comes."""
        self._drop_old()
        if self._clock() - request.received > PENDING_SECONDS:
            return
        for registration in self._waiting:
            if registration.fits(request):
                self._remove(request.place)
                registration.give(request)
                return
        self._remove(request.place)
        self._pending[request.place] = request
        self._pending_bytes += request.size
        if any(request.key in registration.offered for registration in self._waiting):
            asyncio.get_running_loop().call_later(MISMATCH_SECONDS, self._look_at_kind, request)

    def _remove(self, place: tuple[TaskHub, str, str]) -> None:
        known = self._pending.pop(place, None)
        if known is not None:
            self._pending_bytes -= known.size

    def _drop_old(self) -> None:
        now = self._clock()
        while self._pending:
            oldest = next(iter(self._pending.values()))
            full = len(self._pending) >= MAX_PENDING or self._pending_bytes > MAX_PENDING_BYTES
            if not full and now - oldest.received <= PENDING_SECONDS:
                break
            self._remove(oldest.place)

    def _match_pending(self, registration: _Registration) -> None:
        self._drop_old()
        for request in [one for one in self._pending.values() if one.key in registration.offered]:
            if registration.fits(request):
                self._remove(request.place)
                registration.give(request)

    # -- a wrong type --------------------------------------------------------------------------------------------

    def _look_at_kind(self, request: _Request) -> None:
        """A requester that gives a function another type than its backend would wait for ever."""
        offered = {r.offered[request.key] for r in self._waiting if request.key in r.offered}
        if self._pending.get(request.place) is request and offered and request.request.kind not in offered:
            self._remove(request.place)
            task = asyncio.create_task(self._refuse_kind(request, sorted(offered)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _refuse_kind(self, request: _Request, offered: list[TaskKind]) -> None:
        text = f"{request.request.function_id} is offered as {' and '.join(offered)}, not as {request.request.kind}"
        try:
            if await self._claim(request) and (held := self._work.held(request.lease_id)) is not None:
                await self._work.refuse(held, text)
        except KacheryLabError as error:
            log.info("a request of a wrong type was not refused", reason=error.message)

    # -- probes --------------------------------------------------------------------------------------------------

    async def on_probe(self, message: BandMessage, bands: ChannelBands) -> None:
        """A `probeTaskFunctions`: tell which of the functions some waiting backend offers; silence for none."""
        hub, wanted = self._hubs.of(bands), set(message.body["taskFunctionIds"])
        found = self._registered(hub, message.channel, wanted, message.body.get("backendId"))
        if len(found) < len(wanted):
            await asyncio.sleep(PROBE_SECONDS)
            found = self._registered(hub, message.channel, wanted, message.body.get("backendId"))
        if found:
            functions = [
                {"channelName": message.channel, "taskFunctionId": name, "taskFunctionType": kind}
                for name, kind in sorted(found.items())
            ]
            await bands.publish(
                message.channel, {"type": "reportRegisteredTaskFunctions", "registeredTaskFunctions": functions}
            )

    def _registered(self, hub: TaskHub, channel: str, wanted: set[str], backend_id: str | None) -> dict[str, TaskKind]:
        found: dict[str, TaskKind] = {}
        for name in wanted:
            for registration in self._waiting:
                kind = registration.offered.get((hub, channel, name, backend_id))
                if kind is not None:
                    found.setdefault(name, kind)
        return found
