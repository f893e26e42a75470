"""The table of a hub's tasks: each function is one step inside a transaction, and says whether it was taken."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import Sha1, TaskFunctionId
from kachery_lab.core.tasks import TaskKind, TaskRequest, TaskStatus, result_path
from kachery_lab.db.models import bucket_objects, tasks
from kachery_lab.errors import Conflict

State = Literal["open", "leased", "finished", "error"]
FINAL = ("finished", "error")
NO_RESULT = "the task is finished, but its result is not in the channel's bucket"


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as its hub knows it. `lease_id` and `holder` are those of the present or the last lease."""

    channel: str
    request: TaskRequest
    state: State
    error_message: str | None = None
    lease_id: str | None = None
    holder: str | None = None
    delivered: bool = False
    leases: int = 0
    leased_at: int | None = None
    changed_at: int = 0

    @property
    def final(self) -> bool:
        """Whether nothing changes any more, until it is asked for again."""
        return self.state in FINAL


def _record(row: Any) -> TaskRecord:
    kind: TaskKind = row.kind
    request = TaskRequest(row.task_id, Sha1(row.task_hash), TaskFunctionId(row.function_id), kind, row.backend_id)
    return TaskRecord(
        row.channel,
        request,
        row.state,
        row.error_message,
        row.lease_id,
        row.holder,
        row.delivered,
        row.leases,
        row.leased_at,
        row.changed_at,
    )


def now_ms() -> int:
    """Wall-clock time in ms since 1970."""
    return int(time.time() * 1000)


def find(conn: Connection, channel: str, task_id: str) -> TaskRecord | None:
    """A task, None when it is unknown."""
    row = conn.execute(select(tasks).where(*_at(channel, task_id))).one_or_none()
    return None if row is None else _record(row)


def find_all(conn: Connection, channel: str, task_ids: Iterable[str]) -> list[TaskRecord]:
    """Those of these tasks that are known. A finished one whose result is gone is shown as an error."""
    statement = select(tasks).where(tasks.c.channel == channel, tasks.c.task_id.in_(list(task_ids)))
    return [_with_result(conn, _record(row)) for row in conn.execute(statement).all()]


def _with_result(conn: Connection, task: TaskRecord) -> TaskRecord:
    if task.state == "finished" and task.request.has_result and not has_result(conn, task.channel, task.request):
        return TaskRecord(task.channel, task.request, "error", NO_RESULT, task.lease_id, task.holder)
    return task


def leased(conn: Connection) -> list[TaskRecord]:
    """All tasks that somebody holds."""
    return [_record(row) for row in conn.execute(select(tasks).where(tasks.c.state == "leased")).all()]


def leased_with_hash(conn: Connection, channel: str, task_hash: str) -> list[TaskRecord]:
    """Tasks of one hash that somebody holds, or for which a result was uploaded by a holder."""
    statement = select(tasks).where(
        tasks.c.channel == channel, tasks.c.task_hash == task_hash, tasks.c.state.in_(("leased", "finished"))
    )
    return [_record(row) for row in conn.execute(statement).all()]


def count_open(conn: Connection, channel: str) -> int:
    """How many tasks of a channel nobody took yet."""
    statement = select(func.count()).where(tasks.c.channel == channel, tasks.c.state == "open")
    return int(conn.execute(statement).scalar_one())


def result_sha1(conn: Connection, channel: str, task_hash: Sha1) -> str | None:
    """SHA-1 of the result in the bucket, None when there is none."""
    path = result_path(task_hash).text
    statement = select(bucket_objects.c.sha1).where(bucket_objects.c.channel == channel, bucket_objects.c.path == path)
    return conn.execute(statement).scalar_one_or_none()


def has_result(conn: Connection, channel: str, request: TaskRequest) -> bool:
    """Whether a result lies in the bucket."""
    return result_sha1(conn, channel, request.task_hash) is not None


def _at(channel: str, task_id: str) -> tuple[Any, Any]:
    return tasks.c.channel == channel, tasks.c.task_id == task_id


def _held(lease_id: str) -> Any:
    return and_(tasks.c.lease_id == lease_id, tasks.c.state == "leased")


def same_task(known: TaskRequest, request: TaskRequest) -> bool:
    """Whether two requests with one id are for the same. A pure calculation may be asked of another backend id."""
    if known.kind == request.kind == "pure-calculation":
        return (known.task_hash, known.function_id) == (request.task_hash, request.function_id)
    return known == request


