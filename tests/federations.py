"""Several servers that work together: one is the hub, the others join its channels. Everything goes over real sockets.

For tests that also speak to the hub with a node's own key, as a server of ours would or as none should.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signables import request_bytes
from tests.servers import Answer, RunningNode

CHANNEL = "rig-data"
CONNECTED = "the hub's bands are connected"


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


def node_id(node: RunningNode) -> str:
    return (node.storage / "kachery-node-id").read_text()


class SignedRequests:
    """Requests that a node signs, made by a test that has its key."""

    def __init__(self, hub: RunningNode, key: PrivateKey) -> None:
        self.hub = hub
        self.key = key

    @property
    def id(self) -> str:
        return self.key.public_hex

    def header(self, method: str, target: str, body: bytes = b"") -> dict[str, str]:
        now, nonce = int(time.time()), secrets.token_hex(16)
        digest = hashlib.sha256(body).hexdigest()
        data = request_bytes(method, target, digest, now, nonce, self.key.public_hex, node_id(self.hub))
        return {"Kachery-Node": f"v1 {self.key.public_hex} {now} {nonce} {self.key.sign(data).hex()}"}

    def request(self, method: str, target: str, value: Any = None) -> Answer:
        body = b"" if value is None else json.dumps(value).encode()
        headers = {"Content-Type": "application/json", **self.header(method, target, body)}
        return self.hub.request(method, target, body or None, headers, auth=False)

    def upload_url(self, sha1: str, size: int, *, channel: str = CHANNEL, on_demand: bool = True) -> Answer:
        body = {"sha1": sha1, "size": size, "onDemand": on_demand}
        return self.request("POST", f"/api/v1/channels/{channel}/uploads", body)

    def bucket_path(self, channel: str = CHANNEL) -> str:
        """Where this node reads a channel's bucket: a path at the hub."""
        answer = self.request("GET", "/api/v1/nodes/memberships")
        assert answer.status == 200, answer.body
        (url,) = (row["bucketUrl"] for row in answer.json()["memberships"] if row["channel"] == channel)
        return "/" + str(url).split("/", 3)[3]


class Federation:
    """A hub and the servers that joined it, all with every role in one private channel. Made by `federate`."""

    def __init__(self, hub: RunningNode, members: Mapping[str, RunningNode]) -> None:
        self.hub = hub
        self.members = dict(members)

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """An admin request to the hub that must succeed."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body)
        answer = self.hub.request(method, f"/api/admin/v1{path}", data, headers, auth=self.hub.admin_token)
        assert answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json() if answer.body else None

    def make_channel(self, name: str, *, public: bool = False) -> None:
        self.admin("POST", "/channels", {"name": name, "owner": "admin", "public": public})

    def join(self, node: RunningNode | str, channel: str = CHANNEL, *roles: str, **membership: Any) -> None:
        """Member of the channel with these roles granted; without any, with all. `node`: a server, or a node id."""
        name = node if isinstance(node, str) else node_id(node)
        self.admin("PUT", f"/channels/{channel}/memberships/{name}", membership)
        self.grant(node, *(roles or ("all",)), channel=channel)

    def grant(self, node: RunningNode | str, *roles: str, channel: str = CHANNEL) -> None:
        """What the channel grants a node, in place of what it did; nothing without roles."""
        name = node if isinstance(node, str) else node_id(node)
        path = f"/channels/{channel}/authorizations/node/{name}"
        if roles:
            self.admin("PUT", path, {"roles": list(roles)})
        else:
            self.admin("DELETE", path)

    def approve(self, name: str) -> None:
        """Wait until a node has told the hub who it is, and let it in."""
        until = time.monotonic() + 10
        while not any(node["nodeId"] == name for node in self.admin("GET", "/nodes")["nodes"]):
            assert time.monotonic() < until, name
            time.sleep(0.05)
        self.admin("PATCH", f"/nodes/{name}", {"approved": True})

    def as_node(self, node: RunningNode) -> SignedRequests:
        """Requests to the hub with the key of a server."""
        return SignedRequests(self.hub, PrivateKey.from_pem((node.storage / "private.pem").read_text()))

    def stranger(self, label: str = "odd", *roles: str, channel: str = CHANNEL) -> SignedRequests:
        """A member that is no server of ours: a key, registered and approved at the hub, with these roles (or all)."""
        found = SignedRequests(self.hub, PrivateKey.generate())
        self.admin("POST", "/nodes", {"nodeId": found.id, "label": label, "owner": "admin"})
        self.join(found.id, channel, *roles)
        return found

    def objects(self, channel: str = CHANNEL) -> dict[str, dict[str, Any]]:
        """What lies in a bucket, by the last part of its path."""
        rows = self.admin("GET", f"/channels/{channel}/objects?limit=1000")["objects"]
        return {row["path"].rpartition("/")[2]: row for row in rows}

    def load(self, node: RunningNode, sha1: str, *, channel: str = CHANNEL, **key: Any) -> Answer:
        return node.post("/loadFile", {"fileKey": {"sha1": sha1, **key}, "channelName": channel}, timeout=120)

    def last(self, node: RunningNode, sha1: str, **more: Any) -> dict[str, Any]:
        """The last message of a load."""
        answer = self.load(node, sha1, **more)
        assert answer.status == 200, answer.body
        return frames(answer.body)[-1]

    def puts(self) -> int:
        """How many uploads the hub has been sent."""
        lines = [line for line in self.hub.log.splitlines() if "/bucket/upload/" in line]
        return sum(json.loads(line).get("method") == "PUT" for line in lines if line.startswith("{"))

    def settle(self, *nodes: RunningNode) -> None:
        """Until the bands of these members are connected (all, without a name), and have heard of their roles."""
        until = time.monotonic() + 20
        for node in nodes or tuple(self.members.values()):
            while CONNECTED not in node.log:
                assert time.monotonic() < until, node.log[-3000:]
                time.sleep(0.05)
        time.sleep(1)


def federate(make_node: Callable[..., RunningNode], *names: str, **env: str) -> Federation:
    """A hub and one server for each name, in a private channel where each has every role; bands connected."""
    hub = make_node("hub", env=env).start()
    joined = {"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{hub.port}", **env}
    members = {name: make_node(name, env=joined).start() for name in names}
    found = Federation(hub, members)
    found.make_channel(CHANNEL)
    for node in members.values():
        found.approve(node_id(node))
    for node in (hub, *members.values()):
        found.join(node)
    found.settle()
    return found
