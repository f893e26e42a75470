"""Three servers: one is the hub, two join its channels. Messages of all kinds go between them over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.client import bands as client
from kachery_lab.core.band_messages import SHAPES
from kachery_lab.core.bands import role_for
from kachery_lab.core.ids import NodeId
from kachery_lab.core.roles import Role, role_names
from kachery_lab.errors import Forbidden, NotFound, TooLarge, Unavailable
from kachery_lab.services import bands
from kachery_lab.services.bands import BandMessage, ChannelBands
from tests.bands import BODIES, CHANNEL
from tests.hubs import Hub, LabNode
from tests.proxies import Cable

SECONDS = 60.0
"""How long a busy machine may take for what takes a moment."""

ANY = {
    **BODIES,
    "requestTasks": {
        "type": "requestTask",
        "backendId": None,
        "taskId": "abc",
        "taskFunctionId": "f.1",
        "taskFunctionType": "action",
        "taskKwargs": {"text": "\u00e9\U0001f600", "x": [1.5, None]},
    },
}


class Server:
    """A server whose services are replaced by a list of what came in."""

    def __init__(self, root: Path, port: int = 0, **settings: Any) -> None:
        self.came: list[BandMessage] = []
        self.root, self.settings = root, settings
        self.hub = self._open(port)

    def _open(self, port: int) -> Hub:
        hub = Hub(self.root, port, **self.settings)
        hub.node.band_handlers._handlers.clear()
        for kind in SHAPES:
            hub.node.band_handlers.on(kind, self._note)
        return hub

    async def _note(self, message: BandMessage, _bands: ChannelBands) -> None:
        self.came.append(message)

    def restart(self) -> None:
        self.hub.__exit__()
        self.hub = self._open(self.hub.port)
        self.hub.__enter__()

    @property
    def id(self) -> NodeId:
        return self.hub.node.identity.node_id

    @property
    def bands(self) -> ChannelBands:
        node = self.hub.node
        return node.own_bands if node.joined_bands is None else node.joined_bands

    def publish(self, band: str, **fields: Any) -> dict[str, Any]:
        body = {**ANY[band], **fields}
        self.hub.call(self.bands.publish(CHANNEL, body))
        return body

    def taken(self, count: int, seconds: float = SECONDS) -> list[BandMessage]:
        """What came, when there is so much of it and a moment later no more."""
        wait_until(lambda: len(self.came) >= count, seconds)
        time.sleep(0.1)
        found, self.came = self.came, []
        assert len(found) == count, found
        return found


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)
    return time.monotonic() - began


class Lab:
    def __init__(self, hub: Server, members: list[Server]) -> None:
        self.hub, self.members = hub, members

    @property
    def all(self) -> list[Server]:
        return [self.hub, *self.members]

    def ready(self, seconds: float = SECONDS) -> float:
        """Every node has all its subscriptions."""
        return wait_until(lambda: all(self.subscriptions(one.id) == 6 for one in self.all), seconds)

    def subscriptions(self, node_id: NodeId) -> int:
        found = self.hub.hub.node.hub_bands.connections
        return sum(topic[0] == CHANNEL for one in found if one.node_id == node_id for topic in one.active)


@contextmanager
def opened(root: Path) -> Iterator[Lab]:
    """Three connected servers, which a test may stop and start."""
    hub = Server(root / "hub")
    url = f"http://127.0.0.1:{hub.hub.port}"
    members = [Server(root / name, hub_url=url) for name in ("one", "two")]
    with hub.hub:
        hub.hub.make_channel(CHANNEL)
        for member in members:
            node = LabNode(owner="admin", seed=bytes.fromhex(member.hub.node.identity.key.seed_hex()))
            hub.hub.register(node)
            hub.hub.join(node, CHANNEL)
        hub.hub.join(hub.id, CHANNEL)
        lab = Lab(hub, members)
        try:
            for member in members:
                member.hub.__enter__()
            lab.ready()
            yield lab
        finally:
            for member in members:
                member.hub.__exit__()
            if not hub.hub._thread.is_alive():
                hub.restart()
    if hub.hub._thread.is_alive():
        hub.hub.__exit__()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with opened(tmp_path_factory.mktemp("bands")) as lab:
        yield lab


@pytest.fixture
def lab(shared: Lab) -> Iterator[Lab]:
    """The same three servers for all tests that leave them running; every role and subscription is there."""
    yield shared
    for one in shared.all:
        shared.hub.hub.grant(one.id, CHANNEL, Role.ALL)
    shared.ready()
    for one in shared.all:
        one.came.clear()


@pytest.fixture
def own_lab(tmp_path: Path) -> Iterator[Lab]:
    """Three servers that a test may change as it likes."""
    with opened(tmp_path) as lab:
        yield lab


def test_every_band_in_every_direction(lab: Lab) -> None:
    for band in ANY:
        for sender in lab.all:
            body = sender.publish(band)
            for receiver in lab.all:
                (message,) = receiver.taken(1)
                assert message == BandMessage(CHANNEL, band, sender.id, body)


def test_nothing_goes_round_and_nothing_is_added(own_lab: Lab) -> None:
    """A member has a channel of the same name at its own hub: what it hears at one is not told at the other."""
    lab = own_lab
    for member in lab.members:
        member.hub.make_channel(CHANNEL)
        member.hub.join(member.id, CHANNEL)
    for number in range(100):
        lab.all[number % 3].publish("requestFiles", fileKey={"sha1": f"{number:040x}"})
    for receiver in lab.all:
        found = receiver.taken(100)
        assert Counter(message.body["fileKey"]["sha1"] for message in found) == Counter(
            f"{number:040x}" for number in range(100)
        )
    member = lab.members[0]
    wait_until(lambda: len(member.hub.node.hub_bands.connections[0].active) == 12)
    member.hub.call(member.hub.node.own_bands.publish(CHANNEL, dict(ANY["requestFiles"])))
    assert [message.sender for message in member.taken(1)] == [member.id]
    assert lab.hub.came == lab.members[1].came == []


def test_refusals_name_what_is_missing(lab: Lab) -> None:
    for server in (lab.hub, lab.members[0]):
        with pytest.raises(NotFound):
            server.hub.call(server.bands.publish("nowhere", dict(ANY["requestFiles"])))
        with pytest.raises(TooLarge, match="65536"):
            server.publish("requestTasks", taskKwargs={"x": "y" * 66_000})
        lab.hub.hub.grant(server.id, CHANNEL, Role.REQUEST_FEEDS)
        with pytest.raises(Forbidden, match=f"provideFiles in the channel {CHANNEL}"):
            server.publish("provideFiles")
        server.publish("requestFeeds")


@pytest.mark.parametrize("band", ANY)
def test_roles_change_on_open_connections(lab: Lab, band: str) -> None:
    role = role_for(band, "subscribe")
    for changed, sender in ((lab.members[0], lab.hub), (lab.hub, lab.members[1])):
        lab.hub.hub.grant(changed.id, CHANNEL, Role.ALL & ~role)
        wait_until(lambda: not changed.bands.channels()[CHANNEL] & role)  # noqa: B023
        wait_until(lambda: lab.subscriptions(changed.id) == 5)  # noqa: B023
        sender.publish(band)
        sender.taken(1)
        assert changed.came == [], role_names(role)
        lab.hub.hub.grant(changed.id, CHANNEL, Role.ALL)
        wait_until(lambda: lab.subscriptions(changed.id) == 6)  # noqa: B023
        for one in lab.all:
            one.came.clear()
        sender.publish(band)
        changed.taken(1)
        for one in lab.all:
            one.came.clear()


def test_a_hub_that_restarts(own_lab: Lab) -> None:
    """Members notice, come back by themselves and subscribe again; nothing is kept for them, nothing comes twice."""
    lab = own_lab
    lab.hub.hub.__exit__()
    member = lab.members[0]
    wait_until(lambda: not member.bands.channels())
    with pytest.raises(Unavailable):
        member.publish("requestFiles")
    time.sleep(1)
    lab.hub.hub = lab.hub._open(lab.hub.hub.port)
    lab.hub.hub.__enter__()
    lab.ready()
    assert [one.came for one in lab.all] == [[], [], []]
    for sender in lab.all:
        sender.publish("provideTasks")
        for receiver in lab.all:
            assert [message.sender for message in receiver.taken(1)] == [sender.id]


def test_a_silent_link_is_noticed_and_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PING_SECONDS", 1.0)
    monkeypatch.setattr(client, "PONG_SECONDS", 2.0)
    hub = Server(tmp_path / "hub")
    with hub.hub, Cable(hub.hub.port) as cable:
        member = Server(tmp_path / "member", hub_url=cable.url)
        hub.hub.make_channel(CHANNEL)
        hub.hub.register(LabNode(owner="admin", seed=bytes.fromhex(member.hub.node.identity.key.seed_hex())))
        hub.hub.join(member.id, CHANNEL)
        hub.hub.join(hub.id, CHANNEL)
        with member.hub:
            lab = Lab(hub, [member])
            lab.ready()
            cable.silence()
            wait_until(lambda: not member.bands.channels())
            with pytest.raises(Unavailable):
                member.publish("requestFiles")
            # The next connection must not end because this machine is busy.
            monkeypatch.undo()
            cable.heal()
            wait_until(lambda: bool(member.bands.channels()))
            lab.ready()
            for one in lab.all:
                one.came.clear()
            hub.publish("requestFiles")
            assert [message.sender for message in member.taken(1)] == [hub.id]


def test_slow_handlers_hold_up_no_other_type(own_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 at a time; a bounded number waits; what is more is dropped, and other types go on."""
    lab = own_lab
    monkeypatch.setattr(bands, "MAX_WAITING", 100)
    member = lab.members[0]
    gate: list[asyncio.Event] = []
    running: list[int] = []

    async def slow(_message: BandMessage, _bands: ChannelBands) -> None:
        running.append(1)
        if not gate:
            gate.append(asyncio.Event())
        await gate[0].wait()

    async def broken(_message: BandMessage, _bands: ChannelBands) -> None:
        raise RuntimeError("a handler that fails")

    handlers = member.hub.node.band_handlers._handlers
    handlers["requestFile"] = [slow]
    handlers["updateTaskStatus"].insert(0, broken)
    for number in range(300):
        lab.hub.publish("requestFiles", fileKey={"sha1": f"{number:040x}"})
    wait_until(lambda: len(running) >= bands.MAX_AT_ONCE)
    lab.hub.publish("provideTasks")
    assert [message.band for message in member.taken(1)] == ["provideTasks"], "in spite of the one that fails"
    assert len(running) == bands.MAX_AT_ONCE
    member.hub.loop.call_soon_threadsafe(gate[0].set)
    wait_until(lambda: len(running) == bands.MAX_AT_ONCE + 100)
    time.sleep(0.2)
    assert len(running) == bands.MAX_AT_ONCE + 100
