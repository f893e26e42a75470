"""Tasks at a channel's hub as the node's own services use them, whether the hub is this server or another one.

Requests, claims and final statuses are decided there (`TaskLeaseService`); the bands only carry the news.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kachery_lab.client.tasks import HubTask, TasksClient
from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.roles import Role, role_names
from kachery_lab.core.tasks import TaskRequest, TaskStatus, parse_status, result_path
from kachery_lab.errors import Forbidden
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.bands import ChannelBands
from kachery_lab.services.federation import JoinedHub
from kachery_lab.services.offers import ChannelFinder
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import RoleService, Subject, subject_of
from kachery_lab.services.task_index import TaskRecord
from kachery_lab.services.task_leases import LeaseReport, TaskLeaseService
from kachery_lab.services.uploads import UploadService


class HubTasks(Protocol):
    """The tasks of one hub's channels, for this node. Everything may be repeated. Raises Forbidden (naming role and
    channel, in the audit), NotFound for a channel that is not there, Conflict where it says so, and Unavailable."""

    async def authorize(self, channel: str, role: Role, principal: Principal) -> None:
        """Raises Forbidden or NotFound unless the caller has a role in the channel now."""

    async def ask(self, channel: str, request: TaskRequest, principal: Principal) -> HubTask:
        """Somebody here wants a task done: the task as it is. Conflict: another task has this id, or too many wait."""

    async def states(self, channel: str, task_ids: Sequence[str]) -> list[HubTask]:
        """Those of these tasks that the hub knows, at most 500."""

    async def result_url(self, channel: str, task_hash: Sha1, principal: Principal) -> str:
        """Where the caller reads a result without a credential, whether it is there or not. One that begins with `/` is
        relative to the address that the client used."""

    async def has_result(self, channel: str, task_hash: Sha1) -> bool:
        """Whether a result is in the bucket."""

    async def claim(self, channel: str, request: TaskRequest, requester: NodeId, lease_id: str, age_ms: int) -> bool:
        """Take a task for a backend here; see `TaskLeaseService.claim`."""

    async def renew(self, report: LeaseReport) -> tuple[list[str], list[HubTask], float]:
        """Report on leases: those that ended, others that the hub has for this node, seconds that a lease lasts."""

    async def finish(
        self, channel: str, task_id: str, lease_id: str | None, status: TaskStatus, message: str | None
    ) -> TaskStatus:
        """Report a final status; the one that counts. Conflict: the lease is not in force."""

    async def upload_url(self, channel: str, task_hash: Sha1, size: int, lease_id: str | None) -> str:
        """Where a backend PUTs a result; as `result_url`. At the PUT, Conflict: the lease is not in force."""


@dataclass(frozen=True, eq=False)
class TaskHub:
    """One hub: its bands and its tasks. `remote`: it is another server."""

    bands: ChannelBands
    tasks: HubTasks
    remote: bool


class TaskHubs:
    """The hubs whose channels this node takes part in."""

    def __init__(self, finder: ChannelFinder) -> None:
        self._finder = finder
        self._hubs: list[TaskHub] = []
        self._known: dict[str, TaskHub] = {}

    def add(self, bands: ChannelBands, tasks: HubTasks, *, remote: bool) -> None:
        """One more."""
        self._hubs.append(TaskHub(bands, tasks, remote))

    def __iter__(self) -> Iterator[TaskHub]:
        return iter(self._hubs)

    async def find(self, channel: str) -> TaskHub:
        """The hub of a channel's bare name."""
        for hub in self._hubs:
            # The other hub says when this changes: no need to ask. While it is away, what it said last counts.
            if hub.remote and (channels := hub.bands.channels()):
                self._known = dict.fromkeys(channels, hub)
        return self._known.get(channel) or self.of((await self._finder.find(channel)).bands)

    def of(self, bands: ChannelBands) -> TaskHub:
        """The hub that these bands belong to."""
        return next(hub for hub in self._hubs if hub.bands is bands)


def shown(task: TaskRecord, reader: str) -> HubTask:
    """A task as one node sees it: leases are their holder's business."""
    mine = task.holder == reader
    return HubTask(
        task.channel,
        task.request,
        task.state,
        task.error_message,
        task.holder,
        task.lease_id if mine else None,
        task.delivered,
    )


