"""S12: whatever a hub answers, this server connects to nothing but that hub, and not for ever."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from kachery_lab.client import download
from kachery_lab.client import hub as hub_module
from kachery_lab.client.hub import HubClient
from kachery_lab.client.reach import ANYWHERE, PRIVATE_NETWORK, THIS_MACHINE, Reach, depth
from kachery_lab.core.ids import Sha1
from kachery_lab.core.keys import PrivateKey
from kachery_lab.errors import Forbidden, KacheryLabError, Unavailable
from tests.faults.fake_hub import CHANNEL, FakeHub
from tests.faults.report import report, wait_for
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
KEY = PrivateKey.from_seed("0a" * 32)
SHA1 = Sha1("a9993e364706816aba3e25717850c26c9cd0d89d")
HOSTS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST.",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
]
"""Spellings of this machine."""


@pytest.fixture(scope="module")
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def fake(running: FakeHub) -> FakeHub:
    running.reset()
    return running


async def _bytes() -> AsyncIterator[bytes]:
    yield b"abc"


async def everything(client: HubClient) -> list[str]:
    """Each way in which the client goes out, by what the hub says; the errors' names, "" for what went well."""

    async def load() -> None:
        bucket = (await client.memberships())[CHANNEL].bucket_url
        size = await client.size(bucket, SHA1)
        assert size == 3

    async def read() -> None:
        bucket = (await client.memberships())[CHANNEL].bucket_url
        assert b"".join([bytes(piece) async for piece in client.read(bucket, SHA1, 3)]) == b"abc"

    async def upload() -> None:
        url = await client.upload_url(CHANNEL, SHA1, 3)
        assert url is not None
        await client.put(url, _bytes(), 3)

    async def report_itself() -> None:
        await client.report("rig", "ann")

    found = []
    for act in (load, read, upload, report_itself):
        try:
            await act()
        except (KacheryLabError, httpx2.StreamConsumed) as error:
            # The second only where redirects are followed: a body cannot be sent twice.
            found.append(error.code if isinstance(error, KacheryLabError) else "sent twice")
        else:
            found.append("")
    return found


