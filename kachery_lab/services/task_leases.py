"""Leases of tasks at their channel's hub: exactly one backend works on a task.

A lease ends when its holder stops renewing it, says that its backends are gone, loses its rights, or keeps the task
longer than its function may run. Then a pure calculation or a query may be taken again; an action ends as an error that
names the lost backend, for nobody knows whether it was done. What a former holder reports is refused.

Leases are in the database and survive restarts. While the server runs their time is measured by a clock that nobody
sets; what passed while it was down is measured by the wall clock, and holders get a whole period to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from sqlalchemy import Connection

from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.roles import Role
from kachery_lab.core.tasks import TaskRequest, TaskStatus, shorten_error
from kachery_lab.db.engine import Database
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, KacheryLabError
from kachery_lab.services import task_index
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.task_functions import TaskFunctionService
from kachery_lab.services.task_index import TaskRecord

MAX_OPEN = 10_000
"""Tasks of one channel that wait for a backend; further ones are refused."""
MAX_IDS = 500
FINAL_KEPT_MS = 7 * 24 * 3600 * 1000
OPEN_KEPT_MS = 24 * 3600 * 1000

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Clock:
    """A lease in force; times by the monotonic clock."""

    lease_id: str
    channel: str
    request: TaskRequest
    holder: str
    started: float
    renewed: float
    commits: int = 0
    result: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """What a holder says of its leases, by lease id: still worked on; given to a backend; of backends that stopped
    polling; never given to one."""

    renew: Sequence[str] = ()
    delivered: Sequence[str] = ()
    lost: Sequence[str] = ()
    unused: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """Which of the renewed leases are not in force any more, and which others the hub has for this holder. A lease ends
    `seconds` after its last renewal."""

    ended: tuple[str, ...]
    others: tuple[TaskRecord, ...]
    seconds: float


class TaskLeaseService:
    """The tasks of this hub's own channels. `seconds`: how long a holder may be silent."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        functions: TaskFunctionService,
        database: Database,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._data = data
        self._roles = roles
        self._functions = functions
        self._database = database
        self._clock = clock
        self._clocks: dict[str, _Clock] = {}
        self._interval = min(1.0, seconds / 5)
        self._swept = clock()
        self._changed = asyncio.Event()
        self.seconds = seconds
        data.listeners.append(self._changed.set)

    def load(self) -> None:
        """Blocking: leases of the previous run, at start."""
        now, wall = self._clock(), task_index.now_ms()
        for task in self._database.read_sync(task_index.leased):
            assert task.lease_id is not None and task.holder is not None
            ran = max(wall - (task.leased_at or wall), 0) / 1000
            self._clocks[task.lease_id] = _Clock(task.lease_id, task.channel, task.request, task.holder, now - ran, now)

    # -- requesters ----------------------------------------------------------------------------------------------

    async def ask(self, subject: Subject, channel: str, request: TaskRequest) -> TaskRecord:
        """Somebody wants a task done; asking again is no error. The task as it is: open, held, or with its outcome.

        Raises Forbidden, NotFound, Conflict (another task has this id, or too many wait).
        """
        self._functions.require(subject, channel, request.function_id, Role.REQUEST_TASKS)

        def run(conn: Connection) -> TaskRecord:
            known = task_index.find(conn, channel, request.task_id)
            if known is not None and not task_index.same_task(known.request, request):
                raise Conflict(f"the task {request.task_id!r} is another one", hint="Use another request id")
            if known is None and task_index.count_open(conn, channel) >= MAX_OPEN:
                raise Conflict(f"{MAX_OPEN} tasks of {channel} wait for a backend", hint="Start one, then try again")
            return task_index.ask(conn, channel, request, str(subject))

        return await self._database.write(run)

    async def states(self, subject: Subject, channel: str, task_ids: Sequence[str]) -> list[TaskRecord]:
        """Those of these tasks that are known here. Raises Forbidden without any role for tasks, InvalidInput."""
        if not self._roles.roles(subject, channel) & (Role.REQUEST_TASKS | Role.PROVIDE_TASKS):
            self._roles.require(subject, channel, Role.REQUEST_TASKS)
        if len(task_ids) > MAX_IDS:
            raise InvalidInput(f"taskIds: expected at most {MAX_IDS}")
        return await self._database.read(lambda conn: task_index.find_all(conn, channel, task_ids))

    async def has_result(self, channel: str, task_hash: Sha1) -> bool:
        """Whether a result is in the bucket. No rights are checked."""
        found = await self._database.read(lambda conn: task_index.result_sha1(conn, channel, task_hash))
        return found is not None

    # -- holders -------------------------------------------------------------------------------------------------

    async def claim(
        self, node: Subject, channel: str, request: TaskRequest, requester: NodeId, lease_id: str, age_ms: int
    ) -> bool:
        """Take a task for one of the node's backends; False when another has it or it is done. The node chooses the
        lease id: with the same one it may ask again. `age_ms`: how long ago the request reached the node.

        Raises Forbidden when the node may not provide the function, or the requester not request it; NotFound.
        """
        self._functions.require(node, channel, request.function_id, Role.PROVIDE_TASKS)
        self._functions.require(Subject("node", requester), channel, request.function_id, Role.REQUEST_TASKS)
        who = f"node:{requester}"
        taken = await self._database.write(
            lambda conn: task_index.claim(conn, channel, request, who, node.name, lease_id, age_ms)
        )
        if taken and lease_id not in self._clocks:
            now = self._clock()
            self._clocks[lease_id] = _Clock(lease_id, channel, request, node.name, now, now)
        return taken

    async def renew(self, node: Subject, report: LeaseReport) -> LeaseAnswer:
        """A holder reports on all its leases."""
        now = self._clock()
        mine = {one.lease_id: one for one in self._clocks.values() if one.holder == node.name}
        for lease_id in report.renew:
            if lease_id in mine:
                mine[lease_id].renewed = now
        for lease_id in report.unused:
            if lease_id in mine:
                await self._end(mine[lease_id], None)
        for lease_id in report.lost:
            if lease_id in mine:
                await self._end(mine[lease_id], f"has not asked for tasks for {self.seconds:g} s")
        delivered = [lease_id for lease_id in report.delivered if lease_id in self._clocks]
        others = set(mine) - set(report.renew) - set(report.unused) - set(report.lost)

        def look(conn: Connection) -> list[TaskRecord]:
            task_index.deliver(conn, delivered, node.name)
            return [task for task in task_index.leased(conn) if task.lease_id in others]

        records = await (self._database.write(look) if delivered or others else _nothing())
        ended = tuple(lease_id for lease_id in report.renew if lease_id not in self._clocks)
        return LeaseAnswer(ended, tuple(records), self.seconds)

    async def finish(
        self,
        node: Subject,
        channel: str,
        task_id: str,
        lease_id: str | None,
        status: TaskStatus,
        message: str | None = None,
    ) -> TaskStatus:
        """A holder reports the final status; what it is then: `finished` without a result is an error. Reporting the
        same again is no error. Without a lease it is taken for tasks that nobody took, and for unknown ones.

        Raises Forbidden, Conflict (the lease is not in force: nothing changes).
        """
        self._roles.require(node, channel, Role.PROVIDE_TASKS)
        text = None if message is None else shorten_error(message)

        def run(conn: Connection) -> TaskRecord | None:
            known = task_index.find(conn, channel, task_id)
            if known is None and lease_id is None:
                return None
            if known is not None and lease_id is not None and known.holder != node.name:
                raise _lost(task_id)
            found = task_index.finish(conn, channel, task_id, lease_id, status, text)
            if found is None:
                raise _lost(task_id)
            return found

        task = await self._database.write(run)
        if lease_id is not None:
            self._clocks.pop(lease_id, None)
        if task is None:
            return status
        return "finished" if task.state == "finished" else "error"

    @asynccontextmanager
    async def committing(
        self, channel: str, task_hash: Sha1, owner: Subject, lease_id: str | None, sha1: Sha1
    ) -> AsyncIterator[None]:
        """While a result goes into the bucket: the lease under which it was made stays in force, or Conflict is raised.

        An upload without a lease (by an older node, or of a result that nobody asked for) may not replace what a holder
        makes or made. Raises Forbidden when the role is gone.
        """
        self._roles.require(owner, channel, Role.PROVIDE_TASKS)
        if lease_id is None:
            await self._require_free(channel, task_hash, sha1)
            yield
            return
        lease = self._clocks.get(lease_id)
        if lease is None or (lease.channel, lease.request.task_hash, lease.holder) != (channel, task_hash, owner.name):
            raise _lost(task_hash)
        if lease.result not in (None, sha1):
            raise Conflict("another result was uploaded under this lease already", hint="Drop this result")
        lease.commits += 1
        try:
            yield
            lease.result = sha1
        finally:
            lease.commits -= 1

    async def _require_free(self, channel: str, task_hash: Sha1, sha1: Sha1) -> None:
        def other_content(conn: Connection) -> bool:
            for task in task_index.leased_with_hash(conn, channel, task_hash):
                if task.state == "leased":
                    return True
                if task.lease_id is not None and task.request.kind == "pure-calculation":
                    return task_index.result_sha1(conn, channel, task_hash) not in (None, sha1)
            return False

        if await self._database.read(other_content):
            raise Conflict(f"another backend has the task {task_hash}, or has finished it", hint="Drop this result")

    # -- endings -------------------------------------------------------------------------------------------------

    async def keep_ending(self) -> None:
        """End leases that are over, for ever."""
        while True:
            try:
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self.sweep()
            except KacheryLabError as error:
                log.warning("leases of tasks were not looked at", code=error.code, reason=error.message)

    async def sweep(self) -> int:
        """End the leases that are over now; how many."""
        now = self._clock()
        # When this process stood still nobody could renew: that time does not count.
        pause = now - self._swept - self._interval
        self._swept = now
        if pause > self._interval:
            for lease in self._clocks.values():
                lease.renewed += pause
        count = 0
        for lease in list(self._clocks.values()):
            reason = self._reason(lease, now)
            if reason is not None and not lease.commits:
                await self._end(lease, reason)
                count += 1
        return count

    def _reason(self, lease: _Clock, now: float) -> str | None:
        """Why a lease is over; None while it is not."""
        try:
            holder = Subject("node", lease.holder)
            self._functions.require(holder, lease.channel, lease.request.function_id, Role.PROVIDE_TASKS)
        except KacheryLabError as error:
            return f"may not go on: {error.message}" if isinstance(error, Forbidden) else "is in a channel that is gone"
        if now - lease.renewed > self.seconds:
            return f"was not heard of for {self.seconds:g} s"
        longest = self._functions.max_run_seconds(lease.channel, lease.request.function_id)
        if now - lease.started > longest:
            return f"took longer than the {longest} s that this function may run"
        return None

    async def _end(self, lease: _Clock, reason: str | None) -> None:
        """End a lease. `reason` None: no backend got the task, so that everything may be tried again."""
        if reason is None or lease.request.has_result:
            done = await self._database.write(lambda conn: task_index.reopen(conn, lease.lease_id))
        else:
            message = shorten_error(f"{self._name(lease)} {reason}; whether the action was done is not known")
            done = await self._database.write(lambda conn: task_index.fail(conn, lease.lease_id, message))
        self._clocks.pop(lease.lease_id, None)
        if done:
            log.warning(
                "a task's lease ended",
                task=lease.request.task_id,
                function=lease.request.function_id,
                channel=lease.channel,
                node=lease.holder,
                reason=reason or "no backend got it",
            )

    def _name(self, lease: _Clock) -> str:
        node = self._data.nodes.get(lease.holder)
        label = f" {node.label}" if node is not None else ""
        backend = f"the backend {lease.request.backend_id!r}" if lease.request.backend_id is not None else "the backend"
        return f"{backend} of the node{label} ({lease.holder})"

    async def prune(self) -> int:
        """Drop what has been final for a week, or open for a day; how many tasks."""
        now = task_index.now_ms()
        return await self._database.write(lambda conn: task_index.forget(conn, now - FINAL_KEPT_MS, now - OPEN_KEPT_MS))


async def _nothing() -> list[TaskRecord]:
    return []


def _lost(task: str) -> Conflict:
    return Conflict(f"the task {task!r} is not, or no longer, this backend's", hint="Its result is not wanted")
