"""A hub in a thread of the test's process: a real server on a loopback port, whose services the test can call."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kachery_lab.app import create_app
from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import ChannelName, NodeId, NodeLabel, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from kachery_lab.http.server import build_server
from kachery_lab.node import Node, open_node
from kachery_lab.services.principals import OPERATOR
from kachery_lab.settings import Settings
from tests.servers import Answer

T = TypeVar("T")
OWNER = "me@example.org"


class LabNode:
    """A node of 2021 or an ephemeral client: a key, an owner, and what they sign."""

    def __init__(self, owner: str = OWNER, seed: bytes | None = None) -> None:
        self.key = PrivateKey(seed) if seed is not None else PrivateKey.generate()
        self.owner = owner

    @property
    def id(self) -> NodeId:
        return NodeId(self.key.public_hex)

    def envelope(self, kind: str, **fields: Any) -> dict[str, Any]:
        """A signed request for /api/kacheryNode."""
        body = {"type": kind, **fields}
        if kind != "getChannelConfig":
            body = {"type": kind, "nodeId": self.id, "ownerId": self.owner, **fields}
        return {"body": body, "nodeId": self.id, "signature": sign_2021(self.key, canonical_2021(body))}


def upload_request(
    certificate: dict[str, Any], key: str, resource_id: str, paths: list[str], sizes: list[int], **changes: Any
) -> dict[str, Any]:
    """A signed getUploadUrls request as the daemon sends it."""
    payload = {
        "type": "getUploadUrls",
        "expires": int(time.time() * 1000) + 60_000,
        "resourceId": resource_id,
        "filePaths": paths,
        "sizes": sizes,
        **changes,
    }
    signer = PrivateKey.from_seed(key)
    return {
        "type": "getUploadUrls",
        "payload": payload,
        "auth": {
            "signerId": signer.public_hex,
            "signature": sign_2021(signer, canonical_2021(payload)),
            "delegationCertificate": certificate,
        },
    }


class Hub:
    """Start with `with`."""

    def __init__(self, root: Path, port: int = 0, **settings: Any) -> None:
        for name in ("storage", "metadata"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.storage = root / "storage"
        settings = {"KACHERY_STORAGE_DIR": self.storage, "metadata_dir": root / "metadata", **settings}
        self.node: Node = open_node(Settings(**settings))
        self.loop: asyncio.AbstractEventLoop
        self._server = build_server(create_app(self.node), graceful_timeout=1)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(100)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])

    def __enter__(self) -> Hub:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def code(self) -> str:
        return (self.storage / "client-auth").read_text()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a service's coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    # -- requests --------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        before_end: Callable[[], None] | None = None,
    ) -> Answer:
        """One request on a connection of its own; a URL of this server, or a path. `before_end` runs when half of the
        body is sent."""
        path = target.removeprefix(self.base)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if before_end is None:
                connection.request(method, path, body, dict(headers or {}))
            else:
                assert body is not None
                connection.putrequest(method, path, skip_accept_encoding=True)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    connection.putheader(name, value)
                connection.endheaders(body[: len(body) // 2])
                before_end()
                connection.send(body[len(body) // 2 :])
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, target: str, **headers: str) -> Answer:
        return self.request("GET", target, None, headers)

    def put(self, url: str, body: bytes, **more: Any) -> Answer:
        return self.request("PUT", url, body, {"Content-Type": "application/octet-stream"}, **more)

    def post(self, path: str, value: Any, **headers: str) -> Answer:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json", **headers})

    def daemon(self, path: str, value: Any) -> Answer:
        """A request of the daemon API with the local code."""
        return self.post(path, value, **{"KACHERY-CLIENT-AUTH-CODE": self.code})

    # -- access data -----------------------------------------------------------------------------------------------

    def make_channel(self, name: str, *, public: bool = False, **limits: Any) -> None:
        self.call(self.node.channels.create(OPERATOR, ChannelName(name), UserName("boss"), public=public, **limits))

    def register(self, node: LabNode, label: str = "node") -> None:
        self.call(self.node.nodes.add(OPERATOR, node.id, UserName(node.owner), NodeLabel(label)))

    def join(self, node: LabNode | NodeId, channel: str, roles: Role = Role.ALL) -> None:
        """Member of the channel, with these roles granted (and all asked for)."""
        node_id = node.id if isinstance(node, LabNode) else node
        self.call(self.node.authorizations.join(OPERATOR, channel, node_id))
        if roles:
            self.grant(node_id, channel, roles)

    def grant(self, node_id: NodeId, channel: str, roles: Role) -> None:
        self.call(self.node.authorizations.grant(OPERATOR, channel, "node", node_id, roles))

    def revoke(self, node_id: NodeId, channel: str) -> None:
        self.call(self.node.authorizations.revoke(OPERATOR, channel, "node", node_id))

    def refusals(self) -> list[tuple[str, str, str, str]]:
        """(Who, action, object, detail) of refusals in the audit, the newest first."""
        found = self.call(self.node.audit.list(None, 100, outcome="forbidden"))
        return [(entry.principal, entry.action, entry.object, entry.detail) for entry in found]

    # -- what nodes of 2021 do -------------------------------------------------------------------------------------

    def ask(self, node: LabNode, kind: str, **fields: Any) -> Answer:
        return self.post("/api/kacheryNode", node.envelope(kind, **fields))

    def certificate(self, node: LabNode, channel: str) -> tuple[dict[str, Any], str]:
        answer = self.ask(node, "getBitwooderCertForChannel", channelName=channel)
        assert answer.status == 200, answer.body
        return answer.json()["cert"], answer.json()["key"]

    def upload_urls(self, node: LabNode, channel: str, paths: list[str], sizes: list[int]) -> list[str]:
        """As the daemon does it: certificate, then signed upload URLs."""
        certificate, key = self.certificate(node, channel)
        resource_id = self.node.data.channel(channel).resource_id
        full = [f"{channel}/{path}" for path in paths]
        answer = self.post("/api/resource", upload_request(certificate, key, resource_id, full, sizes))
        assert answer.status == 200, answer.body
        assert answer.json()["type"] == "getUploadUrls"
        urls: list[str] = answer.json()["uploadUrls"]
        return urls

    def upload(self, node: LabNode, channel: str, data: bytes) -> str:
        """Upload a file; its path in the bucket."""
        path = path_of(data)
        (url,) = self.upload_urls(node, channel, [path], [len(data)])
        assert self.put(url, data).status == 200
        return path

    def bucket(self, node: LabNode, channel: str) -> str:
        """The node's own address of a channel's bucket, channel included."""
        config = self.ask(node, "getChannelConfig", channelName=channel)
        assert config.status == 200, config.body
        return f"{config.json()['channelConfig']['bucketBaseUrl']}/{channel}"


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def path_of(data: bytes) -> str:
    """Object path of a file."""
    return path_of_sha1(sha1_of(data))


def path_of_sha1(sha1: str) -> str:
    return f"sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def refused(answer: Answer, status: int = 404) -> str:
    """The text of a refusal of the 2021 hub."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.body.decode()
