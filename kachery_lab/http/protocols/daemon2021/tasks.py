"""Tasks: asked for, taken by backends, reported on. Facts: spec/tasks.md."""

from __future__ import annotations

import asyncio
import math

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import ChannelName, RequestId, Sha1, TaskFunctionId, parse_fields, parse_whole_number
from kachery_lab.core.strict_json import shorten
from kachery_lab.core.tasks import parse_backend_id, parse_kind, parse_status, parse_task_id
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.daemon2021.auth import browser_class
from kachery_lab.http.protocols.daemon2021.translate import Answer, body_of, fields_of
from kachery_lab.http.public_url import base_url
from kachery_lab.services.task_registrations import Assignment, OfferedFunction

_FUNCTION = (frozenset({"channelName", "taskFunctionId", "taskFunctionType"}), frozenset[str]())
_REGISTER = {
    "taskFunctions": required(list),
    "backendId": optional(str, nullable=True),
    "timeoutMsec": required(float),
}
_UPDATE = {
    "channelName": required(str),
    "taskId": required(str),
    "status": required(str),
    "errorMessage": optional(str),
}
_UPLOAD = {"channelName": required(str), "taskId": required(str), "size": required(float)}
_REQUEST = {
    "channelName": required(str),
    "backendId": optional(str, nullable=True),
    "taskFunctionId": required(str),
    "taskKwargs": required(dict),
    "taskFunctionType": required(str),
    "timeoutMsec": required(float),
    "requestId": optional(str),
}
_WAIT = {
    "channelName": required(str),
    "taskId": required(str),
    "taskResultUrl": optional(str, nullable=True),
    "taskFunctionType": required(str),
    "timeoutMsec": required(float),
}


async def register_task_functions(request: Request) -> Response:
    """Long poll of a backend. Tasks that it did not stay for go back."""
    browser_class(request)
    async with body_of(request) as body:
        fields = require_fields(body, _REGISTER)
        functions = [_function(one, number) for number, one in enumerate(fields["taskFunctions"])]
    backend_id, wait_ms = parse_backend_id(fields.get("backendId")), _milliseconds(fields["timeoutMsec"])
    node = node_of(request)
    poll = asyncio.create_task(node.task_registrations.poll(functions, backend_id, wait_ms))
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({poll, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            if poll.done():
                node.task_work.give_back(task.lease_id for task in poll.result())
            return Response(status_code=200)
        found = await poll
    finally:
        gone.cancel()
        poll.cancel()
        await asyncio.gather(poll, gone, return_exceptions=True)
    answer = {"success": True, "requestedTasks": [_assignment(task) for task in found]}
    leases = [task.lease_id for task in found]
    return Answer(answer, background=BackgroundTask(node.task_work.delivered, leases) if leases else None)


def _function(value: object, number: int) -> OfferedFunction:
    where = f"taskFunctions[{number}]"
    fields = parse_fields(value, where, *_FUNCTION)
    return OfferedFunction(
        ChannelName.parse(fields["channelName"], f"{where}.channelName"),
        TaskFunctionId.parse(fields["taskFunctionId"], f"{where}.taskFunctionId"),
        parse_kind(fields["taskFunctionType"], f"{where}.taskFunctionType"),
    )


def _assignment(task: Assignment) -> dict[str, object]:
    return {
        "channelName": task.channel,
        "backendId": task.request.backend_id,
        "taskId": task.request.task_id,
        "taskHash": task.request.task_hash,
        "taskFunctionId": task.request.function_id,
        "kwargs": task.kwargs,
        "taskFunctionType": task.request.kind,
    }


async def _until_gone(request: Request) -> None:
    """Returns when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _milliseconds(value: float, where: str = "timeoutMsec") -> float:
    if math.isfinite(value) and value >= 0:
        return value
    raise InvalidInput(f"{where}: expected a number of milliseconds from 0")


async def update_task_status(request: Request) -> Response:
    """A backend reports; an overlong message is cut, not refused."""
    principal = browser_class(request)
    fields = await fields_of(request, _UPDATE)
    await node_of(request).task_work.update(
        ChannelName.parse(fields["channelName"]),
        parse_task_id(fields["taskId"]),
        parse_status(fields["status"]),
        fields.get("errorMessage"),
        principal,
    )
    return Answer({"success": True})


async def create_signed_task_result_upload_url(request: Request) -> Response:
    """Where a backend PUTs the result of a task; `taskId` is the task's hash."""
    principal = browser_class(request)
    fields = await fields_of(request, _UPLOAD)
    url = await node_of(request).task_work.upload_url(
        ChannelName.parse(fields["channelName"]),
        Sha1.parse(fields["taskId"], "taskId"),
        parse_whole_number(fields["size"], "size"),
        principal,
    )
    return Answer({"success": True, "signedUrl": _absolute(request, url)})


def _absolute(request: Request, url: str) -> str:
    return f"{base_url(request)}{url}" if url.startswith("/") else url


async def request_task(request: Request) -> Response:
    """Ask for a task, and wait a little. `requestId` makes a repeated call the same request."""
    principal = browser_class(request)
    fields = await fields_of(request, _REQUEST)
    outcome = await node_of(request).tasks.request(
        ChannelName.parse(fields["channelName"]),
        TaskFunctionId.parse(fields["taskFunctionId"]),
        parse_kind(fields["taskFunctionType"]),
        fields["taskKwargs"],
        parse_backend_id(fields.get("backendId")),
        principal,
        wait_ms=_milliseconds(fields["timeoutMsec"]),
        request_id=RequestId.parse(fields["requestId"], "requestId") if "requestId" in fields else None,
    )
    answer: dict[str, object] = {"success": True, "taskId": outcome.task_id, "status": outcome.status}
    if outcome.result_url is not None:
        answer["taskResultUrl"] = _absolute(request, outcome.result_url)
    if outcome.error is not None:
        answer["errorMessage"] = outcome.error
    return Answer(answer)


async def wait_for_task_result(request: Request) -> Response:
    """Wait for the final status. For actions the client sends null for the URL; it is not used for the others either,
    for the channel says where a result lies."""
    principal = browser_class(request)
    fields = await fields_of(request, _WAIT)
    url = fields.get("taskResultUrl")
    if url is not None and not url.startswith(("http://", "https://")):
        raise InvalidInput(f"taskResultUrl: expected null or a URL, got {shorten(url)}")
    parse_kind(fields["taskFunctionType"])
    outcome = await node_of(request).tasks.wait(
        ChannelName.parse(fields["channelName"]),
        parse_task_id(fields["taskId"]),
        principal,
        wait_ms=_milliseconds(fields["timeoutMsec"]),
    )
    answer: dict[str, object] = {"success": True, "status": outcome.status}
    if outcome.error is not None:
        answer["errorMessage"] = outcome.error
    return Answer(answer)
