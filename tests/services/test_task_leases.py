"""Leases of tasks at their hub: one holder, ends, repeats, restarts. Time is a counter that the tests set."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kachery_lab.core.ids import ChannelName, NodeId, NodeLabel, Sha1, TaskFunctionId, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.tasks import TaskKind, TaskRequest, result_path, task_hash
from kachery_lab.db.models import tasks
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.node import Node
from kachery_lab.services import task_index
from kachery_lab.services.principals import OPERATOR, Principal
from kachery_lab.services.subjects import Subject
from kachery_lab.services.task_leases import LeaseAnswer, LeaseReport, TaskLeaseService
from tests.services.opened import run_on

CHANNEL = ChannelName("recordings")
A, B, R = (NodeId(PrivateKey.from_seed(f"{number:02x}" * 32).public_hex) for number in (1, 2, 3))
NODE_A, NODE_B, ASKER = (Subject("node", node) for node in (A, B, R))
FUNCTION = TaskFunctionId("add.1")


def lease(number: int) -> str:
    return f"{number:032x}"


def task(kind: TaskKind = "query", task_id: str = "t1", n: int = 1, backend_id: str | None = None) -> TaskRequest:
    digest = task_hash(FUNCTION, {"n": n})
    return TaskRequest(digest if kind == "pure-calculation" else task_id, digest, FUNCTION, kind, backend_id)


class World:
    """A hub whose channel has three nodes with every role, and a clock."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.now = 1000.0
        self.leases = self.anew()

    def anew(self) -> TaskLeaseService:
        """As after a restart: the same database, an empty memory."""
        made = TaskLeaseService(
            self.node.data, self.node.roles, self.node.task_functions, self.node.database, 30.0, lambda: self.now
        )
        made.load()
        self.node.uploads.task_leases = made
        return made

    async def furnish(self) -> None:
        await self.node.channels.create(OPERATOR, CHANNEL, UserName("ann"))
        for number, node_id in enumerate((A, B, R)):
            await self.node.nodes.add(OPERATOR, node_id, UserName("ann"), NodeLabel(f"rig-{number}"))
            await self.node.authorizations.join(OPERATOR, CHANNEL, node_id)
            await self.node.authorizations.grant(OPERATOR, CHANNEL, "node", node_id, Role.ALL)

    async def pass_time(self, seconds: float) -> int:
        """So many seconds go by, looked at each second as a running server does; how many leases ended."""
        count = 0
        for _ in range(int(seconds)):
            self.now += 1
            count += await self.leases.sweep()
        return count

    async def state(self, task_id: str = "t1") -> tuple[str, str | None]:
        (found,) = await self.leases.states(ASKER, CHANNEL, [task_id])
        return found.state, found.error_message

    async def claim(self, who: Subject, wanted: TaskRequest, lease_id: str, age_ms: int = 0) -> bool:
        return await self.leases.claim(who, CHANNEL, wanted, R, lease_id, age_ms)

    async def renew(self, who: Subject, *renew: str, **more: list[str]) -> LeaseAnswer:
        return await self.leases.renew(who, LeaseReport(renew, **more))

    async def upload(self, who: Subject, digest: Sha1, data: bytes, lease_id: str | None) -> bool:
        async def stream() -> object:
            yield data

        ticket = self.node.uploads.issue(CHANNEL, result_path(digest), len(data), who, lease=lease_id)
        return await self.node.uploads.receive(ticket, stream(), len(data), None)  # type: ignore[arg-type]

    async def result(self, digest: Sha1) -> bytes:
        _, content = await self.node.buckets.open(CHANNEL, result_path(digest), ASKER)
        try:
            return b"".join([bytes(piece) async for piece in content.read(0, content.size)])
        finally:
            content.close()