def go(url: str, work: Callable[[HubClient], Awaitable[Any]], timeout: float = 5.0) -> Any:
    async def run() -> Any:
        client = HubClient(url, KEY, timeout=timeout)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client without these rules does: it goes where it is told."""

    def require(self: Reach, url: str) -> tuple[str, str, int]:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or 80

    def addresses(self: Reach, origin: tuple[str, str, int]) -> list[str]:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(origin[1], origin[2], type=socket.SOCK_STREAM)]

    monkeypatch.setattr(Reach, "require", require)
    monkeypatch.setattr(Reach, "addresses", addresses)


def test_the_hub_itself_is_reached(fake: FakeHub) -> None:
    """The pair of all refusals below."""
    assert go(fake.url, everything) == ["", "", "", ""]
    fake.public_url = fake.url
    assert go(fake.url, everything) == ["", "", "", ""]
    assert fake.canary.hits == 0


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_addresses_that_the_hub_names(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, guard: bool) -> None:
    """As bucket, as upload URL, and as the public URL that would make them its own."""
    if not guard:
        careless(monkeypatch)
    reached, outcomes = 0, set()
    odd = [
        f"http://{fake.address}:{fake.port}@127.0.0.1:{fake.port}",
        f"http://{fake.address}:{fake.port}\\@127.0.0.1:{fake.port}",
        f"http://127.0.0.1:{fake.port}\\@{fake.address}:{fake.port}",
        f"http://127.0.0.1:{fake.port}#@{fake.address}:{fake.port}",
        f"http://127.0.0.1:{fake.port}?@{fake.address}:{fake.port}",
        f"http://127.0.0.1:{fake.port}/..//{fake.address}:{fake.port}",
        f"//127.0.0.1:{fake.port}",
        f"http:127.0.0.1:{fake.port}",
        f"http://127.0.0.1\t:{fake.port}",
        "http://[::1",
        "http://x:99999999",
        "http://x:-1",
        "http://",
        "",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        f"gopher://127.0.0.1:{fake.port}/_GET",
        f"ftp://127.0.0.1:{fake.port}",
    ]
    named = [f"http://{host}:{fake.port}" for host in HOSTS] + (odd if guard else [])
    for address in named:
        for own in (False, True):
            fake.reset()
            fake.bucket_url, fake.upload_url = f"{address}/bucket/~x/{CHANNEL}", f"{address}/bucket/upload/x"
            fake.public_url = address if own else None
            found = go(fake.url, everything)
            reached += fake.canary.hits > 0
            outcomes |= set(found)
            if guard:
                assert fake.canary.hits == 0, (address, own)
                # Some spellings are no URL for a library in between.
                assert set(found[:3]) <= {"forbidden", "unavailable"}, (address, own, found)
                assert found[3] == ""
    assert (reached == 0) is guard
    if not guard:
        assert reached >= len(HOSTS)
    report("S12", 2 * len(named), guard=guard, what="named addresses", reached=reached, outcomes=sorted(outcomes))


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_redirects(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, guard: bool) -> None:
    if not guard:
        careless(monkeypatch)
        before = hub_module.httpx2.AsyncClient
        monkeypatch.setattr(
            hub_module.httpx2, "AsyncClient", lambda **more: before(**{**more, "follow_redirects": True})
        )
    reached = trials = 0
    for status in (301, 302, 303, 307, 308):
        for kind in ("info", "memberships", "uploads", "report", "HEAD bucket", "GET bucket", "PUT bucket"):
            fake.reset()
            target = f"http://127.0.0.1:{fake.port}/x"
            fake.answers[kind] = lambda request, s=status, t=target: fake.send(request, b"", s, Location=t)  # type: ignore[misc]
            found = go(fake.url, everything)
            trials += 1
            reached += fake.canary.hits > 0
            if guard:
                assert fake.canary.hits == 0, (status, kind)
                assert "unavailable" in found and set(found) <= {"", "unavailable"}, (status, kind, found)
    assert (reached == 0) is guard
    report("S12", trials, guard=guard, what="redirects", reached=reached)


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_names_that_mean_another_machine_later(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, guard: bool) -> None:
    """DNS rebinding of the hub's own name and of its public URL's: first the hub is the answer, then the canary."""
    if not guard:
        careless(monkeypatch)
    before = socket.getaddrinfo
    asked: list[str] = []
    turns: dict[str, list[list[str]]] = {}

    def lookup(host: Any, port: Any, *more: Any, **kinds: Any) -> Any:
        if host not in turns:
            return before(host, port, *more, **kinds)
        asked.append(host)
        addresses = turns[host].pop(0) if len(turns[host]) > 1 else turns[host][0]
        return [entry for address in addresses for entry in before(address, port, *more, **kinds)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    reached = trials = 0
    for rebound in (["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["127.0.0.1", fake.address]):
        for host in ("hub.test", "files.test"):
            fake.reset()
            asked.clear()
            turns.update({"hub.test": [[fake.address]], "files.test": [[fake.address]]})
            turns[host] = [[fake.address], [fake.address], rebound]
            fake.public_url = f"http://files.test:{fake.port}"
            fake.bucket_url = f"http://files.test:{fake.port}/bucket/~x/{CHANNEL}"
            fake.upload_url = f"http://files.test:{fake.port}/bucket/upload/x"
            found = [*go(f"http://hub.test:{fake.port}", everything), "forbidden"]
            trials += 1
            reached += fake.canary.hits > 0
            assert host in asked
            if guard:
                assert fake.canary.hits == 0, (rebound, host)
                assert set(found) <= {"", "forbidden"}
                # What still leads to the hub as well is used, by the address that does.
                assert len(rebound) == 1 or set(found[:4]) == {""}
                assert len(rebound) == 2 or "forbidden" in found[:4]
    assert (reached == 0) is guard
    report("S12", trials, guard=guard, what="names that change", reached=reached)


def test_depths() -> None:
    table = {
        ANYWHERE: ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
        PRIVATE_NETWORK: ["10.0.0.1", "172.16.0.1", "192.168.1.1", "fd00::1", "::ffff:10.0.0.1", "100.64.0.1"],
        THIS_MACHINE: [
            *("127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.169.254", "224.0.0.1", "::1", "::", "fe80::1%eth0"),
            *("ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::"),
        ],
    }
    for expected, addresses in table.items():
        assert {address: depth(address) for address in addresses} == dict.fromkeys(addresses, expected)


# -- caps ------------------------------------------------------------------------------------------------------------


def _endless(fake: FakeHub, pause: float, piece: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(1 << 40))
        request.end_headers()
        while True:
            request.wfile.write(piece)
            fake.sent += len(piece)
            time.sleep(pause)

    return answer


def test_answers_that_do_not_end(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size and by time. Control: with a higher cap a longer answer is read."""
    figures: dict[str, list[float]] = {}
    for cap in (1 << 20, 1 << 24):
        monkeypatch.setattr(hub_module, "MAX_ANSWER", cap)
        for kind in ("info", "memberships", "uploads", "PUT bucket"):
            fake.reset()
            fake.answers[kind] = _endless(fake, 0, b"[" * 65536)
            found = go(fake.url, everything)
            assert "unavailable" in found
            # What lies in socket buffers was sent, too.
            assert cap <= fake.sent / found.count("unavailable") <= cap + (8 << 20)
            figures.setdefault(str(cap), []).append(fake.sent)
    fake.reset()
    fake.answers["memberships"] = _endless(fake, 0.2, b" ")
    started = time.monotonic()
    assert go(fake.url, lambda client: everything(client), timeout=1.0)[0] == "unavailable"
    seconds = time.monotonic() - started
    assert seconds < 6
    report("S12", 9, what="endless answers", sent=figures, dripped_seconds=round(seconds, 2))


