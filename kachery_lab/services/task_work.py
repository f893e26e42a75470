"""Tasks that backends of this node work on: their leases are kept while the backends ask for more, their statuses and
results go to the hub, and a final status that the hub could not be told is kept until it can.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog
from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.client.tasks import HubTask
from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.roles import Role
from kachery_lab.core.tasks import FINAL, TaskRequest, TaskStatus, parse_status, shorten_error
from kachery_lab.db.engine import Database
from kachery_lab.db.models import task_reports
from kachery_lab.errors import Conflict, KacheryLabError, Unavailable
from kachery_lab.observability.logging import redact_text
from kachery_lab.services.hub_tasks import TaskHub, TaskHubs
from kachery_lab.services.principals import Principal
from kachery_lab.services.task_leases import LeaseReport

RENEW_SECONDS = 5.0
"""At most so long between two reports on leases; a sixth of their length when that is shorter."""
SOON_SECONDS = 0.2
"""After a task was given to a backend the hub is told within this time."""
UPLOAD_PATIENCE = 20.0
"""Seconds that a backend which has a result waits for a hub that cannot be reached."""
MAX_HELD = 5_000

log = structlog.get_logger(__name__)

PollKey = tuple[TaskHub, str, str, str | None]
"""Hub, channel, function and backend id: what a registration offers, and what a lease is kept alive by."""


@dataclass(slots=True)
class HeldTask:
    """A task that the hub has leased to this node. `unused`: no backend got it."""

    hub: TaskHub
    channel: str
    request: TaskRequest
    lease_id: str
    delivered: bool = False
    told: bool = False
    unused: bool = False
    lost: bool = False

    @property
    def key(self) -> PollKey:
        """Whose polls keep it alive."""
        return self.hub, self.channel, self.request.function_id, self.request.backend_id


@dataclass(slots=True)
class _Seen:
    polling: int = 0
    last: float = 0.0


class TaskWork:
    """`node_id` is this node's. Times are measured by the monotonic clock."""

    def __init__(
        self,
        hubs: TaskHubs,
        database: Database,
        node_id: NodeId,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hubs = hubs
        self._database = database
        self._node_id = node_id
        self._clock = clock
        self._held: dict[str, HeldTask] = {}
        self._claiming: set[str] = set()
        self._seen: dict[PollKey, _Seen] = {}
        self._started = clock()
        self._soon = asyncio.Event()
        self._lasts: dict[TaskHub, float] = {}

    # -- polls ---------------------------------------------------------------------------------------------------

    def poll_begins(self, keys: Iterable[PollKey]) -> None:
        """A backend asks for tasks of these functions."""
        for key in keys:
            self._seen.setdefault(key, _Seen()).polling += 1

    def poll_ends(self, keys: Iterable[PollKey]) -> None:
        """Its call is over."""
        now = self._clock()
        for key in keys:
            seen = self._seen[key]
            seen.polling -= 1
            seen.last = now

    def _silent_for(self, key: PollKey) -> float:
        """Seconds since a backend of this kind asked; for those not heard of, since this node started."""
        seen = self._seen.get(key)
        if seen is not None and seen.polling:
            return 0.0
        return self._clock() - max(seen.last if seen is not None else 0.0, self._started)

    def open_tasks(self, key: PollKey) -> int:
        """How many tasks backends of this kind have now."""
        return sum(task.key == key for task in self._held.values())

    # -- claiming ------------------------------------------------------------------------------------------------

    async def claim(
        self, hub: TaskHub, channel: str, request: TaskRequest, requester: NodeId, lease_id: str, received: float
    ) -> bool:
        """Take a task, which was asked for at `received` (monotonic); whether this node has it. Raises what the hub
        raises; after Unavailable it may have been granted, and is given back if nobody claims it again."""
        if len(self._held) >= MAX_HELD:
            raise Unavailable(f"backends of this node have {MAX_HELD} tasks already")
        held = HeldTask(hub, channel, request, lease_id)
        self._claiming.add(lease_id)
        age_ms = int((self._clock() - received) * 1000)
        try:
            try:
                granted = await hub.tasks.claim(channel, request, requester, lease_id, age_ms)
            except Unavailable:
                # The answer may be lost and the lease granted: the same id gets the same answer.
                granted = await hub.tasks.claim(channel, request, requester, lease_id, age_ms)
        except (Unavailable, asyncio.CancelledError):
            held.unused = True
            self._held[lease_id] = held
            raise
        finally:
            self._claiming.discard(lease_id)
        if granted:
            self._held[lease_id] = held
        else:
            self._held.pop(lease_id, None)
        return granted

    def delivered(self, lease_ids: Iterable[str]) -> None:
        """A backend has been sent these tasks."""
        for lease_id in lease_ids:
            if lease_id in self._held:
                self._held[lease_id].delivered = True
        self._soon.set()

    def give_back(self, lease_ids: Iterable[str]) -> None:
        """No backend got these tasks."""
        for lease_id in lease_ids:
            if lease_id in self._held:
                self._held[lease_id].unused = True
        self._soon.set()

    # -- leases --------------------------------------------------------------------------------------------------

    async def keep_leases(self) -> None:
        """Report on leases, and deliver what the hubs were not told, for ever."""
        while True:
            for hub in self._hubs:
                try:
                    await self.report(hub)
                    await self._deliver_reports(hub)
                except KacheryLabError as error:
                    log.info("the hub was not told about leases", code=error.code, reason=error.message)
                except Exception:
                    log.exception("lease_report_failed")
            self._forget_polls()
            try:
                async with asyncio.timeout(min([RENEW_SECONDS, *(last / 6 for last in self._lasts.values())])):
                    await self._soon.wait()
                    await asyncio.sleep(SOON_SECONDS)
            except TimeoutError:
                pass
            self._soon.clear()

    async def report(self, hub: TaskHub) -> None:
        """Tell a hub about all leases that it gave this node, and learn which have ended."""
        limit = self._lasts.get(hub, RENEW_SECONDS * 6)
        mine = [task for task in self._held.values() if task.hub is hub]
        unused = [task.lease_id for task in mine if task.unused]
        lost = [task for task in mine if not task.unused and (task.lost or self._silent_for(task.key) > limit)]
        gone = {*unused, *(task.lease_id for task in lost)}
        kept = [task for task in mine if task.lease_id not in gone]
        new = [task for task in kept if task.delivered and not task.told]
        if not mine and (hub in self._lasts or not hub.bands.channels()):
            return
        report = LeaseReport(
            [task.lease_id for task in kept],
            [task.lease_id for task in new],
            [task.lease_id for task in lost],
            unused,
        )
        ended, others, self._lasts[hub] = await hub.tasks.renew(report)
        for task in new:
            task.told = True
        for lease_id in (*gone, *ended):
            known = self._held.pop(lease_id, None)
            if known is not None and lease_id not in unused:
                log.warning("a task is no longer this node's", task=known.request.task_id, channel=known.channel)
        for other in others:
            self._adopt(hub, other)

    def _adopt(self, hub: TaskHub, task: HubTask) -> None:
        """A lease of an earlier run. One that no backend is known to have got counts as lost."""
        if task.lease_id is None or task.lease_id in self._held or task.lease_id in self._claiming:
            return
        held = HeldTask(hub, task.channel, task.request, task.lease_id, task.delivered, task.delivered)
        held.lost = not task.delivered
        self._held[task.lease_id] = held
        log.info("a task of an earlier run", task=task.request.task_id, channel=task.channel, lost=held.lost)
        if held.lost:
            self._soon.set()

    def _forget_polls(self) -> None:
        old = [key for key, seen in self._seen.items() if not seen.polling and self._silent_for(key) > 3600]
        for key in old:
            del self._seen[key]

    def _here(self, hub: TaskHub, channel: str, task_id: str) -> HeldTask | None:
        for held in self._held.values():
            if (held.hub, held.channel, held.request.task_id) == (hub, channel, task_id) and not held.unused:
                return held
        return None

    async def _at_hub(self, hub: TaskHub, channel: str, task_id: str) -> HeldTask | None:
        """A task that the hub has leased to this node in an earlier run; None when it is open or unknown there.

        Raises Conflict when another node holds it, or it has its final status.
        """
        for task in await hub.tasks.states(channel, [task_id]):
            if task.state == "leased" and task.holder == self._node_id and task.lease_id is not None:
                held = HeldTask(hub, channel, task.request, task.lease_id, delivered=True)
                self._held[task.lease_id] = held
                return held
            if task.state != "open":
                raise Conflict(f"the task {task_id!r} is not, or no longer, this backend's")
        return None

    # -- what backends say ---------------------------------------------------------------------------------------

    async def update(
        self, channel: str, task_id: str, status: TaskStatus, message: str | None, principal: Principal
    ) -> None:
        """A backend reports a status: the hub is told of a final one, and it is published.

        Raises Forbidden, NotFound, Conflict (the task is another backend's meanwhile), Unavailable. A final status that
        a remote hub cannot be told now is kept, durably, and told later. Secrets in `message` are cut out.
        """
        hub = await self._hubs.find(channel)
        # kachery-client puts the address of an upload that failed into its message, with the ticket.
        text = None if message is None else shorten_error(redact_text(message))
        held = self._here(hub, channel, task_id)
        if held is None:
            await hub.tasks.authorize(channel, Role.PROVIDE_TASKS, principal)
            held = await self._at_hub(hub, channel, task_id)
        if status in FINAL:
            try:
                status = await self._finish(hub, channel, task_id, held, status, text)
            except Unavailable:
                if held is None or not hub.remote:
                    raise
                await self._keep(held, status, text)
                return
        try:
            await hub.bands.publish(channel, status_body(task_id, status, text))
        except Unavailable as error:
            if status not in FINAL:
                raise
            # The hub knows; the requester asks it.
            log.info("a final status was not published", task=task_id, channel=channel, reason=error.message)

    async def _finish(
        self, hub: TaskHub, channel: str, task_id: str, held: HeldTask | None, status: TaskStatus, text: str | None
    ) -> TaskStatus:
        lease_id = None if held is None else held.lease_id
        try:
            found = await hub.tasks.finish(channel, task_id, lease_id, status, text)
        except Conflict:
            if lease_id is not None:
                self._held.pop(lease_id, None)
            raise
        if lease_id is not None:
            self._held.pop(lease_id, None)
        return found

    async def refuse(self, held: HeldTask, message: str) -> None:
        """End a claimed task with an error of this node's own."""
        await self._finish(held.hub, held.channel, held.request.task_id, held, "error", message)
        await held.hub.bands.publish(held.channel, status_body(held.request.task_id, "error", message))

    def held(self, lease_id: str) -> HeldTask | None:
        """A task that this node holds."""
        return self._held.get(lease_id)

    async def upload_url(self, channel: str, task_hash: Sha1, size: int, principal: Principal) -> str:
        """Where a backend PUTs a result; one that begins with `/` is relative to the address that the client used.

        Raises Forbidden, NotFound, Conflict (the task is another backend's meanwhile), TooLarge, Unavailable.
        """
        hub = await self._hubs.find(channel)
        until = self._clock() + UPLOAD_PATIENCE
        while True:
            try:
                held = self._with_hash(hub, channel, task_hash)
                if held is None:
                    await hub.tasks.authorize(channel, Role.PROVIDE_TASKS, principal)
                    held = await self._at_hub(hub, channel, task_hash)
                lease_id = None if held is None else held.lease_id
                return await hub.tasks.upload_url(channel, task_hash, size, lease_id)
            except Unavailable:
                # The client would report a task as failed whose result it has.
                if not hub.remote or self._clock() > until:
                    raise
                await asyncio.sleep(1)

    def _with_hash(self, hub: TaskHub, channel: str, task_hash: Sha1) -> HeldTask | None:
        for held in self._held.values():
            if (held.hub, held.channel, held.request.task_hash) == (hub, channel, task_hash) and not held.unused:
                return held
        return None

    # -- reports that wait ---------------------------------------------------------------------------------------

    async def _keep(self, held: HeldTask, status: TaskStatus, text: str | None) -> None:
        row = {
            "lease_id": held.lease_id,
            "channel": held.channel,
            "task_id": held.request.task_id,
            "status": status,
            "error_message": text,
            "created_at": int(time.time() * 1000),
        }
        statement = insert(task_reports).values(**row).on_conflict_do_nothing()
        await self._database.write(lambda conn: conn.execute(statement).rowcount)
        log.warning("the hub cannot be told a final status now; it is kept", task=held.request.task_id)
        self._soon.set()

    async def _deliver_reports(self, hub: TaskHub) -> None:
        if not hub.remote:
            return
        statement = select(task_reports).order_by(task_reports.c.created_at).limit(100)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        for row in rows:
            status = parse_status(row.status)
            held = self._held.get(row.lease_id)
            try:
                status = await hub.tasks.finish(row.channel, row.task_id, row.lease_id, status, row.error_message)
                await hub.bands.publish(row.channel, status_body(row.task_id, status, row.error_message))
            except Unavailable:
                return
            except KacheryLabError as error:
                log.warning("a final status came too late", task=row.task_id, channel=row.channel, reason=error.message)
            forget = delete(task_reports).where(task_reports.c.lease_id == row.lease_id)
            await self._database.write(lambda conn, one=forget: conn.execute(one).rowcount)  # type: ignore[misc]
            if held is not None:
                self._held.pop(held.lease_id, None)


def status_body(task_id: str, status: TaskStatus, message: str | None) -> dict[str, object]:
    """The band message of a status."""
    body: dict[str, object] = {"type": "updateTaskStatus", "taskId": task_id, "status": status}
    return body if message is None else {**body, "errorMessage": message}


def new_lease_id() -> str:
    """A name for a lease, chosen by who claims."""
    return secrets.token_hex(16)
