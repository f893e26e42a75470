"""Requests, registrations and held tasks of one node whose channels are its own: backends are calls of the services."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.band_messages import sign_message
from kachery_lab.core.ids import ChannelName, NodeId, NodeLabel, Sha1, TaskFunctionId, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.tasks import TaskKind, result_path, task_hash
from kachery_lab.errors import Conflict, Forbidden, NotFound, RequestIdReused, TooLarge
from kachery_lab.node import Node
from kachery_lab.services.bands import wanted
from kachery_lab.services.principals import OPERATOR, Principal, local
from kachery_lab.services.subjects import Subject
from kachery_lab.services.task_registrations import AT_ONCE, Assignment, OfferedFunction
from kachery_lab.services.tasks import TaskOutcome
from tests.services.opened import run_on

CHANNEL = ChannelName("recordings")
ADD = TaskFunctionId("add.1")
OLDER = PrivateKey.from_seed("07" * 32)
LAB = local(None)


class World:
    """A running node with every role in its own channel, and an older node beside it."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def furnish(self) -> None:
        node, older = self.node, NodeId(OLDER.public_hex)
        await node.channels.create(OPERATOR, CHANNEL, UserName("ann"))
        await node.nodes.add(OPERATOR, older, UserName("ann"), NodeLabel("older"))
        for one in (node.identity.node_id, older):
            await node.authorizations.join(OPERATOR, CHANNEL, one)
            await node.authorizations.grant(OPERATOR, CHANNEL, "node", one, Role.ALL)
        await self.listening()

    async def listening(self) -> None:
        """Until both nodes have their roles on the bands, and this one hears what these let it hear."""
        node, bands = self.node, self.node.own_bands
        both = (node.identity.node_id, NodeId(OLDER.public_hex))
        async with asyncio.timeout(60):
            while any(node.hub_bands.roles(one).get(CHANNEL) != Role.ALL for one in both):
                await asyncio.sleep(0.01)
            topics = set(wanted(bands.channels(), node.band_handlers))
            while bands._connection is None or not topics <= bands._connection.wanted:
                await asyncio.sleep(0.01)

    async def ask(self, kind: TaskKind = "query", wait_ms: float = 0, **more: Any) -> TaskOutcome:
        backend_id, kwargs = more.pop("backend_id", None), more.pop("kwargs", {"x": 1})
        return await self.node.tasks.request(CHANNEL, ADD, kind, kwargs, backend_id, LAB, wait_ms=wait_ms, **more)

    async def poll(
        self, kind: TaskKind = "query", wait_ms: float = 2000, backend_id: str | None = None
    ) -> list[Assignment]:
        return await self.node.task_registrations.poll([OfferedFunction(CHANNEL, ADD, kind)], backend_id, wait_ms)

    async def put(self, digest: Sha1, data: bytes, lease: str | None, who: str) -> None:
        async def stream() -> Any:
            yield data

        uploads = self.node.uploads
        ticket = uploads.issue(CHANNEL, result_path(digest), len(data), Subject("node", who), lease=lease)
        await uploads.receive(ticket, stream(), len(data), None)

    async def finish(self, task: Assignment, data: bytes = b"2") -> None:
        if task.request.has_result:
            url = await self.node.task_work.upload_url(CHANNEL, task.request.task_hash, len(data), LAB)
            assert url.startswith("/bucket/upload/")
            await self.put(task.request.task_hash, data, task.lease_id, self.node.identity.node_id)
        await self.node.task_work.update(CHANNEL, task.request.task_id, "finished", None, LAB)

    async def older_says(self, body: dict[str, Any], band: str) -> None:
        """A message of a node that knows nothing of leases."""
        bands = self.node.hub_bands
        connection = bands.open(NodeId(OLDER.public_hex))
        try:
            await bands.publish(connection, CHANNEL, band, [sign_message(OLDER, body)])
        finally:
            bands.close(connection)


def on_node(root: Path, work: Callable[[World], Awaitable[None]]) -> None:
    async def run(node: Node) -> None:
        world = World(node)
        await world.furnish()
        await work(world)

    run_on(root, run)


@pytest.mark.parametrize("kind", ["pure-calculation", "query", "action"])
def test_there_and_back(tmp_path: Path, kind: TaskKind) -> None:
    async def work(world: World) -> None:
        polling = asyncio.create_task(world.poll(kind))
        await asyncio.sleep(0.1)
        asked = await world.ask(kind)
        assert asked.status == "waiting"
        assert (asked.result_url is None) == (kind == "action")
        (task,) = await polling
        assert (task.request.task_id, task.kwargs) == (asked.task_id, {"x": 1})
        waiting = asyncio.create_task(world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=5000))
        await asyncio.sleep(0.1)
        await world.finish(task)
        assert (await waiting).status == "finished"
        with pytest.raises(Conflict):
            await world.node.task_work.update(CHANNEL, asked.task_id, "error", "late", LAB)
        again = await world.ask(kind, kwargs={"x": 1})
        assert again.status == ("finished" if kind == "pure-calculation" else "waiting")

    on_node(tmp_path, work)