def on_hub(root: Path, work: Callable[[World], Awaitable[None]]) -> None:
    async def run(node: Node) -> None:
        world = World(node)
        await world.furnish()
        await work(world)

    run_on(root, run, start=False)


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.leases.ask(ASKER, CHANNEL, task())
        claims = [world.claim((NODE_A, NODE_B)[n % 2], task(), lease(n)) for n in range(40)]
        granted = await asyncio.gather(*claims)
        assert sum(granted) == 1
        winner = granted.index(True)
        assert await world.claim((NODE_A, NODE_B)[winner % 2], task(), lease(winner)), "a repeat is the same claim"
        assert not await world.claim((NODE_A, NODE_B)[(winner + 1) % 2], task(), lease(winner))

    on_hub(tmp_path, work)


def test_a_lease_id_is_of_one_task(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(), lease(1))
        with pytest.raises(Conflict, match="another task"):
            await world.claim(NODE_A, task(task_id="t2", n=2), lease(1))
        assert await world.claim(NODE_A, task(task_id="t2", n=2), lease(2))

    on_hub(tmp_path, work)


@pytest.mark.parametrize("kind", ["pure-calculation", "query", "action"])
def test_a_silent_holder(tmp_path: Path, kind: TaskKind) -> None:
    """30 s without a renewal; before that, nothing ends."""

    async def work(world: World) -> None:
        wanted = task(kind)
        await world.leases.ask(ASKER, CHANNEL, wanted)
        assert await world.claim(NODE_A, wanted, lease(1))
        assert await world.pass_time(25) == 0
        assert (await world.renew(NODE_A, lease(1))).ended == ()
        assert await world.pass_time(30) == 0
        assert await world.pass_time(1) == 1
        state, message = await world.state(wanted.task_id)
        assert (await world.renew(NODE_A, lease(1))).ended == (lease(1),)
        if kind == "action":
            assert state == "error" and message is not None
            assert "rig-0" in message and A in message and "30 s" in message
            assert not await world.claim(NODE_B, wanted, lease(2)), "an action is not tried again"
        else:
            assert state == "open"
            assert await world.claim(NODE_B, wanted, lease(2))
        with pytest.raises(Conflict):
            await world.leases.finish(NODE_A, CHANNEL, wanted.task_id, lease(1), "finished")
        with pytest.raises(Conflict):
            await world.upload(NODE_A, wanted.task_hash, b'"late"', lease(1))

    on_hub(tmp_path, work)


def test_a_backend_that_stopped_polling_is_named(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task("action", backend_id="gpu"), lease(1))
        await world.renew(NODE_A, lost=[lease(1)])
        state, message = await world.state()
        assert state == "error" and message is not None and "'gpu'" in message and "rig-0" in message

    on_hub(tmp_path, work)


@pytest.mark.parametrize("kind", ["query", "action"])
def test_a_task_that_no_backend_got_goes_back(tmp_path: Path, kind: TaskKind) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(kind), lease(1))
        await world.renew(NODE_A, unused=[lease(1)])
        assert await world.state() == ("open", None)
        assert await world.claim(NODE_B, task(kind), lease(2))

    on_hub(tmp_path, work)


def test_only_the_holder_speaks_for_a_lease(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task("action"), lease(1))
        for report in ({"lost": [lease(1)]}, {"unused": [lease(1)]}, {"delivered": [lease(1)]}):
            await world.renew(NODE_B, **report)
        assert await world.state() == ("leased", None)
        with pytest.raises(Conflict):
            await world.leases.finish(NODE_B, CHANNEL, "t1", lease(1), "finished")
        with pytest.raises(Conflict):
            await world.leases.finish(NODE_B, CHANNEL, "t1", None, "finished")
        with pytest.raises(Conflict):
            await world.upload(NODE_B, task("action").task_hash, b"1", lease(1))
        assert not (await world.leases.states(NODE_A, CHANNEL, ["t1"]))[0].delivered
        assert await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "finished") == "finished"

    on_hub(tmp_path, work)