class OwnHubTasks:
    """The tasks of this server's own channels."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        audit: AuditService,
        leases: TaskLeaseService,
        uploads: UploadService,
        own_node: NodeId,
    ) -> None:
        self._data = data
        self._roles = roles
        self._audit = audit
        self._leases = leases
        self._uploads = uploads
        self._own_node = own_node
        self._node = Subject("node", own_node)

    async def authorize(self, channel: str, role: Role, principal: Principal) -> None:
        """As `HubTasks`."""
        self._data.channel(channel)
        subject = subject_of(principal, self._own_node)
        who = f"{principal.kind}:{principal.name}"
        async with self._audit.refusals(who, principal.peer, f"channel.{role_names(role)[0]}", channel):
            if not principal.covers(channel):
                raise Forbidden(f"the token does not reach the channel {channel}")
            self._roles.require(subject, channel, role)

    async def ask(self, channel: str, request: TaskRequest, principal: Principal) -> HubTask:
        """As `HubTasks`."""
        await self.authorize(channel, Role.REQUEST_TASKS, principal)
        who = f"{principal.kind}:{principal.name}"
        async with self._audit.refusals(who, principal.peer, "task.request", f"{channel} {request.function_id}"):
            task = await self._leases.ask(subject_of(principal, self._own_node), channel, request)
        return shown(task, self._own_node)

    async def states(self, channel: str, task_ids: Sequence[str]) -> list[HubTask]:
        """As `HubTasks`."""
        return [shown(task, self._own_node) for task in await self._leases.states(self._node, channel, task_ids)]

    async def result_url(self, channel: str, task_hash: Sha1, principal: Principal) -> str:
        """As `HubTasks`."""
        capability = self._uploads.capability(channel, subject_of(principal, self._own_node))
        return f"/bucket/~{capability}/{channel}/{result_path(task_hash).text}"

    async def has_result(self, channel: str, task_hash: Sha1) -> bool:
        """As `HubTasks`."""
        return await self._leases.has_result(channel, task_hash)

    async def claim(self, channel: str, request: TaskRequest, requester: NodeId, lease_id: str, age_ms: int) -> bool:
        """As `HubTasks`."""
        return await self._leases.claim(self._node, channel, request, requester, lease_id, age_ms)

    async def renew(self, report: LeaseReport) -> tuple[list[str], list[HubTask], float]:
        """As `HubTasks`."""
        answer = await self._leases.renew(self._node, report)
        return list(answer.ended), [shown(task, self._own_node) for task in answer.others], answer.seconds

    async def finish(
        self, channel: str, task_id: str, lease_id: str | None, status: TaskStatus, message: str | None
    ) -> TaskStatus:
        """As `HubTasks`."""
        return await self._leases.finish(self._node, channel, task_id, lease_id, status, message)

    async def upload_url(self, channel: str, task_hash: Sha1, size: int, lease_id: str | None) -> str:
        """As `HubTasks`."""
        ticket = self._uploads.issue(channel, result_path(task_hash), size, self._node, lease=lease_id)
        return f"/bucket/upload/{ticket}"


class JoinedHubTasks:
    """The tasks of another hub's channels. The hub decides; roles are looked at here for the text of a refusal."""

    def __init__(self, joined: JoinedHub, client: TasksClient) -> None:
        self._joined = joined
        self._client = client

    async def authorize(self, channel: str, role: Role, principal: Principal) -> None:
        """As `HubTasks`. What the hub said last is enough to let through; it decides at each use."""
        if not principal.covers(channel) or not self._joined.bands.channels().get(channel, Role.NONE) & role:
            await self._joined.require(channel, role_names(role)[0], principal)

    async def ask(self, channel: str, request: TaskRequest, principal: Principal) -> HubTask:
        """As `HubTasks`."""
        await self.authorize(channel, Role.REQUEST_TASKS, principal)
        async with self._joined.refusals(principal, "task.request", f"{channel} {request.function_id}"):
            return await self._client.ask(channel, request)

    async def states(self, channel: str, task_ids: Sequence[str]) -> list[HubTask]:
        """As `HubTasks`."""
        return await self._client.states(channel, task_ids)

    async def result_url(self, channel: str, task_hash: Sha1, principal: Principal) -> str:
        """As `HubTasks`."""
        membership = await self._joined.require(channel, "requestTasks", principal)
        return f"{membership.bucket_url}/{result_path(task_hash).text}"

    async def has_result(self, channel: str, task_hash: Sha1) -> bool:
        """As `HubTasks`."""
        return await self._joined.has_object(channel, result_path(task_hash))

    async def claim(self, channel: str, request: TaskRequest, requester: NodeId, lease_id: str, age_ms: int) -> bool:
        """As `HubTasks`."""
        return await self._client.claim(channel, request, requester, lease_id, age_ms)

    async def renew(self, report: LeaseReport) -> tuple[list[str], list[HubTask], float]:
        """As `HubTasks`."""
        return await self._client.renew(
            {
                "renew": report.renew,
                "delivered": report.delivered,
                "lost": report.lost,
                "unused": report.unused,
            }
        )

    async def finish(
        self, channel: str, task_id: str, lease_id: str | None, status: TaskStatus, message: str | None
    ) -> TaskStatus:
        """As `HubTasks`."""
        return parse_status(await self._client.finish(channel, task_id, lease_id, status, message))

    async def upload_url(self, channel: str, task_hash: Sha1, size: int, lease_id: str | None) -> str:
        """As `HubTasks`."""
        return await self._client.upload_url(channel, task_hash, size, lease_id)
