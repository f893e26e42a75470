"""O4: the time of day jumps, to and fro, under a server that runs; its monotonic clock goes on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import NodeId
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signables import request_bytes
from tests.faults.report import messages_of, missing, report, wait_for, without
from tests.hubs import path_of
from tests.servers import Answer, RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
HOUR, DAY = 3600, 86_400
LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
SUBFEED = "4" * 40
CHANNEL = "rig-data"


class Clock:
    """The time of day of one server, by a file that it reads whenever it asks for the time."""

    def __init__(self, directory: Path) -> None:
        found = [LIBRARY, *Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
        library = next((path for path in found if path.exists()), None)
        if library is None:
            missing("needs the Debian package faketime")
        self._file = directory / "clock"
        self.shift = 0
        self.set(0)
        self.env = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, seconds: int) -> None:
        """So many seconds off."""
        draft = self._file.with_suffix(".tmp")
        draft.write_text(f"{seconds:+d}\n")
        draft.replace(self._file)
        self.shift = seconds

    def now(self) -> float:
        return time.time() + self.shift


SHIFTS = {
    "+1 h": HOUR,
    "-1 h": -HOUR,
    "+1 d": DAY,
    "-1 d": -DAY,
    "1970": -int(time.time()) + 1000,
    "right": 0,
}


class Member:
    """A node that signs requests to a server, by the right time."""

    def __init__(self, node: RunningNode) -> None:
        self.key = PrivateKey.generate()
        self.id = NodeId(self.key.public_hex)
        self._node = node
        self.hub_id = (node.storage / "kachery-node-id").read_text()

    def request(self, method: str, path: str, body: Any = None, at: float | None = None) -> tuple[str, bytes]:
        """(Header, body)."""
        data = b"" if body is None else json.dumps(body).encode()
        stamp, nonce = int(time.time() if at is None else at), secrets.token_hex(16)
        digest = hashlib.sha256(data).hexdigest()
        signed = request_bytes(method, path, digest, stamp, nonce, self.key.public_hex, self.hub_id)
        return f"v1 {self.id} {stamp} {nonce} {self.key.sign(signed).hex()}", data

    def send(self, method: str, path: str, request: tuple[str, bytes]) -> Answer:
        header, data = request
        headers = {"Kachery-Node": header, "Content-Type": "application/json"}
        return self._node.request(method, path, data or None, headers, auth=False)

    def memberships(self, at: float | None = None) -> Answer:
        path = "/api/v1/nodes/memberships"
        return self.send("GET", path, self.request("GET", path, at=at))

    def upload_url(self, data: bytes, at: float) -> str:
        path = f"/api/v1/channels/{CHANNEL}/uploads"
        body = {"sha1": hashlib.sha1(data).hexdigest(), "size": len(data)}
        answer = self.send("POST", path, self.request("POST", path, body, at))
        assert answer.status == 200, answer.body
        return "/bucket" + str(answer.json()["url"]).partition("/bucket")[2]


def admin(node: RunningNode, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = node.request(method, f"/api/admin/v1{path}", data, headers, auth=node.admin_token)
    assert answer.status < 300, (path, answer.body)
    return answer.json() if answer.body else None


@contextmanager
def server(make_node: Make, directory: Path, *guards: str) -> Iterator[tuple[RunningNode, Clock, Member]]:
    """A server under a clock of its own, a channel with a retention of one day, and a member of it."""
    clock = Clock(directory)
    node = make_node(env=clock.env, prefix=without(",".join(guards)) if guards else ()).start()
    member = Member(node)
    admin(node, "POST", "/nodes", {"nodeId": member.id, "owner": "ann", "label": "rig-1"})
    admin(node, "POST", "/channels", {"name": CHANNEL, "owner": "ann", "retentionDays": 1})
    admin(node, "PUT", f"/channels/{CHANNEL}/memberships/{member.id}", {})
    admin(node, "PUT", f"/channels/{CHANNEL}/authorizations/node/{member.id}", {"roles": ["all"]})
    yield node, clock, member


def append(node: RunningNode, feed: str, text: str, request_id: str | None = None) -> None:
    body: dict[str, Any] = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"text": text}]}
    if request_id is not None:
        body["requestId"] = request_id
    answer = node.post("/feed/appendMessages", body, auth=node.admin_token)
    assert answer.status == 200, answer.body


def test_what_expires_and_what_waits(make_node: Make, tmp_path: Path) -> None:
    """In one server, one jump after the other; after each the same questions."""
    rows: dict[str, dict[str, Any]] = {}
    with server(make_node, tmp_path) as (node, clock, member):
        feed = node.post("/feed/createFeed", {"feedName": "o4"}).json()["feedId"]
        expires = int((time.time() + HOUR / 2) * 1000)
        token = admin(node, "POST", "/tokens", {"user": "ann", "scopes": ["channel-owner"], "expiresAt": expires})[
            "token"
        ]
        url, data = member.upload_url(b"O4 upload", time.time()), b"O4 upload"
        for name, shift in [("right", 0), *SHIFTS.items()]:
            clock.set(shift)
            rows[name] = row = {}
            assert node.request("GET", "/livez", auth=False).status == 200
            append(node, feed, name, request_id=f"id {name} {len(rows)}")
            started = time.monotonic()
            watch = {"w": {"feedId": feed, "subfeedHash": SUBFEED, "position": 10_000, "channelName": "c"}}
            assert node.post("/feed/watchForNewMessages", {"subfeedWatches": watch, "waitMsec": 600}).status == 200
            row["waited_s"] = round(time.monotonic() - started, 1)
            row["token"] = node.request("GET", "/api/admin/v1/channels", auth=token).status
            row["ticket"] = node.request("PUT", url, data).status
            row["bucket_after"] = None
            answer = member.memberships()
            row["signed"] = answer.status
            if answer.status == 401:
                stated = int(answer.json()["detail"].rpartition(" ")[2])
                assert abs(stated - clock.now()) < 30, "the server's own time"
            # A node under the same clock is served, at any time of day.
            row["signed_same_clock"] = member.memberships(at=clock.now()).status
            assert node.store(name.encode()).status == 200
        texts = [message["text"] for message in messages_of(node, feed, SUBFEED)]
        assert texts == ["right", *SHIFTS]
        assert node.terminate() == 0
    for name, row in rows.items():
        assert 0.5 <= row["waited_s"] < 5, (name, row)
    statuses = {name: (row["token"], row["ticket"], row["signed"]) for name, row in rows.items()}
    assert statuses == {
        # Tickets: an hour, and a minute for clocks that differ.
        "right": (200, 200, 200),
        "+1 h": (401, 200, 401),
        "-1 h": (200, 403, 401),
        "+1 d": (401, 403, 401),
        "-1 d": (200, 403, 401),
        "1970": (200, 403, 401),
    }
    wrong = sum(row["signed_same_clock"] != 200 for row in rows.values())
    assert wrong == 0
    report("O4", len(rows), wrong_expiries=wrong, waited=[row["waited_s"] for row in rows.values()])


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_jump_forgets_nothing_that_is_kept_for_a_time(make_node: Make, tmp_path: Path, guard: bool) -> None:
    """Objects of a channel with a retention of a day, audit entries, request ids. Control: with a clock that is
    believed at once a jump to and fro costs all three."""
    guards = ["prune_often"] if guard else ["prune_often", "any_clock"]
    with server(make_node, tmp_path, *guards) as (node, clock, member):
        feed = node.post("/feed/createFeed", {"feedName": "o4"}).json()["feedId"]
        append(node, feed, "once", request_id="the same")
        assert node.request("PUT", member.upload_url(b"kept", time.time()), b"kept").status == 200
        objects = f"/channels/{CHANNEL}/objects"
        audit_before = len(admin(node, "GET", "/audit?action=channel.create")["entries"])
        assert len(admin(node, "GET", objects)["objects"]) == audit_before == 1
        clock.set(400 * DAY)
        if guard:
            time.sleep(2)
        else:
            wait_for(lambda: not admin(node, "GET", objects)["objects"], "the object goes")
            wait_for(lambda: not admin(node, "GET", "/audit?action=channel.create")["entries"], "the entry goes")
        clock.set(0)
        time.sleep(0.5)
        append(node, feed, "once", request_id="the same")
        kept = {
            "objects": len(admin(node, "GET", objects)["objects"]),
            "audit": len(admin(node, "GET", "/audit?action=channel.create")["entries"]),
            "messages": len(messages_of(node, feed, SUBFEED)),
        }
    assert kept == ({"objects": 1, "audit": 1, "messages": 1} if guard else {"objects": 0, "audit": 0, "messages": 2})
    report("O4", 3, guard=guard, kept=kept, wrong_expiries=0 if guard else 3)


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_request_is_good_once_whatever_the_clock_does(make_node: Make, tmp_path: Path, guard: bool) -> None:
    """Used, then the clock goes forward and comes back. Control: nonces that are forgotten by the time of day."""
    with server(make_node, tmp_path, *([] if guard else ["nonces_by_clock"])) as (_, clock, member):
        path = "/api/v1/nodes/memberships"
        captured = member.request("GET", path)
        assert member.send("GET", path, captured).status == 200
        assert member.send("GET", path, captured).status == 409
        clock.set(HOUR)
        assert member.send("GET", path, captured).status == 401
        assert member.memberships(at=clock.now()).status == 200
        clock.set(0)
        repeated = member.send("GET", path, captured).status
        assert member.memberships().status == 200
    assert repeated == (409 if guard else 200)
    report("O4", 1, guard=guard, repeated=repeated)


@pytest.mark.parametrize("shift", ["1970", "-1 d", "+1 d"])
def test_a_start_at_a_wrong_time(make_node: Make, tmp_path: Path, shift: str) -> None:
    """What was there is there, and is again when the clock is set right under the running server."""
    data = os.urandom(5000)
    with server(make_node, tmp_path) as (node, clock, member):
        sha1 = node.store(data).json()["sha1"]
        url = member.upload_url(data, time.time())
        assert node.request("PUT", url, data).status == 200
        assert node.terminate() == 0
        clock.set(SHIFTS[shift])
        node.start()
        read = {"fileKey": {"sha1": sha1}, "startByte": 0, "endByte": len(data)}
        assert node.post("/downloadFileData", read).body == data
        assert member.memberships().status == 401
        assert member.memberships(at=clock.now()).status == 200
        clock.set(0)
        assert member.memberships().status == 200
        assert len(admin(node, "GET", f"/channels/{CHANNEL}/objects")["objects"]) == 1
        assert node.store(b"after").status == 200
        assert node.terminate() == 0
    assert path_of(data).endswith(sha1)