def test_the_maximum_run_time(tmp_path: Path) -> None:
    """However often the holder renews. The owner's setting counts for tasks that run already."""

    async def work(world: World) -> None:
        functions = world.node.task_functions
        assert functions.max_run_seconds(CHANNEL, FUNCTION) == 24 * 3600
        assert await world.claim(NODE_A, task(), lease(1))
        await functions.limit(OPERATOR, CHANNEL, "*", 500)
        await functions.limit(OPERATOR, CHANNEL, FUNCTION, 100)
        for _ in range(5):
            assert await world.pass_time(20) == 0
            await world.renew(NODE_A, lease(1))
        assert await world.pass_time(1) == 1
        assert await world.state() == ("open", None)
        await functions.limit(OPERATOR, CHANNEL, FUNCTION, None)
        assert functions.max_run_seconds(CHANNEL, FUNCTION) == 500
        for wrong in (0, -1, 10**12):
            with pytest.raises(InvalidInput):
                await functions.limit(OPERATOR, CHANNEL, FUNCTION, wrong)

    on_hub(tmp_path, work)


def test_a_restart_keeps_leases(tmp_path: Path) -> None:
    """Holders get a whole period to come back; what passed before counts for the run time."""

    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(), lease(1))
        await world.renew(NODE_A, lease(1), delivered=[lease(1)])
        world.now += 10_000
        world.leases = world.anew()
        assert await world.pass_time(29) == 0
        answer = await world.renew(NODE_A)
        assert [(other.lease_id, other.delivered) for other in answer.others] == [(lease(1), True)]
        assert (await world.renew(NODE_A, lease(1))).ended == ()
        assert await world.pass_time(29) == 0
        assert not await world.claim(NODE_B, task(), lease(2))
        assert await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "error", "no") == "error"

        assert await world.claim(NODE_A, task("action", "t2", n=2), lease(3))
        hour_ago = task_index.now_ms() - 25 * 3600 * 1000
        await world.node.database.write(lambda c: c.execute(tasks.update().values(leased_at=hour_ago)).rowcount)
        world.leases = world.anew()
        await world.renew(NODE_A, lease(3))
        assert await world.pass_time(1) == 1
        assert "86400 s" in str((await world.state("t2"))[1])

    on_hub(tmp_path, work)


def test_a_server_that_stood_still_ends_nothing(tmp_path: Path) -> None:
    """Nobody could renew meanwhile."""

    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(), lease(1))
        await world.pass_time(5)
        world.now += 3600
        assert await world.leases.sweep() == 0
        await world.renew(NODE_A, lease(1))
        assert await world.pass_time(30) == 0

    on_hub(tmp_path, work)


def test_final_statuses(tmp_path: Path) -> None:
    """One, the first; the same again is no error, another one is."""

    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task("action"), lease(1))
        assert await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "error", "x" * 5000) == "error"
        assert await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "finished") == "error"
        state, message = await world.state()
        assert state == "error" and message is not None and len(message) == 999
        for late in (None, lease(2)):
            with pytest.raises(Conflict):
                await world.leases.finish(NODE_A, CHANNEL, "t1", late, "finished")
        assert await world.pass_time(100) == 0
        assert await world.leases.finish(NODE_A, CHANNEL, "unknown", None, "finished") == "finished"

    on_hub(tmp_path, work)


def test_finished_needs_a_result(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        digest = task().task_hash
        assert await world.claim(NODE_A, task(), lease(1))
        assert await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "finished") == "error"
        assert "not in the channel's bucket" in str((await world.state())[1])
        assert await world.claim(NODE_A, task(task_id="t2"), lease(2))
        assert await world.upload(NODE_A, digest, b"2", lease(2))
        assert await world.leases.finish(NODE_A, CHANNEL, "t2", lease(2), "finished") == "finished"
        await world.node.buckets.forget(CHANNEL, result_path(digest), Subject("user", "ann"))
        assert (await world.state("t2"))[0] == "error"

    on_hub(tmp_path, work)


