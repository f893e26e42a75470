"""Nodes: registered by an admin or their owner, or by themselves, waiting for approval."""

from __future__ import annotations

import time

from sqlalchemy import Connection, delete, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.core.keys import PublicKey
from kachery_lab.db.models import authorizations, nodes, task_grants
from kachery_lab.errors import Conflict, Forbidden, NotFound
from kachery_lab.services.access_data import AccessData, NodeRecord
from kachery_lab.services.audit import Act, AuditService
from kachery_lab.services.principals import Principal
from kachery_lab.services.users import add_user

REPORT_MS = 60_000
"""A node's report is written down at most this often."""
MAX_WAITING = 1000
"""Nodes that may wait for approval; further reports of unknown nodes are refused."""


class NodeService:
    """A node has one owner, who speaks for its memberships. `own` is this server's node, which stays registered."""

    def __init__(self, data: AccessData, audit: AuditService, own: NodeId) -> None:
        self._data = data
        self._audit = audit
        self._own = own

    def list(self, actor: Principal) -> list[NodeRecord]:
        """All nodes for an admin, their own for others."""
        actor.require("admin", "channel-owner")
        found = sorted(self._data.nodes.values(), key=lambda node: (node.created_at, node.node_id))
        return found if actor.may("admin") else [node for node in found if node.owner == actor.name]

    def get(self, actor: Principal, node_id: NodeId) -> NodeRecord:
        """Raises NotFound, also for nodes that the caller may not see."""
        node = self._record(node_id)
        if not self._speaks_for(actor, node):
            raise NotFound(f"there is no node {node_id}")
        return node

    def _record(self, node_id: NodeId) -> NodeRecord:
        node = self._data.nodes.get(node_id)
        if node is not None:
            return node
        if node_id == self._own:
            raise NotFound(
                f"this server's own node {node_id} is not registered yet",
                hint="Starting the server once registers it: kachery-lab start",
            )
        raise NotFound(f"there is no node {node_id}")

    def require_speaker(self, actor: Principal, node_id: NodeId) -> NodeRecord:
        """The node, if the caller may speak for it. Raises NotFound, Forbidden."""
        actor.require("admin", "channel-owner")
        return self.get(actor, node_id)

    def _require_changer(self, actor: Principal, node_id: NodeId) -> NodeRecord:
        """The node, if the caller may change its registration, which concerns all channels."""
        node = self.require_speaker(actor, node_id)
        _require_wide(actor)
        return node

    @staticmethod
    def _speaks_for(actor: Principal, node: NodeRecord) -> bool:
        return actor.may("admin") or (actor.may("channel-owner") and node.owner == actor.name)

    async def add(self, actor: Principal, node_id: NodeId, owner: UserName, label: NodeLabel) -> NodeRecord:
        """Register a node, approved. An owner may add nodes of their own. Raises Conflict when another owner has it."""
        async with self._audit.action(actor, "node.add", node_id, f"owner {owner}") as act:
            actor.require("admin", "channel-owner")
            _require_wide(actor)
            if not actor.may("admin") and owner != actor.name:
                raise Forbidden("only an admin adds nodes of others")
            PublicKey.parse(node_id, "nodeId")
            known = self._data.nodes.get(node_id)
            if known is not None and (known.approved_at is not None or not actor.may("admin")):
                raise Conflict(f"the node {node_id} is registered already")
            await self._put(node_id, owner, label, approved=True, act=act)
            return self._data.nodes[node_id]

    async def _put(
        self, node_id: NodeId, owner: UserName, label: NodeLabel, *, approved: bool, act: Act | None = None
    ) -> None:
        now = int(time.time() * 1000)
        row = {"owner": owner, "label": label, "approved_at": now if approved else None}
        statement = insert(nodes).values(node_id=node_id, created_at=now, **row)
        statement = statement.on_conflict_do_update(index_elements=[nodes.c.node_id], set_=row)

        def put(conn: Connection) -> None:
            add_user(conn, owner)
            conn.execute(statement)

        await self._data.change(put if act is None else act.recorded(put))

    async def ensure_own(self, node_id: NodeId, owner: UserName, label: NodeLabel) -> None:
        """Register this server's own node with its own hub, at start."""
        known = self._data.nodes.get(node_id)
        if known is None or known.approved_at is None or (known.owner, known.label) != (owner, label):
            await self._put(node_id, owner, label, approved=True)

    async def report(self, node_id: NodeId, owner: UserName, label: NodeLabel) -> bool:
        """A node told about itself, signed. Whether it is registered and approved; an unknown one is noted and waits.

        Raises Forbidden when it names another owner than the registered one, Conflict when too many wait.
        """
        known = self._data.nodes.get(node_id)
        if known is not None and known.owner != owner:
            raise Forbidden("this node is registered for another owner")
        if known is None:
            PublicKey.parse(node_id, "nodeId")
            if sum(node.approved_at is None for node in self._data.nodes.values()) >= MAX_WAITING:
                raise Conflict("too many nodes wait for approval")
            await self._put(node_id, owner, label, approved=False)
        now = int(time.time() * 1000)
        # Every change rewrites the copy on the volume; a node that reports all the time must not keep it busy.
        if known is None or known.label != label or now - (known.reported_at or 0) > REPORT_MS:
            statement = update(nodes).where(nodes.c.node_id == node_id).values(label=label, reported_at=now)
            await self._data.change(lambda conn: conn.execute(statement).rowcount)
        return known is not None and known.approved_at is not None

    async def approve(self, actor: Principal, node_id: NodeId) -> NodeRecord:
        """Let a waiting node in. Approving again changes nothing."""
        async with self._audit.action(actor, "node.approve", node_id) as act:
            actor.require("admin")
            node = self.get(actor, node_id)
            if node.approved_at is None:
                await self._put(node_id, UserName(node.owner), NodeLabel(node.label), approved=True, act=act)
            return self._record(node_id)

    async def update(
        self, actor: Principal, node_id: NodeId, owner: UserName | None = None, label: NodeLabel | None = None
    ) -> NodeRecord:
        """Give a node another label, or (an admin) another owner. Raises Forbidden, NotFound."""
        values = {"owner": owner, "label": label}
        values = {key: value for key, value in values.items() if value is not None}
        detail = ", ".join(f"{key} {value}" for key, value in values.items())
        async with self._audit.action(actor, "node.update", node_id, detail) as act:
            node = self._require_changer(actor, node_id)
            if owner is not None and owner != node.owner and not actor.may("admin"):
                raise Forbidden("only an admin gives a node another owner")

            def change(conn: Connection) -> None:
                if owner is not None:
                    add_user(conn, owner)
                if values:
                    conn.execute(update(nodes).where(nodes.c.node_id == node_id).values(**values))

            await self._data.change(act.recorded(change))
            return self._record(node_id)

    async def remove(self, actor: Principal, node_id: NodeId) -> None:
        """Remove a node with its memberships and authorizations. Blobs stay. Raises Conflict for the server's own."""
        async with self._audit.action(actor, "node.remove", node_id) as act:
            self._require_changer(actor, node_id)
            if node_id == self._own:
                raise Conflict("this server's own node stays", hint="Take away its authorizations instead")
            grants = delete(authorizations).where(
                authorizations.c.subject_kind == "node", authorizations.c.subject == node_id
            )
            functions = delete(task_grants).where(
                task_grants.c.subject_kind == "node", task_grants.c.subject == node_id
            )
            remove = delete(nodes).where(nodes.c.node_id == node_id)

            def change(conn: Connection) -> None:
                for statement in (grants, functions, remove):
                    conn.execute(statement)

            await self._data.change(act.recorded(change))


def _require_wide(actor: Principal) -> None:
    if actor.channels is not None:
        raise Forbidden("a token for some channels only may not do this")
