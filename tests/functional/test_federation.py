"""Two servers: one is the hub, the other joins its channels. Everything goes over real sockets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.servers import RunningNode, blob_path, drafts

CHANNEL = "rig-data"


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def frames(body: bytes) -> list[dict[str, Any]]:
    """Messages of a `/loadFile` answer."""
    found = []
    while body:
        length, _, rest = body.partition(b"#")
        found.append(json.loads(rest[: int(length)]))
        body = rest[int(length) :]
    return found


class Lab:
    """A hub with one private channel and one joined node that has every role there."""

    def __init__(self, hub: RunningNode, member: RunningNode) -> None:
        self.hub = hub
        self.member = member
        self.member_id = (member.storage / "kachery-node-id").read_text()
        self.hub_id = (hub.storage / "kachery-node-id").read_text()

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """An admin request to the hub that must succeed."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body)
        answer = self.hub.request(method, f"/api/admin/v1{path}", data, headers, auth=self.hub.admin_token)
        assert answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json() if answer.body else None

    def grant(self, *roles: str) -> None:
        """What the channel grants the member, in place of what it did."""
        path = f"/channels/{CHANNEL}/authorizations/node/{self.member_id}"
        if roles:
            self.admin("PUT", path, {"roles": list(roles)})
        else:
            self.admin("DELETE", path)

    def load(self, sha1: str, **key: Any) -> Any:
        return self.member.post("/loadFile", {"fileKey": {"sha1": sha1, **key}, "channelName": CHANNEL})

    def upload(self, node: RunningNode, sha1: str) -> Any:
        return node.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL})