def test_s3_an_error_names_no_ticket(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        asked = await world.ask("action")
        await world.poll("action")
        said = "HTTPError: 503 for url: http://hub.lab/bucket/upload/eyJjaGFubmVs.c2VjcmV0"
        await world.node.task_work.update(CHANNEL, asked.task_id, "error", said, LAB)
        found = await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=10_000)
        assert (found.error or "").startswith("HTTPError: 503 for url: http://hub.lab/bucket/upload/")
        assert "eyJ" not in (found.error or "")

    on_node(tmp_path, work)


def test_intermediate_statuses_are_told(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        asked = await world.ask("action")
        (task,) = await world.poll("action")
        await world.node.task_work.update(CHANNEL, asked.task_id, "running", None, LAB)
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=200)).status == "running"
        await world.node.task_work.update(CHANNEL, asked.task_id, "error", "x" * 3000, LAB)
        found = await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=2000)
        assert (found.status, len(found.error or "")) == ("error", 999)
        assert task.request.task_id == asked.task_id

    on_node(tmp_path, work)


def test_the_one_that_waited_longest_gets_it(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        polls = []
        for backend_id in ("other", None, None):
            polls.append(asyncio.create_task(world.poll(wait_ms=700, backend_id=backend_id)))
            await asyncio.sleep(0.05)
        asked = await world.ask()
        found = await asyncio.gather(*polls)
        assert [[task.request.task_id for task in tasks] for tasks in found] == [[], [asked.task_id], []]

    on_node(tmp_path, work)


def test_a_backend_that_goes_away_leaves_everything_to_others(tmp_path: Path) -> None:
    """Before a task came, while it is claimed, and after it was claimed without being sent."""

    async def work(world: World) -> None:
        first = asyncio.create_task(world.poll())
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        asked = await world.ask()
        claiming = asyncio.create_task(world.poll())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.gather(claiming, return_exceptions=True)
        waiting = asyncio.create_task(world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=20_000))
        (task,) = await world.poll(wait_ms=15_000)
        assert task.request.task_id == asked.task_id
        world.node.task_work.give_back([task.lease_id])
        (task,) = await world.poll(wait_ms=15_000)
        assert task.request.task_id == asked.task_id
        await world.finish(task)
        assert (await waiting).status == "finished"

    on_node(tmp_path, work)


