"""Tasks that local clients want done: asked of the channel's hub, announced on its band, and waited for.

The hub's word on a final status counts. It is asked when the band brings one, and now and then while somebody waits, so
that nothing depends on a message that was lost; a task that nobody has taken is announced again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from kachery_lab.client.tasks import HubTask
from kachery_lab.core.ids import NodeId, TaskFunctionId
from kachery_lab.core.roles import Role
from kachery_lab.core.tasks import (
    FINAL,
    TaskKind,
    TaskRequest,
    TaskStatus,
    new_task_id,
    parse_status,
    shorten_error,
    task_hash,
)
from kachery_lab.errors import Conflict, Forbidden, KacheryLabError, NotFound, RequestIdReused, Unavailable
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.events import Events
from kachery_lab.services.hub_tasks import TaskHub, TaskHubs
from kachery_lab.services.principals import Principal
from kachery_lab.services.task_index import NO_RESULT
from kachery_lab.services.task_leases import MAX_IDS

CHECK_SECONDS = 2.0
"""The hub is asked so often about tasks for which somebody waits."""
IDLE_SECONDS = 5.0
"""The same, for tasks that somebody asked for or waited for within WANTED_SECONDS."""
WANTED_SECONDS = 600.0
KEPT_SECONDS = 3600.0
MAX_RECORDS = 5_000
MAX_WAIT_SECONDS = 7 * 24 * 3600.0
UNKNOWN = "this task is not known here; ask for it again"

log = structlog.get_logger(__name__)

_Key = tuple[TaskHub, str, str]


@dataclass(eq=False, slots=True)
class _Record:
    """A task that somebody here asked for. Times by the monotonic clock; `kwargs` None: it cannot be announced."""

    hub: TaskHub
    channel: str
    request: TaskRequest
    kwargs: dict[str, object] | None
    principal: Principal
    touched: float
    due: float
    status: TaskStatus = "waiting"
    error: str | None = None
    heard: tuple[TaskStatus, str | None] | None = None
    waiters: int = 0

    @property
    def key(self) -> _Key:
        return self.hub, self.channel, self.request.task_id

    @property
    def final(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What a requester is told. `result_url` None for actions; one that begins with `/` is relative to the address that
    the client used."""

    task_id: str
    status: TaskStatus
    error: str | None
    result_url: str | None = None


