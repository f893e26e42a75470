"""What a channel's owner sets for single task functions: who may request or provide them, and for how long a backend
may keep a task.

Roles come first: nobody does with a function what the role for it does not allow. A function with entries for a side
(requesting or providing) is open on that side only to the subjects of these entries, and to the channel's owner.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, delete
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import TaskFunctionId
from kachery_lab.core.roles import Role, role_names
from kachery_lab.db.models import task_functions, task_grants
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.authorizations import SubjectKind, parse_subject
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import RoleService, Subject
from kachery_lab.services.users import add_user

EVERY = "*"
"""Stands for all functions of a channel that have no maximum run time of their own."""
DEFAULT_RUN_SECONDS = 24 * 3600
MAX_RUN_SECONDS = 366 * 24 * 3600
_SIDES = Role.REQUEST_TASKS | Role.PROVIDE_TASKS


@dataclass(frozen=True, slots=True)
class TaskFunction:
    """What is set for a function of a channel. `max_run_seconds` None: what `*` has, else 24 hours."""

    function_id: str
    max_run_seconds: int | None
    grants: tuple[tuple[str, str, Role], ...]


class TaskFunctionService:
    """Settings of functions, and the decisions that follow from them."""

    def __init__(self, data: AccessData, roles: RoleService, audit: AuditService, channels: ChannelService) -> None:
        self._data = data
        self._roles = roles
        self._audit = audit
        self._channels = channels

    # -- deciding ------------------------------------------------------------------------------------------------

    def require(self, subject: Subject, channel: str, function_id: str, role: Role) -> None:
        """Raises Forbidden naming role, function and channel. `role`: requestTasks or provideTasks."""
        self._roles.require(subject, channel, role)
        granted = self._data.task_grants.get((channel, function_id), {})
        allowed = {who for who, roles in granted.items() if roles & role}
        owner = ("user", self._data.channel(channel).owner)
        if allowed and (subject.kind, subject.name) not in {*allowed, owner}:
            raise Forbidden(
                f"{subject.kind} {subject.name} lacks {role_names(role)[0]} for the function {function_id} "
                f"in the channel {channel}",
                hint="The channel's owner says who may use this function",
            )

    def max_run_seconds(self, channel: str, function_id: str) -> int:
        """How long a backend may keep a task of this function."""
        limits = self._data.run_limits
        return limits.get((channel, function_id), limits.get((channel, EVERY), DEFAULT_RUN_SECONDS))

    # -- settings ------------------------------------------------------------------------------------------------

    def list(self, actor: Principal, channel: str) -> list[TaskFunction]:
        """Functions of a channel for which something is set, by name."""
        self._channels.require_owner(actor, channel)
        names = {name for found, name in (*self._data.run_limits, *self._data.task_grants) if found == channel}
        return [self._show(channel, name) for name in sorted(names)]

    def _show(self, channel: str, function_id: str) -> TaskFunction:
        granted = self._data.task_grants.get((channel, function_id), {})
        grants = tuple(sorted((kind, subject, roles) for (kind, subject), roles in granted.items()))
        return TaskFunction(function_id, self._data.run_limits.get((channel, function_id)), grants)

    async def limit(self, actor: Principal, channel: str, function_id: str, seconds: int | None) -> TaskFunction:
        """Set the maximum run time of a function, or of `*`; None: as if nothing was set. It counts for tasks that run
        now, too. Raises InvalidInput, NotFound."""
        async with self._audit.action(actor, "function.limit", f"{channel} {function_id}", str(seconds)):
            self._channels.require_owner(actor, channel)
            if function_id != EVERY:
                TaskFunctionId.parse(function_id)
            if seconds is not None and not 1 <= seconds <= MAX_RUN_SECONDS:
                raise InvalidInput(f"maxRunSeconds: expected 1 to {MAX_RUN_SECONDS}, or null for what `*` has")
            place = {"channel": channel, "function_id": function_id}

            def change(conn: Connection) -> None:
                here = (task_functions.c.channel == channel) & (task_functions.c.function_id == function_id)
                conn.execute(delete(task_functions).where(here))
                if seconds is not None:
                    conn.execute(insert(task_functions).values(**place, max_run_seconds=seconds))

            await self._data.change(change)
            return self._show(channel, function_id)

    async def grant(
        self, actor: Principal, channel: str, function_id: str, kind: SubjectKind, subject: str, roles: Role
    ) -> TaskFunction:
        """Set what a subject may do with a function, in place of what it was. Raises InvalidInput, NotFound."""
        what = f"{channel} {function_id} {kind}:{subject}"
        async with self._audit.action(actor, "function.grant", what, ", ".join(role_names(roles))):
            self._channels.require_owner(actor, channel)
            name, function = parse_subject(kind, subject), TaskFunctionId.parse(function_id)
            if not roles or roles & ~_SIDES:
                raise InvalidInput("roles: expected requestTasks, provideTasks or both")
            row = {"granted": int(roles), "created_at": int(time.time() * 1000)}
            place = {"channel": channel, "function_id": function, "subject_kind": kind, "subject": name}
            statement = insert(task_grants).values(**place, **row)
            statement = statement.on_conflict_do_update(index_elements=list(task_grants.primary_key), set_=row)

            def change(conn: Connection) -> None:
                if kind == "user":
                    add_user(conn, name)
                conn.execute(statement)

            await self._data.change(change)
            return self._show(channel, function_id)

    async def revoke(self, actor: Principal, channel: str, function_id: str, kind: str, subject: str) -> None:
        """Remove an entry. The last one of a side gives the function back to the roles. Raises NotFound."""
        async with self._audit.action(actor, "function.revoke", f"{channel} {function_id} {kind}:{subject}"):
            self._channels.require_owner(actor, channel)
            if (kind, subject) not in self._data.task_grants.get((channel, function_id), {}):
                raise NotFound(f"{kind} {subject} has no entry for the function {function_id} in {channel}")
            statement = delete(task_grants).where(
                task_grants.c.channel == channel,
                task_grants.c.function_id == function_id,
                task_grants.c.subject_kind == kind,
                task_grants.c.subject == subject,
            )
            await self._data.change(lambda conn: conn.execute(statement).rowcount)
