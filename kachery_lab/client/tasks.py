"""Tasks at another server's hub: what a node asks of it about requests and leases. What fails on the way is tried again
by the caller: every request here may be repeated without a second effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kachery_lab.core.tasks import TaskRequest, parse_status
from kachery_lab.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient


@dataclass(frozen=True, slots=True)
class HubTask:
    """A task as the hub knows it. `state`: open, leased, finished or error; `lease_id` only for its holder."""

    channel: str
    request: TaskRequest
    state: str
    error_message: str | None
    holder: str | None
    lease_id: str | None
    delivered: bool

    @classmethod
    def parse(cls, value: Any) -> HubTask:
        """Raises Unavailable: an answer that cannot be read is none."""
        try:
            request = TaskRequest.parse(value)
            error, holder, lease = value.get("errorMessage"), value.get("holder"), value.get("leaseId")
            texts = (error is None or isinstance(error, str)) and isinstance(value["state"], str)
        except (InvalidInput, KeyError, TypeError, AttributeError) as failure:
            raise _unreadable() from failure
        if not texts or not all(one is None or isinstance(one, str) for one in (holder, lease)):
            raise _unreadable()
        return cls(str(value["channel"]), request, value["state"], error, holder, lease, value.get("delivered") is True)


class TasksClient:
    """Speaks for one node about tasks. Raises what the hub refuses, and Unavailable."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub

    async def ask(self, channel: str, request: TaskRequest) -> HubTask:
        """This node wants a task done."""
        return HubTask.parse(await self._hub.post(f"/api/v1/channels/{channel}/tasks", request.to_json()))

    async def states(self, channel: str, task_ids: Sequence[str]) -> list[HubTask]:
        """Those of these tasks that the hub knows."""
        answer = await self._hub.post(f"/api/v1/channels/{channel}/tasks/states", {"taskIds": list(task_ids)})
        return [HubTask.parse(one) for one in _list(answer, "tasks")]

    async def claim(self, channel: str, request: TaskRequest, requester: str, lease_id: str, age_ms: int) -> bool:
        """Take a task for a backend here; whether this node has it."""
        body = {**request.to_json(), "requester": requester, "leaseId": lease_id, "ageMs": age_ms}
        return (await self._hub.post(f"/api/v1/channels/{channel}/tasks/claim", body)).get("granted") is True

    async def renew(self, report: Mapping[str, Sequence[str]]) -> tuple[list[str], list[HubTask], float]:
        """Report on all leases: which have ended, which others the hub has, and how long they last, in seconds."""
        answer = await self._hub.post("/api/v1/nodes/leases", {name: list(ids) for name, ids in report.items()})
        seconds = answer.get("leaseSeconds")
        if not isinstance(seconds, int | float) or seconds <= 0:
            raise _unreadable()
        others = [HubTask.parse(one) for one in _list(answer, "others")]
        return [str(one) for one in _list(answer, "ended")], others, float(seconds)

    async def finish(self, channel: str, task_id: str, lease_id: str | None, status: str, message: str | None) -> str:
        """Report a final status; the one that the task has then."""
        body = {"taskId": task_id, "leaseId": lease_id, "status": status, "errorMessage": message}
        answer = await self._hub.post(f"/api/v1/channels/{channel}/tasks/finish", body)
        try:
            return parse_status(answer.get("status"))
        except InvalidInput as error:
            raise _unreadable() from error

    async def upload_url(self, channel: str, task_hash: str, size: int, lease_id: str | None) -> str:
        """Where to PUT a result."""
        body = {"taskHash": task_hash, "size": size, "leaseId": lease_id}
        answer = await self._hub.post(f"/api/v1/channels/{channel}/tasks/uploads", body)
        return self._hub.followed(str(answer.get("url")))


def _list(answer: dict[str, Any], name: str) -> list[Any]:
    found = answer.get(name)
    if not isinstance(found, list):
        raise _unreadable()
    return found


def _unreadable() -> Unavailable:
    return Unavailable("the hub's answer about tasks cannot be read", hint="Does it run this version, or a newer one?")
