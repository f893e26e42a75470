"""Tasks of this hub's channels, as other nodes ask for them and take them; requests that nodes sign.

Each may be repeated: with the same ids it has no second effect.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, NodeId, Sha1, parse_whole_number
from kachery_lab.core.tasks import FINAL, KINDS, TaskRequest, parse_status, parse_task_id, result_path
from kachery_lab.errors import InvalidInput, NotFound
from kachery_lab.http.bodies import Field, require_fields, required
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.describe import Operation, array, body_of, choice, flag, nullable, record, text, whole
from kachery_lab.http.public_url import hub_url
from kachery_lab.http.v1.nodes import signed
from kachery_lab.services.hub_tasks import shown
from kachery_lab.services.subjects import Subject
from kachery_lab.services.task_index import TaskRecord
from kachery_lab.services.task_leases import MAX_IDS, LeaseReport

MAX_BODY = 1_000_000
MAX_LEASES = 20_000
_LEASE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_TASK = {
    "taskId": required(str),
    "taskHash": required(str),
    "taskFunctionId": required(str),
    "taskFunctionType": required(str),
    "backendId": required(str, nullable=True),
}
_STATES = {"taskIds": required(list)}
_CLAIM = {**_TASK, "requester": required(str), "leaseId": required(str), "ageMs": required(int)}
_FINISH = {
    "taskId": required(str),
    "leaseId": required(str, nullable=True),
    "status": required(str),
    "errorMessage": required(str, nullable=True),
}
_UPLOAD = {"taskHash": required(str), "size": required(int), "leaseId": required(str, nullable=True)}
_LEASES = {name: required(list) for name in ("renew", "delivered", "lost", "unused")}


async def _member(request: Request, spec: dict[str, Field]) -> tuple[Subject, ChannelName, dict[str, Any]]:
    """The signing node, a channel of which it is a member, and the body."""
    subject, body = await signed(request, MAX_BODY)
    node = node_of(request)
    node.node_requests.require_approved(subject)
    channel = ChannelName.parse(request.path_params["channel"], "channel")
    if (channel, subject.name) not in node.data.memberships:
        raise NotFound(f"there is no channel {channel!r} of this node")
    return subject, channel, require_fields(body, spec)


def _lease_id(value: object, where: str = "leaseId") -> str:
    if isinstance(value, str) and _LEASE_ID.fullmatch(value):
        return value
    raise InvalidInput(f"{where}: expected 32 lower-case hex digits")


def _lease_ids(value: list[Any], where: str) -> list[str]:
    if len(value) > MAX_LEASES:
        raise InvalidInput(f"{where}: expected at most {MAX_LEASES}")
    return [_lease_id(one, where) for one in value]


def _to_json(task: TaskRecord, reader: Subject) -> dict[str, Any]:
    found = shown(task, reader.name)
    return {
        "channel": found.channel,
        **found.request.to_json(),
        "state": found.state,
        "errorMessage": found.error_message,
        "holder": found.holder,
        "leaseId": found.lease_id,
        "delivered": found.delivered,
    }


async def ask(request: Request) -> Response:
    """A node wants a task done."""
    subject, channel, body = await _member(request, _TASK)
    node, wanted = node_of(request), TaskRequest.parse(body)
    async with node.audit.refusals(str(subject), peer_of(request), "task.request", f"{channel} {wanted.function_id}"):
        task = await node.task_leases.ask(subject, channel, wanted)
    return JSONResponse(_to_json(task, subject))


async def states(request: Request) -> Response:
    """What became of tasks; unknown ones are left out."""
    subject, channel, body = await _member(request, _STATES)
    ids = [parse_task_id(one, "taskIds") for one in body["taskIds"]]
    node = node_of(request)
    async with node.audit.refusals(str(subject), peer_of(request), "task.states", channel):
        found = await node.task_leases.states(subject, channel, ids)
    return JSONResponse({"tasks": [_to_json(task, subject) for task in found]})


async def claim(request: Request) -> Response:
    """A node takes a task for one of its backends; exactly one gets it."""
    subject, channel, body = await _member(request, _CLAIM)
    node, wanted = node_of(request), TaskRequest.parse(body)
    requester = NodeId.parse(body["requester"], "requester")
    age = parse_whole_number(body["ageMs"], "ageMs")
    lease_id = _lease_id(body["leaseId"])
    async with node.audit.refusals(str(subject), peer_of(request), "task.claim", f"{channel} {wanted.function_id}"):
        granted = await node.task_leases.claim(subject, channel, wanted, requester, lease_id, age)
    return JSONResponse({"granted": granted})


async def finish(request: Request) -> Response:
    """The holder of a lease reports the final status."""
    subject, channel, body = await _member(request, _FINISH)
    node, status = node_of(request), parse_status(body["status"])
    if status not in FINAL:
        raise InvalidInput("status: expected finished or error")
    task_id = parse_task_id(body["taskId"])
    lease_id = None if body["leaseId"] is None else _lease_id(body["leaseId"])
    async with node.audit.refusals(str(subject), peer_of(request), "task.finish", f"{channel} {task_id}"):
        found = await node.task_leases.finish(subject, channel, task_id, lease_id, status, body["errorMessage"])
    return JSONResponse({"status": found})


async def upload(request: Request) -> Response:
    """An upload URL for a result; it is good while the lease is in force."""
    subject, channel, body = await _member(request, _UPLOAD)
    node, path = node_of(request), result_path(Sha1.parse(body["taskHash"], "taskHash"))
    lease_id = None if body["leaseId"] is None else _lease_id(body["leaseId"])
    size = parse_whole_number(body["size"], "size")
    async with node.audit.refusals(str(subject), peer_of(request), "upload.issue", channel):
        segment = node.uploads.issue(channel, path, size, subject, lease=lease_id)
    return JSONResponse({"url": f"{hub_url(request)}/bucket/upload/{segment}"})


async def leases(request: Request) -> Response:
    """A node reports on all its leases."""
    subject, body = await signed(request, MAX_BODY)
    node = node_of(request)
    node.node_requests.require_approved(subject)
    fields = require_fields(body, _LEASES)
    report = LeaseReport(**{name: _lease_ids(fields[name], name) for name in _LEASES})
    answer = await node.task_leases.renew(subject, report)
    return JSONResponse(
        {
            "ended": list(answer.ended),
            "others": [_to_json(task, subject) for task in answer.others],
            "leaseSeconds": answer.seconds,
        }
    )


_WHO = ("node",)
_CHANNEL = {"channel": text("rig-data")}
_HASH = text("5ac2c576c3f1c72031875da143c99e4a498f2084", pattern="^[0-9a-f]{40}$")
_NODE = text("8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c", pattern="^[0-9a-f]{64}$")
_ID = text("5ac2c576c3f1c72031875da143c99e4a498f2084", maxLength=40)
_LEASE = text("0f" * 16, pattern="^[0-9a-f]{32}$")
_ASKED = {
    "taskId": _ID,
    "taskHash": _HASH,
    "taskFunctionId": text("add.1", minLength=1, maxLength=400),
    "taskFunctionType": choice(*KINDS),
    "backendId": {"type": "string", "maxLength": 1000, "examples": [None]},
}
_SHOWN = record(
    channel=text("rig-data"),
    **{**_ASKED, "backendId": nullable(_ASKED["backendId"])},
    state=choice("open", "leased", "finished", "error"),
    errorMessage=nullable(text("division by zero")),
    holder=nullable(_NODE),
    leaseId=nullable(_LEASE),
    delivered=flag(False),
)
_NO_LEASE = {"type": "string", "pattern": "^[0-9a-f]{32}$", "examples": [None]}
_STATUS = choice("finished", "error")
_IDS = {"type": "array", "items": _LEASE, "maxItems": MAX_LEASES, "examples": [[]]}
OPERATIONS = (
    Operation(
        "POST",
        "/api/v1/channels/{channel}/tasks",
        ask,
        "A node wants a task done: the task as it is. Needs requestTasks, and an entry for the function if it has any",
        _WHO,
        {200: _SHOWN},
        body_of(_TASK, **_ASKED),
        _CHANNEL,
        refusals=(404, 409),
    ),
    Operation(
        "POST",
        "/api/v1/channels/{channel}/tasks/states",
        states,
        f"What became of at most {MAX_IDS} tasks; unknown ones are left out. Needs requestTasks or provideTasks",
        _WHO,
        {200: record(tasks=array(_SHOWN))},
        body_of(_STATES, taskIds=array(_ID, maxItems=MAX_IDS)),
        _CHANNEL,
        refusals=(404, 409),
    ),
    Operation(
        "POST",
        "/api/v1/channels/{channel}/tasks/claim",
        claim,
        "Take a task, under a lease id of the node's own making; exactly one node gets it. Needs provideTasks, and of "
        "the requester requestTasks",
        _WHO,
        {200: record(granted=flag(True))},
        body_of(_CLAIM, **_ASKED, requester=_NODE, leaseId=_LEASE, ageMs=whole(12)),
        _CHANNEL,
        refusals=(404, 409),
    ),
    Operation(
        "POST",
        "/api/v1/channels/{channel}/tasks/finish",
        finish,
        "Report the final status of a task; the one that counts: `finished` without a result is an error. Without a "
        "lease only for a task that nobody took. 409: the lease is not in force",
        _WHO,
        {200: record(status=_STATUS)},
        body_of(
            _FINISH,
            taskId=text("unknown-task", maxLength=40),
            leaseId=_NO_LEASE,
            status=_STATUS,
            errorMessage=text("division by zero"),
        ),
        _CHANNEL,
        refusals=(404, 409),
    ),
    Operation(
        "POST",
        "/api/v1/channels/{channel}/tasks/uploads",
        upload,
        "An upload URL for a task's result, good while the lease is in force. Needs provideTasks",
        _WHO,
        {200: record(url=text("https://lab.example.org/bucket/upload/..."))},
        body_of(_UPLOAD, taskHash=_HASH, size=whole(12), leaseId=_NO_LEASE),
        _CHANNEL,
        refusals=(404, 409, 413),
    ),
    Operation(
        "POST",
        "/api/v1/nodes/leases",
        leases,
        "Report on leases: worked on, given to a backend, of backends that stopped polling, given to nobody. Answers "
        "which ended, which others there are, and how many seconds a lease lasts",
        _WHO,
        {200: record(ended=array(_LEASE), others=array(_SHOWN), leaseSeconds={"type": "number", "examples": [30]})},
        body_of(_LEASES, **dict.fromkeys(_LEASES, _IDS)),
        refusals=(409,),
    ),
)