def test_not_too_many_at_once(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        ids = [(await world.ask()).task_id for _ in range(AT_ONCE + 2)]
        first, second = await world.poll(), await world.poll()
        assert [len(first), len(second)] == [AT_ONCE, 2]
        assert {task.request.task_id for task in first + second} == set(ids)

    on_node(tmp_path, work)


def test_a_wrong_type(tmp_path: Path) -> None:
    """An error after a second, unless somebody offers the right one."""

    async def work(world: World) -> None:
        polls = [asyncio.create_task(world.poll("query", 3000))]
        await asyncio.sleep(0.05)
        found = await world.ask("action", 3000)
        assert (found.status, found.error) == ("error", "add.1 is offered as query, not as action")
        polls.append(asyncio.create_task(world.poll("action", 3000)))
        await asyncio.sleep(0.05)
        found = await world.ask("action")
        assert [task.request.task_id for task in await polls[1]] == [found.task_id]
        assert await polls[0] == []

    on_node(tmp_path, work)


def test_refusals(tmp_path: Path) -> None:
    """Errors, not silence; and nothing is left of them."""

    async def work(world: World) -> None:
        tasks, node_id = world.node.tasks, world.node.identity.node_id
        with pytest.raises(TooLarge):
            await world.ask("action", kwargs={"x": "y" * 70_000})
        with pytest.raises(NotFound):
            await tasks.request("nowhere", ADD, "action", {}, None, LAB, wait_ms=0)
        with pytest.raises(RequestIdReused):
            for x in (1, 1, 2):
                await world.ask("action", kwargs={"x": x}, request_id="a")
        for kind in ("user", "browser"):
            other = Principal(kind, "ben", frozenset({"admin"}))  # type: ignore[arg-type]
            if kind == "user":
                with pytest.raises(Forbidden, match="user ben lacks requestTasks"):
                    await tasks.request(CHANNEL, ADD, "action", {}, None, other, wait_ms=0)
            else:
                await tasks.request(CHANNEL, ADD, "action", {}, None, other, wait_ms=0)
        await world.node.authorizations.grant(OPERATOR, CHANNEL, "node", node_id, Role.REQUEST_FILES)
        for refused in (
            world.ask("action"),
            tasks.wait(CHANNEL, "x", LAB, wait_ms=0),
            world.node.task_work.update(CHANNEL, "x", "running", None, LAB),
            world.node.task_work.update(CHANNEL, "x", "finished", None, LAB),
            world.node.task_work.upload_url(CHANNEL, Sha1("a" * 40), 1, LAB),
        ):
            with pytest.raises(Forbidden, match="Tasks in the channel recordings"):
                await refused

    on_node(tmp_path, work)


def test_a_role_that_goes_away_ends_the_wait(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        asked = await world.ask("action")
        waiting = asyncio.create_task(world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=20_000))
        await asyncio.sleep(0.1)
        node_id = world.node.identity.node_id
        await world.node.authorizations.grant(OPERATOR, CHANNEL, "node", node_id, Role.PROVIDE_FILES)
        found = await asyncio.wait_for(waiting, 8)
        assert found.status == "error" and "requestTasks" in str(found.error)

    on_node(tmp_path, work)


def test_an_older_node_that_claims_nothing(tmp_path: Path) -> None:
    """Its word counts for a task that nobody has a lease for, when the result is there; else a holder's does."""

    async def work(world: World) -> None:
        digest = task_hash(ADD, {"x": 1})

        async def says(task_id: str, status: str, **more: str) -> None:
            body = {"type": "updateTaskStatus", "taskId": task_id, "status": status, **more}
            await world.older_says(body, "provideTasks")

        asked = await world.ask("action")
        await says(asked.task_id, "finished")
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=3000)).status == "finished"

        asked = await world.ask("query")
        await says(asked.task_id, "finished")
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=3000)).status == "error"
        asked = await world.ask("query")
        await world.put(digest, b"7", None, OLDER.public_hex)
        await says(asked.task_id, "finished")
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=3000)).status == "finished"

        asked = await world.ask("action", kwargs={"x": 2})
        found = await world.poll("action")
        assert [task.request.task_id for task in found] == [asked.task_id]
        await says(asked.task_id, "error", errorMessage="not mine")
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=1000)).status == "waiting"
        await world.finish(found[0])
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=3000)).status == "finished"

        body = {"type": "requestTask", "taskId": "old", "taskFunctionId": ADD, "taskFunctionType": "action"}
        await world.older_says({**body, "taskKwargs": {"x": 3}, "backendId": None}, "requestTasks")
        assert [task.request.task_id for task in await world.poll("action")] == ["old"]

    on_node(tmp_path, work)


def test_a_result_that_is_gone(tmp_path: Path) -> None:
    """A finished task is an error then; asked for again, it is done again."""

    async def work(world: World) -> None:
        asked = await world.ask("pure-calculation")
        (task,) = await world.poll("pure-calculation")
        await world.finish(task)
        assert (await world.ask("pure-calculation")).status == "finished"
        await world.node.buckets.forget(CHANNEL, result_path(task.request.task_hash), Subject("user", "ann"))
        found = await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=0)
        assert found.status == "error" and "not in the channel's bucket" in str(found.error)
        assert (await world.ask("pure-calculation")).status == "waiting"
        assert len(await world.poll("pure-calculation")) == 1

    on_node(tmp_path, work)


def test_what_is_unknown_here(tmp_path: Path) -> None:
    """The hub is asked about it, as after a restart of this node; what it does not know is an error."""

    async def work(world: World) -> None:
        asked = await world.ask("action")
        (task,) = await world.poll("action")
        await world.finish(task)
        world.node.tasks._records.clear()
        assert (await world.node.tasks.wait(CHANNEL, asked.task_id, LAB, wait_ms=0)).status == "finished"
        assert (await world.node.tasks.wait(CHANNEL, "never", LAB, wait_ms=5000)).status == "error"

    on_node(tmp_path, work)


def test_probes(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        bands = world.node.hub_bands
        listener = bands.open(NodeId(OLDER.public_hex))
        await bands.subscribe(listener, CHANNEL, "provideTasks")
        probe = {"type": "probeTaskFunctions", "taskFunctionIds": [ADD, "other.1"]}
        polling = asyncio.create_task(world.poll("query", 3000))
        await asyncio.sleep(0.05)
        await world.older_says({**probe, "backendId": "gpu"}, "requestTasks")
        await world.older_says(probe, "requestTasks")
        (delivery,) = await asyncio.wait_for(listener.take(), 5)
        functions = delivery.message.body["registeredTaskFunctions"]
        assert functions == [{"channelName": CHANNEL, "taskFunctionId": ADD, "taskFunctionType": "query"}]
        polling.cancel()
        bands.close(listener)

    on_node(tmp_path, work)