def test_a_hub_that_drips_keeps_no_thread_of_others(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the time that a piece may take put far off, the download goes on."""
    fake.answers["GET bucket"] = _endless(fake, 0.1, b"x")
    latencies: list[float] = []

    async def downloads(client: HubClient, seconds: float) -> list[str]:
        bucket = (await client.memberships())[CHANNEL].bucket_url

        async def one() -> str:
            try:
                async for _ in client.read(bucket, SHA1, 1 << 30):
                    pass
            except Unavailable as error:
                return error.message
            return ""

        tasks = [asyncio.create_task(one()) for _ in range(20)]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(task.done() for task in tasks):
            started = time.monotonic()
            await asyncio.to_thread(time.time)
            latencies.append(time.monotonic() - started)
            await asyncio.sleep(0.05)
        ended = [task.result() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ended

    monkeypatch.setattr(download, "PIECE_SECONDS", 1.0)
    ended = go(fake.url, lambda client: downloads(client, 15.0))
    assert ended == ["the hub sends too slowly"] * 20
    worst = max(latencies)
    assert worst < 1.0
    monkeypatch.setattr(download, "PIECE_SECONDS", 4.0)
    assert go(fake.url, lambda client: downloads(client, 2.5)) == []
    report("S12", 20, what="dripping downloads", given_up=len(ended), others_worst_s=round(worst, 3))


@pytest.mark.parametrize("kind", ["info", "memberships", "uploads", "report"])
def test_nonsense_is_an_error_of_the_hub(fake: FakeHub, kind: str) -> None:
    """Never one of the program, and never the caller's."""
    bodies: list[Any] = [b"", b"no json", b"[" * 200_000, [], {}, "x", {"nodeId": 1}, {"nodeId": "zz", "publicUrl": 5}]
    bodies += [{"memberships": value} for value in (1, None, {"a": 1}, [1], [{}], [{"roles": 1, "channel": "a"}])]
    bodies += [{"url": value} for value in (1, None, [], "x")] + [{"approved": "yes"}]
    codes = set()
    for status in (200, 404, 418, 500):
        for body in bodies:
            fake.reset()
            fake.answers[kind] = lambda request, b=body, s=status: fake.send(request, b, s)  # type: ignore[misc]

            async def work(client: HubClient) -> list[str]:
                try:
                    return await everything(client)
                except (AssertionError, KeyError):
                    return []

            codes |= set(go(fake.url, work))
    assert codes <= {"", "unavailable", "not_found", "forbidden", "error"}
    assert fake.canary.hits == 0


# -- a whole server --------------------------------------------------------------------------------------------------


def test_a_server_whose_hub_is_hostile(fake: FakeHub, make_node: Make) -> None:
    """And whose clients put addresses wherever a request has a text."""
    node = make_node(env={"KACHERY_LAB_HUB_URL": fake.url}).start()
    stored = node.store(os.urandom(3000)).json()["sha1"]
    target = f"http://127.0.0.1:{fake.port}"
    statuses: list[int] = []

    def ask() -> None:
        key = {"sha1": str(SHA1), "manifestSha1": str(SHA1)}
        statuses.append(node.post("/loadFile", {"fileKey": key, "channelName": CHANNEL}).status)
        statuses.append(node.post("/uploadFile", {"sha1": stored, "channel": CHANNEL}).status)
        body = {"channelName": CHANNEL, "sha1": str(SHA1), "size": 3}
        statuses.append(node.post("/createSignedFileUploadUrl", body).status)

    for host in HOSTS:
        fake.bucket_url, fake.upload_url = (
            f"http://{host}:{fake.port}/bucket/{rest}" for rest in (CHANNEL, "upload/x")
        )
        fake.public_url = f"http://{host}:{fake.port}"
        time.sleep(0.55)  # what a membership says is believed for half a second
        ask()
    for text in (target, f"{target}/{SHA1}", "file:///etc/passwd", f"gopher://127.0.0.1:{fake.port}/_x"):
        for path, body in (
            ("/loadFile", {"fileKey": {"sha1": text}, "channelName": CHANNEL}),
            ("/loadFile", {"fileKey": {"sha1": str(SHA1)}, "channelName": text}),
            ("/uploadFile", {"sha1": stored, "channel": text}),
            ("/createSignedFileUploadUrl", {"channelName": text, "sha1": stored, "size": 3}),
            ("/linkFile", {"filePath": text, "size": 3, "mtime": 1}),
            ("/downloadFileData", {"fileKey": {"sha1": text}, "startByte": 0, "endByte": 1}),
        ):
            statuses.append(node.post(path, body).status)
    assert set(statuses) & {500, 502, 504} == set(), statuses
    assert fake.canary.hits == 0
    # A hub that is honest again is used at once.
    fake.reset()
    time.sleep(0.55)
    wait_for(lambda: node.post("/uploadFile", {"sha1": stored, "channel": CHANNEL}).status == 200, "an upload")
    report("S12", len(statuses), what="a whole server", canary_hits=fake.canary.hits, statuses=sorted(set(statuses)))


def test_forbidden_names_no_address(fake: FakeHub) -> None:
    """What is said of a refused address does not repeat it, nor what may stand in it."""
    fake.bucket_url = "http://127.0.0.1/~secret"

    async def work(client: HubClient) -> None:
        with pytest.raises(Forbidden) as caught:
            await client.size((await client.memberships())[CHANNEL].bucket_url, SHA1)
        assert "secret" not in caught.value.message

    go(fake.url, work)
