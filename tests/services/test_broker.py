"""The broker: who gets what, who may what at which moment, and that a slow reader costs nobody else anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.band_messages import SignedBody, sign_message
from kachery_lab.core.bands import BANDS, role_for
from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import NAMES, Role
from kachery_lab.errors import Forbidden, InvalidInput, NotFound, TooManyRequests
from kachery_lab.node import Node
from kachery_lab.services import broker, member_connections
from kachery_lab.services.member_connections import ConnectionEnded, Delivery, End, MemberConnection
from tests.bands import BODIES
from tests.services.opened import ADMIN, ANN, RECORDINGS, furnish, outcomes, run_on


class Member:
    """A node with a key and, in `recordings`, roles."""

    def __init__(self, number: int) -> None:
        self.key = PrivateKey.from_seed(f"{number:02x}" * 32)
        self.id = NodeId(self.key.public_hex)
        self.connection: MemberConnection

    async def enter(self, node: Node, roles: Role = Role.ALL, **how: Any) -> Member:
        await node.nodes.add(ADMIN, self.id, UserName("ann"), NodeLabel("rig"))
        await node.authorizations.join(ADMIN, RECORDINGS, self.id)
        await self.grant(node, roles)
        self.connection = node.hub_bands.open(self.id, **how)
        return self

    async def grant(self, node: Node, roles: Role) -> None:
        await node.authorizations.grant(ANN, RECORDINGS, "node", self.id, roles)

    def signed(self, band: str, **fields: Any) -> SignedBody:
        return sign_message(self.key, {**BODIES[band], **fields})

    async def got(self, seconds: float = 0.05) -> list[Any]:
        """What waits, after a moment."""
        await asyncio.sleep(seconds)
        found: list[Any] = []
        while len(self.connection):
            found += await self.connection.take()
        return found


def on_node(tmp_path: Path, work: Callable[[Node], Awaitable[None]]) -> None:
    async def furnished(node: Node) -> None:
        await furnish(node)
        await work(node)

    run_on(tmp_path, furnished)


async def settled() -> None:
    """Rights of open connections have followed."""
    await asyncio.sleep(2 * broker.REFRESH_SECONDS)


def test_all_subscribers_get_it_in_order_the_publisher_too(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        members = [await Member(number).enter(node) for number in range(16, 21)]
        publisher, *others, deaf = members
        for member in (publisher, *others):
            await node.hub_bands.subscribe(member.connection, RECORDINGS, "requestFiles")
            await node.hub_bands.subscribe(member.connection, RECORDINGS, "requestFiles")
        await node.hub_bands.subscribe(deaf.connection, RECORDINGS, "provideFiles")
        sent = [publisher.signed("requestFiles", fileKey={"sha1": f"{number:040x}"}) for number in range(50)]
        for message in sent[:25]:
            await node.hub_bands.publish(publisher.connection, RECORDINGS, "requestFiles", [message])
        await node.hub_bands.publish(publisher.connection, RECORDINGS, "requestFiles", sent[25:])
        for member in (publisher, *others):
            got = await member.got()
            assert [one.message for one in got] == sent
            assert {(one.channel, one.band) for one in got} == {(RECORDINGS, "requestFiles")}
        assert await deaf.got() == []
        node.hub_bands.unsubscribe(others[0].connection, RECORDINGS, "requestFiles")
        node.hub_bands.unsubscribe(others[0].connection, RECORDINGS, "requestFiles")
        await node.hub_bands.publish(publisher.connection, RECORDINGS, "requestFiles", [sent[0]])
        assert [len(await one.got(0)) for one in others] == [0, 1, 1]

    on_node(tmp_path, work)


def test_each_right_needs_its_role(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        member = await Member(16).enter(node)
        for role_name, role in NAMES.items():
            await member.grant(node, role)
            for band in BANDS:
                message = [member.signed(band)]
                for right in ("publish", "subscribe"):
                    allowed = role_for(band, right) == role  # type: ignore[arg-type]
                    call = (
                        node.hub_bands.publish(member.connection, RECORDINGS, band, message)
                        if right == "publish"
                        else node.hub_bands.subscribe(member.connection, RECORDINGS, band)
                    )
                    if allowed:
                        await call
                    else:
                        with pytest.raises(Forbidden, match=RECORDINGS) as refused:
                            await call
                        assert role_name not in refused.value.message
        assert len(await outcomes(node, "band.publish")) == len(await outcomes(node, "band.subscribe")) == 6

    on_node(tmp_path, work)


def test_only_for_members(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        member = await Member(16).enter(node)
        for channel in ("tracking", "nowhere"):
            with pytest.raises(NotFound):
                await node.hub_bands.subscribe(member.connection, channel, "requestFiles")
            with pytest.raises(NotFound):
                await node.hub_bands.publish(
                    member.connection, channel, "requestFiles", [member.signed("requestFiles")]
                )
        with pytest.raises(InvalidInput, match="requestFiles"):
            await node.hub_bands.subscribe(member.connection, RECORDINGS, "secrets")
        with pytest.raises(Forbidden, match="approved"):
            node.hub_bands.open(Member(99).id)
        await node.nodes.report(Member(98).id, UserName("zoe"), NodeLabel("x"))
        with pytest.raises(Forbidden, match="approved"):
            node.hub_bands.open(Member(98).id)

    on_node(tmp_path, work)


def test_forged_and_misplaced_messages(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        member, other = await Member(16).enter(node), await Member(17).enter(node)
        for band in BANDS:
            await node.hub_bands.subscribe(other.connection, RECORDINGS, band)
        good = member.signed("requestFiles")
        bad: list[tuple[str, list[SignedBody], type[Exception]]] = [
            ("requestFiles", [other.signed("requestFiles")], Forbidden),
            ("requestFiles", [good, other.signed("requestFiles")], Forbidden),
            ("requestFiles", [replace(good, signature="0" * 128)], InvalidInput),
            ("requestFiles", [replace(good, canonical=good.canonical.replace("9", "8"))], InvalidInput),
            ("requestFiles", [member.signed("provideFiles")], InvalidInput),
            ("provideFeeds", [good], InvalidInput),
        ]
        for band, messages, error in bad:
            with pytest.raises(error):
                await node.hub_bands.publish(member.connection, RECORDINGS, band, messages)
        assert await other.got() == []
        await node.hub_bands.publish(member.connection, RECORDINGS, "requestFiles", [good])
        assert len(await other.got()) == 1

    on_node(tmp_path, work)


def test_a_slow_reader_is_cut_off_and_nobody_else_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "MAX_QUEUED", 50)

    async def work(node: Node) -> None:
        publisher, slow, quick = [await Member(number).enter(node) for number in (16, 17, 18)]
        for member in (slow, quick):
            await node.hub_bands.subscribe(member.connection, RECORDINGS, "requestFiles")
        got = []
        for _ in range(200):
            await node.hub_bands.publish(
                publisher.connection, RECORDINGS, "requestFiles", [publisher.signed("requestFiles")]
            )
            got += await quick.connection.take()
        assert len(got) == 200
        assert slow.connection.end == End("slow_reader", "50 messages were waiting to be read")
        assert slow.connection.queued_bytes == 0
        with pytest.raises(ConnectionEnded, match="50 messages"):
            await slow.connection.take()
        assert (await slow.connection.wait_end()).code == "slow_reader"
        assert not node.hub_bands.present(slow.id)
        assert node.hub_bands.present(quick.id)

    on_node(tmp_path, work)


def test_bytes_are_bounded_one_by_one_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "MAX_QUEUED_BYTES", 100_000)
    monkeypatch.setattr(broker, "MAX_QUEUED_TOTAL", 200_000)

    async def work(node: Node) -> None:
        publisher, *readers = [await Member(number).enter(node) for number in range(16, 22)]
        big = publisher.signed("requestTasks", taskFunctionIds=["f" * 400] * 20)
        assert len(big.canonical) > 8000
        await node.hub_bands.subscribe(readers[0].connection, RECORDINGS, "requestTasks")
        for _ in range(20):
            await node.hub_bands.publish(publisher.connection, RECORDINGS, "requestTasks", [big])
        assert readers[0].connection.end is not None
        for member in readers[1:]:
            await node.hub_bands.subscribe(member.connection, RECORDINGS, "requestTasks")
        node.hub_bands.unsubscribe(readers[4].connection, RECORDINGS, "requestTasks")
        for _ in range(9):
            await node.hub_bands.publish(publisher.connection, RECORDINGS, "requestTasks", [big])
        ended = [member.connection.end for member in readers[1:]]
        assert sum(end is not None for end in ended) == 1
        assert ended[3] is None, "the one without a queue stays"
        assert sum(member.connection.queued_bytes for member in readers) <= 200_000

    on_node(tmp_path, work)


def test_taking_a_role_stops_the_flow_and_empties_the_queue(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        publisher, reader = await Member(16).enter(node), await Member(17).enter(node)
        hub = node.hub_bands
        await hub.subscribe(reader.connection, RECORDINGS, "requestFiles")
        await hub.subscribe(reader.connection, RECORDINGS, "requestFeeds")

        async def send() -> None:
            for band in ("requestFiles", "requestFeeds"):
                await hub.publish(publisher.connection, RECORDINGS, band, [publisher.signed(band)])

        await send()
        await reader.grant(node, Role.ALL & ~Role.PROVIDE_FILES)
        began = time.monotonic()
        while len(reader.connection) > 1:
            assert time.monotonic() - began < 30
            await asyncio.sleep(0.01)
        await send()
        assert [one.band for one in await reader.got()] == ["requestFeeds"] * 2
        with pytest.raises(Forbidden, match="provideFiles"):
            await hub.subscribe(reader.connection, RECORDINGS, "requestFiles")

        await reader.grant(node, Role.ALL)
        await settled()
        await send()
        assert [one.band for one in await reader.got()] == ["requestFiles", "requestFeeds"], "without asking again"

        await publisher.grant(node, Role.ALL & ~Role.REQUEST_FILES)
        with pytest.raises(Forbidden, match="requestFiles"):
            await send()

    on_node(tmp_path, work)


def test_a_node_that_is_removed_is_disconnected(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        calls: list[int] = []
        gone, stays = await Member(16).enter(node), await Member(17).enter(node, on_change=lambda: calls.append(1))
        await settled()
        calls.clear()
        await node.nodes.remove(ADMIN, gone.id)
        assert (await asyncio.wait_for(gone.connection.wait_end(), 1)).code == "not_approved"
        assert stays.connection.end is None
        assert calls == [1]

    on_node(tmp_path, work)


def test_many_changes_cost_few_looks(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        calls: list[float] = []
        member = await Member(16).enter(node, on_change=lambda: calls.append(time.monotonic()))
        began = time.monotonic()
        while time.monotonic() - began < 1:
            await member.grant(node, Role.REQUEST_FILES)
            await member.grant(node, Role.ALL)
        await settled()
        assert 2 <= len(calls) <= 1 / broker.REFRESH_SECONDS + 3

    on_node(tmp_path, work)


def test_connections_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "MAX_CONNECTIONS_PER_NODE", 3)

    async def work(node: Node) -> None:
        member = await Member(16).enter(node)
        hub = node.hub_bands
        opened = hub.connected_at(member.id)
        assert opened is not None and abs(opened - time.time() * 1000) < 60_000
        first, second = hub.open(member.id, alone=True), hub.open(member.id, alone=True)
        assert first.end is not None
        assert first.end.code == "replaced"
        assert second.end is None and member.connection.end is None
        hub.open(member.id)
        with pytest.raises(TooManyRequests):
            hub.open(member.id)
        assert hub.connected_at(member.id) == opened, "the oldest one counts"
        assert hub.absent_for(member.id) == 0
        assert hub.absent_for(NodeId("0" * 64)) is None
        for one in hub.connections:
            if one.node_id == member.id:
                hub.close(one)
                hub.close(one)
        assert not hub.present(member.id) and hub.connected_at(member.id) is None
        assert 0 < (hub.absent_for(member.id) or 0) < 1
        again = hub.open(member.id)
        hub.close_all()
        assert again.end == End("stopping", "the server stops")
        assert hub.connections == []

    on_node(tmp_path, work)


def test_take() -> None:
    async def work() -> None:
        connection = MemberConnection(NodeId("0" * 64), None, None)
        waiting = asyncio.create_task(connection.take())
        await asyncio.sleep(0.01)
        connection.put("first", 10)
        assert await waiting == ["first"]
        for number in range(5):
            connection.put(number, 40)
        assert await connection.take(most_bytes=100) == [0, 1]
        assert await connection.take(most_bytes=1) == [2], "always one"
        assert await connection.take(most=1) == [3]
        waiting = asyncio.create_task(connection.take())
        assert await waiting == [4]
        waiting = asyncio.create_task(connection.take())
        await asyncio.sleep(0.01)
        connection.finish(End("closed", "over"))
        with pytest.raises(ConnectionEnded, match="over"):
            await waiting
        connection.put("late", 1)
        assert len(connection) == 0

    asyncio.run(work())


def test_deliveries_share_their_form() -> None:
    message = Member(16).signed("requestFiles")
    first, second = Delivery("a", "requestFiles", message, 1), Delivery("b", "requestFiles", message, 1)
    first.forms["v1"] = "x"
    assert second.forms == {}


def test_a_new_connection_is_no_new_allowance(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        member, other = await Member(16).enter(node), await Member(17).enter(node)
        burst = int(member_connections.PUBLISH_BURST)
        assert member.connection.allowances[0].take(burst, time.monotonic()) == 0
        node.hub_bands.close(member.connection)
        again = node.hub_bands.open(member.id)
        began = time.monotonic()
        await again.throttle(int(member_connections.PUBLISH_RATE / 4), 100)
        assert time.monotonic() - began > 0.1
        assert other.connection.allowances[0].take(100, time.monotonic()) == 0

    on_node(tmp_path, work)