@pytest.fixture
def lab(make_node: Callable[..., RunningNode]) -> Iterator[Lab]:
    hub = make_node("hub").start()
    member = make_node("member", env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{hub.port}"}).start()
    lab = Lab(hub, member)
    until = time.monotonic() + 10
    while not any(node["nodeId"] == lab.member_id for node in lab.admin("GET", "/nodes")["nodes"]):
        assert time.monotonic() < until, member.log
        time.sleep(0.1)
    lab.admin("PATCH", f"/nodes/{lab.member_id}", {"approved": True})
    lab.admin("POST", "/channels", {"name": CHANNEL, "owner": "admin"})
    for node_id in (lab.hub_id, lab.member_id):
        lab.admin("PUT", f"/channels/{CHANNEL}/memberships/{node_id}", {})
        lab.admin("PUT", f"/channels/{CHANNEL}/authorizations/node/{node_id}", {"roles": ["all"]})
    yield lab


def test_a_file_goes_through_the_hubs_bucket(lab: Lab) -> None:
    """Stored at the hub's node, uploaded, loaded at the member; only then is it on the member's volume."""
    data = os.urandom(3_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert frames(lab.load(sha1).body)[-1]["type"] == "error"
    assert lab.upload(lab.hub, sha1).json() == {"success": True}

    answer = frames(lab.load(sha1).body)

    assert answer[-1] == {"type": "finished", "localFilePath": str(blob_path(lab.member.storage, sha1))}
    assert answer[-2] == {"type": "progress", "bytesLoaded": len(data), "bytesTotal": len(data)}
    assert blob_path(lab.member.storage, sha1).read_bytes() == data
    assert re.search(rf"GET.*/bucket/.*{sha1}", lab.hub.log), "the hub served it"
    assert drafts(lab.member.storage) == []


def test_the_other_way_round(lab: Lab) -> None:
    """A member's upload travels to the hub, once, and is verified there."""
    data = os.urandom(200_000)
    sha1 = lab.member.store(data).json()["sha1"]
    for _ in range(2):
        assert lab.upload(lab.member, sha1).json() == {"success": True}
    assert blob_path(lab.hub.storage, sha1).read_bytes() == data
    url = lab.member.post(
        "/createSignedFileUploadUrl", {"channelName": CHANNEL, "sha1": sha1, "size": len(data)}
    ).json()
    assert url == {"success": True, "alreadyUploaded": True}
    assert len(re.findall(r'"method": "PUT"', lab.hub.log)) <= 1 or lab.hub.log.count("/bucket/upload/") == 1


def test_each_role_stops_its_flow_at_once(lab: Lab) -> None:
    """403 before the first frame, naming role and channel; and it works again when the role is back."""
    data = os.urandom(5000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.upload(lab.hub, sha1).status == 200
    mine = lab.member.store(os.urandom(4000)).json()["sha1"]

    lab.grant("provideFiles")
    time.sleep(1)
    refused = lab.load(sha1)
    assert refused.status == 403
    assert b"requestFiles" in refused.body and CHANNEL.encode() in refused.body
    assert lab.upload(lab.member, mine).status == 200

    lab.grant("requestFiles")
    time.sleep(1)
    assert frames(lab.load(sha1).body)[-1]["type"] == "finished"
    other = lab.member.store(os.urandom(4001)).json()["sha1"]
    refused = lab.upload(lab.member, other)
    assert refused.status == 403
    assert b"provideFiles" in refused.body and CHANNEL.encode() in refused.body
    assert not blob_path(lab.hub.storage, other).exists()
    assert "refused" in lab.member.log


def test_an_unapproved_node_gets_nothing(lab: Lab, make_node: Callable[..., RunningNode]) -> None:
    """It may tell who it is, and waits."""
    sha1 = lab.hub.store(b"for members").json()["sha1"]
    assert lab.upload(lab.hub, sha1).status == 200
    stranger = make_node("stranger", env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{lab.hub.port}"}).start()
    answer = stranger.post("/loadFile", {"fileKey": {"sha1": sha1}, "channelName": CHANNEL})
    assert answer.status == 200 and frames(answer.body)[-1]["type"] == "error"
    assert not blob_path(stranger.storage, sha1).exists()


def test_a_large_file_by_its_chunks(lab: Lab) -> None:
    """Only manifest and chunks are in the bucket; the whole is put together and verified."""
    data = os.urandom(45_000_000)
    chunks = [data[start : start + 20_000_000] for start in range(0, len(data), 20_000_000)]
    stored = lab.hub.store(data).json()
    for part in (*chunks, (blob_path(lab.hub.storage, stored["manifestSha1"])).read_bytes()):
        name = lab.hub.store(part).json()["sha1"]
        assert lab.upload(lab.hub, name).status == 200

    answer = frames(lab.load(stored["sha1"], manifestSha1=stored["manifestSha1"]).body)

    assert answer[-1]["type"] == "finished", answer
    assert answer[-2]["bytesLoaded"] == answer[-2]["bytesTotal"] == len(data)
    assert blob_path(lab.member.storage, stored["sha1"]).read_bytes() == data


class Cutter:
    """A proxy in front of the hub that cuts every answer after so many bytes."""

    def __init__(self, target: int, after: int) -> None:
        self.after = after
        self.cuts = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as hub:
            threading.Thread(target=self._copy, args=(client, hub, None), daemon=True).start()
            self._copy(hub, client, self.after)

    def _copy(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        count = 0
        try:
            while piece := source.recv(65536):
                if limit is not None and count + len(piece) > limit:
                    sink.sendall(piece[: limit - count])
                    self.cuts += 1
                    break
                sink.sendall(piece)
                count += len(piece)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


def test_a_cut_connection_is_resumed(lab: Lab) -> None:
    """Every answer is cut after 1 MB; each byte still travels about once, and the file is right."""
    data = os.urandom(5_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.upload(lab.hub, sha1).status == 200
    cutter = Cutter(lab.hub.port, 1_000_000)
    assert lab.member.terminate() == 0
    lab.member.env = {"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{cutter.port}"}
    lab.member.start()
    try:
        answer = frames(lab.load(sha1).body)
        assert answer[-1]["type"] == "finished", answer
        assert blob_path(lab.member.storage, sha1).read_bytes() == data
        assert cutter.cuts >= 4
    finally:
        cutter.close()


def test_damaged_bytes_from_the_hub_are_not_kept(lab: Lab) -> None:
    """The hub's volume is altered behind its back: the member gets an error and stores nothing."""
    data = os.urandom(2_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.upload(lab.hub, sha1).status == 200
    path = blob_path(lab.hub.storage, sha1)
    with path.open("r+b") as file:
        file.write(b"\0" * 16)
    answer = frames(lab.load(sha1).body)
    assert answer[-1]["type"] == "error"
    assert not blob_path(lab.member.storage, sha1).exists()
    assert drafts(lab.member.storage) == []


def test_a_signed_request_is_good_once(lab: Lab) -> None:
    """Replayed, altered, or meant for another hub: refused. The same request signed anew works."""
    from kachery_lab.core.keys import PrivateKey
    from kachery_lab.core.signables import request_bytes

    key = PrivateKey.from_pem((lab.member.storage / "private.pem").read_text())

    def ask(nonce: str, *, hub_id: str = lab.hub_id, shift: int = 0, signed: str = "/api/v1/nodes/memberships") -> int:
        now = int(time.time()) + shift
        empty = hashlib.sha256(b"").hexdigest()
        data = request_bytes("GET", signed, empty, now, nonce, key.public_hex, hub_id)
        header = f"v1 {key.public_hex} {now} {nonce} {key.sign(data).hex()}"
        path = "/api/v1/nodes/memberships"
        return lab.hub.request("GET", path, headers={"Kachery-Node": header}, auth=False).status

    assert ask("a" * 32) == 200
    assert ask("a" * 32) == 409
    assert ask("b" * 32, hub_id="0" * 64) == 401
    assert ask("c" * 32, signed="/api/v1/nodes/report") == 401
    assert ask("d" * 32, shift=-600) == 401
    assert ask("e" * 32, shift=600) == 401
    assert ask("f" * 32) == 200