def test_a_pure_calculation_is_done_once(tmp_path: Path) -> None:
    """With a result it is finished for ever; after an error, or when the result is gone, it may be tried again."""

    async def work(world: World) -> None:
        pure = task("pure-calculation")
        assert (await world.leases.ask(ASKER, CHANNEL, pure)).state == "open"
        assert await world.claim(NODE_A, pure, lease(1))
        assert (await world.leases.ask(ASKER, CHANNEL, pure)).state == "leased"
        await world.leases.finish(NODE_A, CHANNEL, pure.task_id, lease(1), "error", "no")
        assert not await world.claim(NODE_B, pure, lease(2), age_ms=1000), "that request came before the error"
        await asyncio.sleep(0.02)
        assert await world.claim(NODE_B, pure, lease(2)), "an older node asked again"
        await world.leases.finish(NODE_B, CHANNEL, pure.task_id, lease(2), "error", "no")
        assert (await world.leases.ask(ASKER, CHANNEL, pure)).state == "open"
        assert await world.claim(NODE_A, pure, lease(3), age_ms=1000)
        await world.upload(NODE_A, pure.task_hash, b"3", lease(3))
        await world.leases.finish(NODE_A, CHANNEL, pure.task_id, lease(3), "finished")
        await asyncio.sleep(0.02)
        assert (await world.leases.ask(ASKER, CHANNEL, pure)).state == "finished"
        assert not await world.claim(NODE_B, pure, lease(4))
        with pytest.raises(Conflict, match="finished"):
            await world.upload(NODE_B, pure.task_hash, b"4", None)
        assert await world.result(pure.task_hash) == b"3"
        assert not await world.upload(NODE_B, pure.task_hash, b"3", None), "the same result again is no error"
        await world.node.buckets.forget(CHANNEL, result_path(pure.task_hash), Subject("user", "ann"))
        assert (await world.leases.ask(ASKER, CHANNEL, pure)).state == "open"

    on_hub(tmp_path, work)


def test_a_winner_is_not_overwritten(tmp_path: Path) -> None:
    """The loser's upload URL was issued in time; it is looked at again when the bytes are here."""

    async def work(world: World) -> None:
        digest = task().task_hash
        assert await world.claim(NODE_A, task(), lease(1))
        late = world.node.uploads.issue(CHANNEL, result_path(digest), 6, NODE_A, lease=lease(1))
        await world.pass_time(31)
        assert await world.claim(NODE_B, task(), lease(2))
        assert await world.upload(NODE_B, digest, b'"winner"', lease(2))

        async def stream() -> object:
            yield b'"late"'

        with pytest.raises(Conflict, match="no longer"):
            await world.node.uploads.receive(late, stream(), 6, None)  # type: ignore[arg-type]
        with pytest.raises(Conflict):
            await world.upload(NODE_A, digest, b'"older"', None)
        assert await world.result(digest) == b'"winner"'

    on_hub(tmp_path, work)


def test_a_lease_lasts_while_its_result_is_being_kept(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(), lease(1))
        async with world.leases.committing(CHANNEL, task().task_hash, NODE_A, lease(1), Sha1("a" * 40)):
            assert await world.pass_time(40) == 0
        assert await world.pass_time(1) == 1

    on_hub(tmp_path, work)


def test_roles_and_functions(tmp_path: Path) -> None:
    """Roles first; a function with entries is for these subjects and the channel's owner."""

    async def work(world: World) -> None:
        functions, grants = world.node.task_functions, world.node.authorizations
        ann = Subject("user", "ann")
        with pytest.raises(Forbidden):
            await world.leases.ask(ASKER, "nowhere", task())
        await functions.grant(OPERATOR, CHANNEL, FUNCTION, "node", A, Role.REQUEST_TASKS | Role.PROVIDE_TASKS)
        with pytest.raises(Forbidden, match=r"requestTasks for the function add\.1"):
            await world.leases.ask(ASKER, CHANNEL, task())
        await world.leases.ask(NODE_A, CHANNEL, task())
        await world.leases.ask(ann, CHANNEL, task())
        with pytest.raises(Forbidden, match="requestTasks"):
            await world.claim(NODE_A, task(), lease(1))
        await functions.grant(OPERATOR, CHANNEL, FUNCTION, "node", R, Role.REQUEST_TASKS)
        await world.leases.ask(ASKER, CHANNEL, task())
        with pytest.raises(Forbidden, match=r"provideTasks for the function"):
            await world.claim(NODE_B, task(), lease(1))
        assert await world.claim(NODE_A, task(), lease(1))
        await grants.grant(OPERATOR, CHANNEL, "node", R, Role.REQUEST_FILES)
        with pytest.raises(Forbidden, match="lacks requestTasks"):
            await world.leases.ask(ASKER, CHANNEL, task())
        await grants.grant(OPERATOR, CHANNEL, "node", R, Role.ALL)
        for node_id in (A, R):
            await functions.revoke(OPERATOR, CHANNEL, FUNCTION, "node", node_id)
        assert functions.list(OPERATOR, CHANNEL) == []
        await world.leases.ask(NODE_B, CHANNEL, task("query", "t2"))

    on_hub(tmp_path, work)


