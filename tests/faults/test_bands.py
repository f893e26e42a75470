"""S6, S7, O1 and O4 for bands: replayed hellos, roles taken from open connections, stopping, wrong clocks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from websockets.exceptions import ConnectionClosed

from tests.bands import TARGET
from tests.faults.report import report, without
from tests.faults.test_s13_hostile_peer import Hub
from tests.servers import RunningNode

pytestmark = pytest.mark.slow


def upgrade_status(hub: Hub, headers: dict[str, str]) -> tuple[int, bytes]:
    given = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    given["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    answer = hub.node.request("GET", TARGET, headers={**given, **headers}, auth=False)
    return answer.status, answer.body


def replays(hub: Hub, *, restart: bool) -> list[int]:
    member = hub.member()
    headers = member.header(hub.id)
    first = upgrade_status(hub, headers)[0]
    if restart:
        hub.node.kill()
        # The next second: what was signed before the process began is refused.
        time.sleep(1.1)
        hub.node.start()
    return [first, *(upgrade_status(hub, headers)[0] for _ in range(5))]


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_s6_hello_replayed(make_node: Callable[..., RunningNode], restart: bool) -> None:
    hub = Hub(make_node().start())
    found = replays(hub, restart=restart)
    report(f"S6 bands: hello replayed{' after a restart' if restart else ''}", 5, statuses=found[1:], accepted=0)
    assert found == [101, *[401 if restart else 409] * 5]


def test_s6_control_any_nonce(make_node: Callable[..., RunningNode]) -> None:
    found = replays(Hub(make_node(prefix=without("any_nonce")).start()), restart=False)
    report("S6 bands control: nonces forgotten", 5, accepted=found[1:].count(101))
    assert found == [101] * 6


def after_revocation(hub: Hub, trials: int) -> tuple[int, float]:
    """(Messages that came 1 s after the role was taken, the longest time in s until the flow stopped)."""
    speaker, listener = hub.member(), hub.member()
    late, longest = 0, 0.0
    with hub.line(speaker) as mine, hub.line(listener) as theirs:
        for _ in range(trials):
            hub.grant(listener)
            theirs.subscribe("requestFiles")
            assert mine.publish("requestFiles", speaker.signed("requestFiles")) == "done"
            theirs.next("message")
            hub.grant(listener, "requestFiles", "requestTasks")
            taken, last = time.monotonic(), 0.0
            while time.monotonic() - taken < 1.5:
                assert mine.publish("requestFiles", speaker.signed("requestFiles")) == "done"
                if theirs.messages(0.02):
                    last = time.monotonic() - taken
            late += last > 1
            longest = max(longest, last)
    return late, longest


def test_s7_role_taken_while_connected(make_node: Callable[..., RunningNode]) -> None:
    late, longest = after_revocation(Hub(make_node().start()), 3)
    report("S7 bands: role taken while connected", 3, bypass=late, longest_ms=round(longest * 1000))
    assert late == 0


def test_s7_control_rights_when_subscribed(make_node: Callable[..., RunningNode]) -> None:
    late, longest = after_revocation(Hub(make_node(prefix=without("rights_when_subscribed")).start()), 2)
    report("S7 bands control: rights looked at once", 2, bypass=late, longest_ms=round(longest * 1000))
    assert late == 2


CLOCKS = {"1 h behind": -3600, "1 h ahead": 3600, "1 d behind": -86400, "1 d ahead": 86400, "1970": None}


def hellos_of_wrong_clocks(hub: Hub) -> dict[str, tuple[int, bytes]]:
    member = hub.member()
    now = int(time.time())
    return {
        name: upgrade_status(hub, member.header(hub.id, at=1 if shift is None else now + shift))
        for name, shift in CLOCKS.items()
    }


def test_o4_hello_of_a_wrong_clock(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node().start())
    found = hellos_of_wrong_clocks(hub)
    report(
        "O4 bands: hello of a wrong clock", len(found), accepted=0, statuses=[status for status, _ in found.values()]
    )
    for name, (status, body) in found.items():
        assert status == 401, name
        assert b"the server's time is" in body
    assert upgrade_status(hub, hub.member().header(hub.id))[0] == 101


def test_o4_control_any_time(make_node: Callable[..., RunningNode]) -> None:
    found = hellos_of_wrong_clocks(Hub(make_node(prefix=without("any_time")).start()))
    report("O4 bands control: any time", len(found), accepted=sum(status == 101 for status, _ in found.values()))
    assert {status for status, _ in found.values()} == {101}


def stop_with_members(hub: Hub, count: int) -> tuple[int, float, list[int | None]]:
    """(Exit code, seconds, close codes that the members saw)."""
    codes: list[int | None] = []
    lines = [hub.line(hub.member(), max_queue=1, ping_interval=None) for _ in range(count)]
    opened = [line.__enter__() for line in lines]
    for line in opened:
        line.subscribe("requestFiles")
    deaf = hub.raw(hub.member())
    began = time.monotonic()
    code = hub.node.terminate()
    seconds = time.monotonic() - began
    for line in opened:
        try:
            while line.read(2):
                pass
        except ConnectionClosed as closed:
            codes.append(None if closed.rcvd is None else closed.rcvd.code)
        line.socket.close()
    deaf.close()
    return code, seconds, codes


def test_o1_stop_with_open_bands(make_node: Callable[..., RunningNode]) -> None:
    code, seconds, codes = stop_with_members(Hub(make_node().start()), 20)
    report("O1 bands: stop with open bands", 20, exit_code=code, stop_ms=round(seconds * 1000), told=codes.count(1012))
    assert code == 0
    assert seconds < 10
    assert codes == [1012] * 20


def test_o1_control_killed(make_node: Callable[..., RunningNode]) -> None:
    """Members of a server that just ends are told nothing."""
    hub = Hub(make_node().start())
    lines = [hub.line(hub.member()) for _ in range(3)]
    opened = [line.__enter__() for line in lines]
    hub.node.kill()
    told = 0
    for line in opened:
        try:
            while line.read(2):
                pass
        except ConnectionClosed as closed:
            told += closed.rcvd is not None
    report("O1 bands control: killed", 3, told=told)
    assert told == 0