class TaskService:
    """Requests and waits."""

    def __init__(
        self,
        hubs: TaskHubs,
        handlers: BandHandlers,
        events: Events,
        node_id: NodeId,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hubs = hubs
        self._events = events
        self._node_id = node_id
        self._clock = clock
        self._records: OrderedDict[_Key, _Record] = OrderedDict()
        handlers.on("updateTaskStatus", self.on_status)

    # -- asking --------------------------------------------------------------------------------------------------

    async def request(
        self,
        channel: str,
        function_id: TaskFunctionId,
        kind: TaskKind,
        kwargs: dict[str, object],
        backend_id: str | None,
        principal: Principal,
        *,
        wait_ms: float,
        request_id: str | None = None,
    ) -> TaskOutcome:
        """Ask for a task, and wait for its outcome at most `wait_ms`. A pure calculation with a result is `finished`
        at once; one that failed before is tried again. The same `request_id` is the same task.

        Raises Forbidden, NotFound, InvalidInput, TooLarge (arguments), RequestIdReused, Conflict, Unavailable.
        """
        digest = task_hash(function_id, kwargs)
        hub = await self._hubs.find(channel)
        own_id = None if request_id is None else f"{self._node_id}/{principal.kind}:{principal.name}/{request_id}"
        request = TaskRequest(new_task_id(kind, digest, own_id), digest, function_id, kind, backend_id)
        try:
            task = await hub.tasks.ask(channel, request, principal)
        except Conflict as error:
            if request_id is not None:
                raise RequestIdReused("the request id was used for another task", hint="Use a new one") from error
            raise
        record = self._put(hub, channel, request, kwargs, principal)
        if record.final:
            # The hub says below what it is now.
            record.status, record.error, record.heard = "waiting", None, None
        self._take(record, task)
        if task.state == "open":
            await self._announce(record, quiet=False)
        if not request.has_result:
            await self._wait(record, wait_ms)
            return TaskOutcome(request.task_id, record.status, record.error)
        # Beside the wait: another hub has to be asked for the address.
        url = asyncio.create_task(hub.tasks.result_url(channel, digest, principal))
        try:
            await self._wait(record, wait_ms)
            return TaskOutcome(request.task_id, record.status, record.error, await url)
        finally:
            url.cancel()

    def _put(
        self,
        hub: TaskHub,
        channel: str,
        request: TaskRequest,
        kwargs: dict[str, object] | None,
        principal: Principal,
    ) -> _Record:
        now = self._clock()
        record = self._records.get((hub, channel, request.task_id))
        if record is None:
            self._make_room()
            record = _Record(hub, channel, request, kwargs, principal, now, now + CHECK_SECONDS)
            self._records[record.key] = record
        record.kwargs = kwargs if kwargs is not None else record.kwargs
        record.request, record.principal, record.touched = request, principal, now
        self._records.move_to_end(record.key)
        return record

    def _make_room(self) -> None:
        now = self._clock()
        for key, record in list(self._records.items()):
            if len(self._records) < MAX_RECORDS and now - record.touched < KEPT_SECONDS:
                break
            if not record.waiters:
                del self._records[key]
        if len(self._records) >= MAX_RECORDS:
            raise Unavailable(f"{MAX_RECORDS} tasks are being waited for here", retry_after=10)

    async def _announce(self, record: _Record, *, quiet: bool) -> None:
        """Publish the request. `quiet`: what fails is tried again later. Raises Forbidden, NotFound, TooLarge."""
        if record.kwargs is None:
            return
        body = {
            "type": "requestTask",
            "backendId": record.request.backend_id,
            "taskId": record.request.task_id,
            "taskFunctionId": record.request.function_id,
            "taskFunctionType": record.request.kind,
            "taskKwargs": record.kwargs,
        }
        try:
            await record.hub.bands.publish(record.channel, body)
        except Unavailable as error:
            log.info("a request will be announced later", task=record.request.task_id, reason=error.message)
        except KacheryLabError as error:
            if not quiet:
                raise
            self._set(record, "error", error.message)

    # -- waiting -------------------------------------------------------------------------------------------------

    async def wait(self, channel: str, task_id: str, principal: Principal, *, wait_ms: float) -> TaskOutcome:
        """Wait for the final status of a task, at most `wait_ms`. One that is unknown here and at the hub is an error,
        and so is a finished one whose result is gone. Raises Forbidden, NotFound."""
        hub = await self._hubs.find(channel)
        try:
            await hub.tasks.authorize(channel, Role.REQUEST_TASKS, principal)
            record = self._records.get((hub, channel, task_id)) or await self._recall(hub, channel, task_id, principal)
        except Unavailable:
            # What is known here does not need the hub; its word comes when it can be reached.
            record = self._records.get((hub, channel, task_id))
            if record is None:
                raise
        if record is None:
            return TaskOutcome(task_id, "error", UNKNOWN)
        record.touched = self._clock()
        if record.status == "finished" and not await self._has_result(record):
            self._set(record, "error", NO_RESULT)
        await self._wait(record, wait_ms)
        return TaskOutcome(task_id, record.status, record.error)

    async def _has_result(self, record: _Record) -> bool:
        """Whether the result of a finished task is there; True while the hub cannot be asked, and for actions."""
        if not record.request.has_result:
            return True
        try:
            return await record.hub.tasks.has_result(record.channel, record.request.task_hash)
        except Unavailable as error:
            log.info("the result was not looked for", task=record.request.task_id, reason=error.message)
            return True

    async def _recall(self, hub: TaskHub, channel: str, task_id: str, principal: Principal) -> _Record | None:
        """A task of an earlier run of this node, or of another node."""
        for task in await hub.tasks.states(channel, [task_id]):
            record = self._put(hub, channel, task.request, None, principal)
            self._take(record, task)
            return record
        return None

    async def _wait(self, record: _Record, wait_ms: float) -> None:
        until = self._clock() + min(wait_ms / 1000, MAX_WAIT_SECONDS)
        with self._events.subscribe([record.key]) as subscription:
            record.waiters += 1
            record.due = min(record.due, self._clock() + CHECK_SECONDS)
            try:
                while not record.final and await subscription.wait(until - self._clock()):
                    pass
            finally:
                record.waiters -= 1
                record.touched = self._clock()

    # -- news ----------------------------------------------------------------------------------------------------

    def _set(self, record: _Record, status: TaskStatus, error: str | None) -> None:
        record.status, record.error = status, None if error is None else shorten_error(error)
        if record.final:
            record.heard, record.kwargs = None, None
        self._events.publish(record.key)

    def _take(self, record: _Record, task: HubTask) -> None:
        """The hub's word."""
        if task.state in FINAL:
            self._set(record, parse_status(task.state), task.error_message)

    async def on_status(self, message: BandMessage, bands: ChannelBands) -> None:
        """An `updateTaskStatus`."""
        record = self._records.get((self._hubs.of(bands), message.channel, message.body["taskId"]))
        if record is None or record.final:
            return
        status = parse_status(message.body["status"])
        if status in FINAL:
            record.heard = (status, message.body.get("errorMessage"))
            await self._check([record])
        else:
            self._set(record, status, message.body.get("errorMessage"))

    async def _check(self, records: list[_Record]) -> None:
        """Ask the hub about tasks of one channel, at most MAX_IDS."""
        hub, channel = records[0].hub, records[0].channel
        now = self._clock()
        for record in records:
            record.due = now + (CHECK_SECONDS if record.waiters else IDLE_SECONDS)
        try:
            found = await hub.tasks.states(channel, [record.request.task_id for record in records])
        except (Forbidden, NotFound) as error:
            for record in records:
                self._set(record, "error", error.message)
            return
        except KacheryLabError as error:
            log.info("the hub was not asked about tasks", channel=channel, reason=error.message)
            return
        states = {task.request.task_id: task for task in found}
        for record in records:
            task = states.get(record.request.task_id)
            if task is not None:
                self._take(record, task)
            if task is None or task.state == "open":
                await self._unclaimed(record)

    async def _unclaimed(self, record: _Record) -> None:
        """Nobody has taken the task by the hub. An older node may have done it all the same: those claim nothing."""
        if record.final:
            return
        if record.heard is None:
            await self._announce(record, quiet=True)
            return
        status, error = record.heard
        if status == "finished" and not await self._has_result(record):
            status, error = "error", NO_RESULT
        self._set(record, status, error)

    async def keep_checking(self) -> None:
        """Ask the hubs about what is not final yet, for ever."""
        while True:
            await asyncio.sleep(0.5)
            try:
                await self.check_due()
            except Exception:
                log.exception("task_check_failed")

    async def check_due(self) -> None:
        """Ask about the tasks whose time has come."""
        now = self._clock()
        due: defaultdict[tuple[TaskHub, str], list[_Record]] = defaultdict(list)
        for record in self._records.values():
            wanted = record.waiters or now - record.touched < WANTED_SECONDS
            if not record.final and wanted and record.due <= now:
                due[record.hub, record.channel].append(record)
        for records in due.values():
            for start in range(math.ceil(len(records) / MAX_IDS)):
                await self._check(records[start * MAX_IDS : (start + 1) * MAX_IDS])