def test_who_sets_functions(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        functions = world.node.task_functions
        owner = Principal("user", "ann", frozenset({"channel-owner"}))
        other = Principal("user", "ben", frozenset({"channel-owner"}))
        await functions.grant(owner, CHANNEL, FUNCTION, "user", "carl", Role.REQUEST_TASKS)
        (found,) = functions.list(owner, CHANNEL)
        assert found.grants == (("user", "carl", Role.REQUEST_TASKS),)
        for refused in (
            functions.grant(other, CHANNEL, FUNCTION, "user", "carl", Role.REQUEST_TASKS),
            functions.revoke(other, CHANNEL, FUNCTION, "user", "carl"),
            functions.limit(other, CHANNEL, FUNCTION, 5),
            functions.revoke(owner, CHANNEL, FUNCTION, "user", "nobody"),
        ):
            with pytest.raises(NotFound):
                await refused
        for roles in (Role.NONE, Role.REQUEST_FILES):
            with pytest.raises(InvalidInput):
                await functions.grant(owner, CHANNEL, FUNCTION, "user", "carl", roles)
        assert [found.action for found in await world.node.audit.list(None, 100, outcome="not_found")].count(
            "function.grant"
        ) == 1

    on_hub(tmp_path, work)


def test_a_role_that_is_taken_away_ends_leases(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await world.claim(NODE_A, task(), lease(1))
        assert await world.claim(NODE_A, task("action", "t2", n=2), lease(2))
        await world.node.authorizations.grant(OPERATOR, CHANNEL, "node", A, Role.ALL & ~Role.PROVIDE_TASKS)
        assert await world.leases.sweep() == 2
        assert await world.state() == ("open", None)
        assert "provideTasks" in str((await world.state("t2"))[1])
        with pytest.raises(Forbidden):
            await world.leases.finish(NODE_A, CHANNEL, "t1", lease(1), "finished")
        with pytest.raises(Forbidden):
            await world.upload(NODE_A, task().task_hash, b"1", lease(1))

    on_hub(tmp_path, work)


def test_another_task_with_the_same_id(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.leases.ask(ASKER, CHANNEL, task(n=1))
        with pytest.raises(Conflict):
            await world.leases.ask(ASKER, CHANNEL, task(n=2))
        assert not await world.claim(NODE_A, task(n=2), lease(1))
        pure, elsewhere = task("pure-calculation"), task("pure-calculation", backend_id="gpu")
        await world.leases.ask(ASKER, CHANNEL, pure)
        await world.leases.ask(ASKER, CHANNEL, elsewhere)
        assert await world.claim(NODE_A, elsewhere, lease(1))

    on_hub(tmp_path, work)


def test_old_tasks_are_forgotten(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        for number in range(4):
            await world.leases.ask(ASKER, CHANNEL, task(task_id=f"t{number}"))
        assert await world.claim(NODE_A, task(task_id="t1"), lease(1))
        assert await world.claim(NODE_A, task(task_id="t2"), lease(2))
        await world.leases.finish(NODE_A, CHANNEL, "t2", lease(2), "error", "no")
        assert await world.leases.prune() == 0
        long_ago = task_index.now_ms() - 8 * 24 * 3600 * 1000
        update = tasks.update().where(tasks.c.task_id != "t3").values(changed_at=long_ago)
        await world.node.database.write(lambda conn: conn.execute(update).rowcount)
        assert await world.leases.prune() == 2
        found = await world.leases.states(ASKER, CHANNEL, ["t0", "t1", "t2", "t3"])
        assert sorted(one.request.task_id for one in found) == ["t1", "t3"]

    on_hub(tmp_path, work)