def ask(conn: Connection, channel: str, request: TaskRequest, requester: str) -> TaskRecord:
    """Somebody wants a task: as it is, or open when it is new or (pure calculations) has no good outcome yet."""
    known = find(conn, channel, request.task_id)
    pure = request.kind == "pure-calculation"
    state: State = "finished" if pure and has_result(conn, channel, request) else "open"
    if known is None:
        _insert(conn, channel, request, requester, state)
    elif pure and known.state != "leased":
        values = {"state": state, "error_message": None, "requester": requester, "changed_at": now_ms()}
        values |= {"backend_id": request.backend_id}
        conn.execute(update(tasks).where(*_at(channel, request.task_id)).values(**values))
    found = find(conn, channel, request.task_id)
    assert found is not None
    return _with_result(conn, found)


def _insert(conn: Connection, channel: str, request: TaskRequest, requester: str, state: State) -> None:
    values = {
        "channel": channel,
        "task_id": request.task_id,
        "task_hash": request.task_hash,
        "function_id": request.function_id,
        "kind": request.kind,
        "backend_id": request.backend_id,
        "requester": requester,
        "state": state,
        "delivered": False,
        "leases": 0,
        "changed_at": now_ms(),
    }
    conn.execute(insert(tasks).values(**values))


def claim(
    conn: Connection, channel: str, request: TaskRequest, requester: str, holder: str, lease_id: str, age_ms: int
) -> bool:
    """Take a task, which was asked for `age_ms` ago. True also for a repeat with the same lease id.

    A pure calculation that has its final status is taken anew only by a request that came after it and found no result.
    """
    other = conn.execute(select(tasks.c.channel, tasks.c.task_id).where(tasks.c.lease_id == lease_id)).first()
    if other is not None and tuple(other) != (channel, request.task_id):
        raise Conflict("leaseId: this is the lease of another task", hint="Make a new one for each task")
    known = find(conn, channel, request.task_id)
    if known is None:
        # Asked for on the band only, as older nodes do.
        _insert(conn, channel, request, requester, "open")
    elif not same_task(known.request, request):
        return False
    elif known.state == "leased":
        return known.lease_id == lease_id and known.holder == holder
    elif known.final:
        again = request.kind == "pure-calculation" and known.changed_at < now_ms() - age_ms
        if not again or has_result(conn, channel, request):
            return False
    leases = 1 if known is None else known.leases + 1
    values = {"state": "leased", "lease_id": lease_id, "holder": holder, "delivered": False, "leases": leases}
    at = now_ms()
    values |= {"leased_at": at, "changed_at": at, "error_message": None, "backend_id": request.backend_id}
    conn.execute(update(tasks).where(*_at(channel, request.task_id)).values(**values))
    return True


def deliver(conn: Connection, lease_ids: Iterable[str], holder: str) -> None:
    """The holder says that backends have these tasks."""
    statement = update(tasks).where(tasks.c.lease_id.in_(list(lease_ids)), tasks.c.holder == holder)
    conn.execute(statement.values(delivered=True))


def reopen(conn: Connection, lease_id: str) -> bool:
    """End a lease so that the task may be taken again; whether it was in force."""
    values = {"state": "open", "lease_id": None, "holder": None, "delivered": False, "changed_at": now_ms()}
    return conn.execute(update(tasks).where(_held(lease_id)).values(**values)).rowcount == 1


def fail(conn: Connection, lease_id: str, message: str) -> bool:
    """End a lease and the task with an error; whether the lease was in force. What its holder reports later is late."""
    values = {"state": "error", "error_message": message, "lease_id": None, "changed_at": now_ms()}
    return conn.execute(update(tasks).where(_held(lease_id)).values(**values)).rowcount == 1


def finish(
    conn: Connection, channel: str, task_id: str, lease_id: str | None, status: TaskStatus, message: str | None
) -> TaskRecord | None:
    """A holder (or, without a lease, anybody for a task that nobody took) reports the final status.

    The task as it is then; an unchanged one when the same was reported before. None: the lease is not in force.
    """
    known = find(conn, channel, task_id)
    if known is None:
        return None
    if known.final and known.lease_id == lease_id is not None:
        return known
    expected = ("open", None) if lease_id is None else ("leased", lease_id)
    if (known.state, known.lease_id if lease_id is not None else None) != expected:
        return None
    if status == "finished" and known.request.has_result and not has_result(conn, channel, known.request):
        status, message = "error", NO_RESULT
    values = {"state": status, "error_message": message, "changed_at": now_ms()}
    conn.execute(update(tasks).where(*_at(channel, task_id)).values(**values))
    return find(conn, channel, task_id)


def forget(conn: Connection, final_before: int, open_before: int) -> int:
    """Drop tasks that have been final, or open, since before these times; how many."""
    old = and_(tasks.c.state.in_(FINAL), tasks.c.changed_at < final_before)
    unwanted = and_(tasks.c.state == "open", tasks.c.changed_at < open_before)
    return sum(conn.execute(delete(tasks).where(which)).rowcount for which in (old, unwanted))
