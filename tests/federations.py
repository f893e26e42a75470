"""Several servers that work together: one is the hub, the others join its channels. Everything goes over real sockets.

For tests that also speak to the hub with a node's own key, as a server of ours would or as none should.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signables import request_bytes
from tests.faults.report import wait_for
from tests.nodes import admin, making_nodes, requests_of
from tests.servers import Answer, RunningNode

CHANNEL = "rig-data"
SECONDS = 60.0
"""How long a busy machine may take for what takes a moment."""


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
        return admin(self.hub, method, path, body)

    def make_channel(self, name: str, *, public: bool = False) -> None:
        self.admin("POST", "/channels", {"name": name, "owner": "admin", "public": public})

    def join(self, node: RunningNode | str, channel: str = CHANNEL, *roles: str, **membership: Any) -> None:
        """Member of the channel with these roles granted; without any, with all. `node`: a server, or a node id."""
        name = node if isinstance(node, str) else node_id(node)
        self.admin("PUT", f"/channels/{channel}/memberships/{name}", membership)
        self.grant(node, *(roles or ("all",)), channel=channel)

    def open_channel(self, **membership: Any) -> str:
        """A new private channel, in which every server has every role and hears its bands; its name."""
        name = f"c{secrets.token_hex(8)}"
        self.make_channel(name)
        for node in (self.hub, *self.members.values()):
            self.join(node, name, **membership)
        self.settle()
        return name

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
        told = f"the node {name} told the hub who it is"
        wait_for(lambda: any(node["nodeId"] == name for node in self.admin("GET", "/nodes")["nodes"]), told, SECONDS)
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

    def upload(self, node: RunningNode, sha1: str, *, channel: str = CHANNEL) -> Answer:
        return node.post("/uploadFile", {"sha1": sha1, "channel": channel}, timeout=120)

    def last(self, node: RunningNode, sha1: str, **more: Any) -> dict[str, Any]:
        """The last message of a load."""
        answer = self.load(node, sha1, **more)
        assert answer.status == 200, answer.body
        return frames(answer.body)[-1]

    def puts(self) -> int:
        """How many uploads the hub has been sent."""
        # Lines are written a moment after the answer, in order: what stands before a later one is complete.
        wait_for(self._log_is_complete, "a line in the log", SECONDS)
        entries = requests_of(self.hub)
        return sum(entry["method"] == "PUT" and entry["path"].startswith("/bucket/upload/") for entry in entries)

    def _log_is_complete(self) -> bool:
        path = f"/{secrets.token_hex(8)}"
        self.hub.request("GET", path)
        return any(entry["path"] == path for entry in requests_of(self.hub))

    def settle(self, *nodes: RunningNode) -> None:
        """Until the hub's own node and these members (all, without a name) know of every change so far, and hear each
        of their bands.

        A new channel is made for it, whose name sorts behind the others: a node subscribes in the order of names, so
        who hears of a task there has done with the others."""
        channel = f"zz-{secrets.token_hex(8)}"
        self.make_channel(channel)
        found = nodes or tuple(self.members.values())
        for node in (self.hub, *found):
            self.join(node, channel)
        for node in found:
            wait_for(partial(_knows, node, channel), f"{node.storage} knows its memberships", SECONDS)
        pairs = [pair for node in found for pair in ((node, self.hub), (self.hub, node))]
        for asking, providing in pairs or [(self.hub, self.hub)]:
            wait_for(partial(_hears, asking, providing, channel), f"{providing.storage} hears its bands", SECONDS)


def _knows(node: RunningNode, channel: str) -> bool:
    """Whether a server has heard that it is a member."""
    return node.post("/createSignedFileUploadUrl", {"channelName": channel, "sha1": "0" * 40}).status != 404


def _hears(asking: RunningNode, providing: RunningNode, channel: str) -> bool:
    """Whether a task that one server asks for comes to a backend at another one, which has done it at once."""
    function = {"channelName": channel, "taskFunctionId": "settled.1", "taskFunctionType": "action"}
    asked = asking.post("/task/requestTask", {**function, "taskKwargs": {}, "timeoutMsec": 0})
    if asked.status != 200:
        return False
    offer = {"taskFunctions": [function], "backendId": None, "timeoutMsec": 1000}
    tasks = providing.post("/task/registerTaskFunctions", offer).json().get("requestedTasks", [])
    for task in tasks:
        status = {"channelName": channel, "taskId": task["taskId"], "status": "finished"}
        assert providing.post("/task/updateTaskStatus", status).status == 200
    return bool(tasks)


@contextmanager
def federation(root: Path, *names: str, **env: str) -> Iterator[Federation]:
    """As `federate`, in a directory, for many tests. At the end no log may show a traceback."""
    with making_nodes(root) as make_node:
        found = federate(make_node, *names, **env)
        yield found
        for node in (found.hub, *found.members.values()):
            assert "Traceback" not in node.log, node.log[-4000:]


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
