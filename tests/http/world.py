"""A server with people, nodes and channels in it, a credential of every kind, and a good request for each route.

Requests of `/api/v1` and `/api/admin/v1` are the examples of `/openapi.json`; those of the other rooms stand here.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signables import request_bytes
from kachery_lab.core.signatures import sign_2021
from kachery_lab.http.describe import BYTES, Operation, example
from kachery_lab.http.openapi import operations
from tests.gateway import CloudClient
from tests.servers import Answer, RunningNode

ADMIN = "/api/admin/v1"
ABC = b"abc"
SHA1 = hashlib.sha1(ABC).hexdigest()
OBJECT = f"sha1/{SHA1[:2]}/{SHA1[2:4]}/{SHA1[4:6]}/{SHA1}"
SUBFEED = "a" * 40
NODE_KEY = PrivateKey.from_seed("01" * 32)
NODE = NODE_KEY.public_hex
CLOUD, NEW_CLOUD = CloudClient(bytes([3]) * 32), CloudClient(bytes([4]) * 32)
OTHER_NODE = PrivateKey.from_seed("02" * 32).public_hex
BROWSER_CODE = "browser-code-for-tests"
KINDS = (
    *("none", "bad", "expired", "browser", "local"),
    *("client", "read", "write", "owner", "other", "admin", "metrics"),
)
"""`owner` and `other` have the scope `channel-owner`; what the requests name belongs to `owner`."""

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
DESCRIBED: dict[str, Operation] = {f"{one.method} {one.path}": one for one in operations()}


@dataclass
class Call:
    """One request."""

    method: str
    target: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def addresses() -> Iterator[str]:
    """Loopback addresses: wrong credentials are counted by address."""
    for number in itertools.cycle(range(2, 60_000)):
        yield f"127.0.{number // 250}.{number % 250 + 2}"


class World:
    """`ann` owns the channel `recordings` and a node that is in it; `ben` owns others."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        self._addresses = addresses()
        self.tokens: dict[str, str] = {"root": node.admin_token, "bad": "klk_" + "a" * 32}
        expires = self._token_that_expires()
        for kind in ("client", "read", "write", "metrics"):
            self.tokens[kind] = self.token("ann", kind)
        for kind, user, scope in (
            ("owner", "ann", "channel-owner"),
            ("other", "ben", "channel-owner"),
            ("admin", "boss", "admin"),
        ):
            self.tokens[kind] = self.token(user, scope)
        code = {"key": "_other_client_auth_codes", "value": [BROWSER_CODE]}
        assert node.post("/mutable/set", code).json() == {"success": True}
        self.feed = node.post("/feed/createFeed", {"feedName": "tests"}).json()["feedId"]
        self.file = node.metadata.parent / "abc"
        self.file.write_bytes(ABC)
        self.restore()
        self.admin("POST", "/channels", {"name": "others", "owner": "ben"})
        time.sleep(max(0.0, expires / 1000 - time.time()))

    def _token_that_expires(self) -> float:
        """Make it; the moment in ms when it ends. On a busy machine a short one may be over when it is asked for."""
        for seconds in (1.5, 6, 24):
            expires = int((time.time() + seconds) * 1000)
            body = {"user": "ann", "scopes": ["admin"], "expiresAt": expires}
            made = self.admin("POST", "/tokens", body, accept=(400,))
            if "token" in made:
                self.tokens["expired"] = made["token"]
                return expires
        raise AssertionError(made)

    # -- talking -------------------------------------------------------------------------------------------------

    def send(self, call: Call, headers: Mapping[str, str] | None = None) -> Answer:
        """One request, from an address that sent nothing wrong before. `WEBSOCKET` asks for the upgrade only."""
        method, given = call.method, {**call.headers, **(headers or {})}
        if method == "WEBSOCKET":
            method, given = "GET", {**given, **UPGRADE}
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.node.port, timeout=60, source_address=(next(self._addresses), 0)
        )
        try:
            connection.request(method, call.target, call.body, given)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def credential(self, kind: str) -> dict[str, str]:
        """The headers of a kind of caller."""
        if kind == "none":
            return {}
        if kind in ("local", "browser"):
            return {"KACHERY-CLIENT-AUTH-CODE": self.node.code if kind == "local" else BROWSER_CODE}
        return {"Authorization": f"Bearer {self.tokens[kind]}"}

    def admin(self, method: str, path: str, body: Any = None, *, accept: tuple[int, ...] = ()) -> Any:
        """A request of an admin, that must be answered 2xx or one of `accept`."""
        data = None if body is None else json.dumps(body).encode()
        answer = self.send(Call(method, ADMIN + path, data), self.credential("root"))
        assert answer.status < 300 or answer.status in accept, (method, path, answer)
        return answer.json() if answer.body else None

    def token(self, user: str, *scopes: str, **more: Any) -> str:
        """A fresh token."""
        return str(self.admin("POST", "/tokens", {"user": user, "scopes": list(scopes), **more})["token"])

    def signed(self, method: str, target: str, body: bytes = b"") -> dict[str, str]:
        """The header of a request that ann's node signs."""
        now, nonce = int(time.time()), secrets.token_hex(8)
        hub = self.node.request("GET", "/api/v1/info", auth=False).json()["nodeId"]
        data = request_bytes(method, target, hashlib.sha256(body).hexdigest(), now, nonce, NODE, hub)
        return {"Kachery-Node": f"v1 {NODE} {now} {nonce} {NODE_KEY.sign(data).hex()}"}

    # -- what is there -------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Everything is there as it was; twice is no error."""
        for user in ("ann", "ben"):
            self.admin("POST", "/users", {"name": user}, accept=(409,))
        self.admin("POST", "/channels", {"name": "recordings", "owner": "ann"}, accept=(409,))
        limits = {"maxBytes": None, "maxObjectBytes": None, "retentionDays": None}
        self.admin("PATCH", "/channels/recordings", {"owner": "ann", "public": False, **limits})
        self.admin("POST", "/nodes", {"nodeId": NODE, "label": "rig-1", "owner": "ann"}, accept=(409,))
        self.admin("PATCH", f"/nodes/{NODE}", {"owner": "ann", "label": "rig-1", "approved": True})
        self.admin("PUT", f"/channels/recordings/memberships/{NODE}", {})
        self.admin("PUT", f"/channels/recordings/authorizations/node/{NODE}", {"roles": ["all"]})
        self.admin("PUT", "/channels/recordings/authorizations/user/ann", {"roles": ["requestFiles"]})
        self.admin("DELETE", "/channels/recordings/functions/add.1/grants/user/ann", accept=(404,))
        self.admin("POST", "/clients", {"clientId": CLOUD.id, "user": "ann"}, accept=(409,))
        self.admin("DELETE", f"/clients/{OTHER_NODE}", accept=(404,))
        self.admin("DELETE", "/channels/tracking", accept=(404,))
        self.admin("DELETE", f"/nodes/{OTHER_NODE}", accept=(404,))
        self.admin("DELETE", "/quotas/user:ann", accept=(404,))

    def prepare(self, route: str) -> dict[str, str]:
        """Make the one thing that a request of this route needs, or is not to find; parameters that vary."""
        if route in (f"POST {ADMIN}/users", "POST /api/addUser"):
            self.admin("DELETE", "/users/carol", accept=(404,))
        elif route.endswith("/users/{user}"):
            self.admin("POST", "/users", {"name": "carol"}, accept=(409,))
        elif route.endswith("/tokens/{id}"):
            return {"id": self.admin("POST", "/tokens", {"user": "ann", "scopes": ["read"]})["id"]}
        elif route.endswith("/clients/{clientId}"):
            self.admin("POST", "/clients", {"clientId": OTHER_NODE, "user": "ann"}, accept=(409,))
        elif route.endswith("/enrolment-codes/{id}"):
            return {"id": self.admin("POST", "/enrolment-codes", {"user": "ann"})["id"]}
        elif route.endswith("/passcodes/{id}"):
            return {"id": self.admin("POST", "/channels/recordings/passcodes", {"roles": ["all"]})["id"]}
        elif "{sha1}" in route or "/downloadFileData" in route or "/uploadFile" in route:
            assert self.node.store(ABC).status == 200
        elif route.endswith("/functions/{function}/grants/{kind}/{subject}"):
            self.admin("PUT", "/channels/recordings/functions/add.1/grants/user/ann", {"roles": ["requestTasks"]})
        elif route == f"DELETE {ADMIN}/quotas/{{subject}}":
            self.admin("PUT", "/quotas/user:ann", {"maxBytes": None, "maxObjects": 1000})
        elif "/deletions/{path" in route:
            assert self.upload() in (200, None)
            self.admin("DELETE", f"/channels/recordings/objects/{OBJECT}")
        elif route == "POST /api/addZone":
            self.admin("DELETE", "/channels/tracking", accept=(404,))
        elif route == "POST /api/deleteZone":
            self.admin("POST", "/channels", {"name": "tracking", "owner": "ann"}, accept=(409,))
        elif route == "POST /api/finalizeFileUpload":
            self.announce()
        elif "/objects/{path" in route or route.startswith(("GET /bucket/", "GET /sha1/")):
            assert self.upload() in (200, None)
        return {}

    def upload_url(self) -> str | None:
        """Where ann's node may put an object into `recordings`; None when it is there."""
        target, body = "/api/v1/channels/recordings/uploads", json.dumps({"sha1": SHA1, "size": len(ABC)}).encode()
        answer = self.send(Call("POST", target, body), self.signed("POST", target, body))
        assert answer.status == 200, answer
        url = answer.json()["url"]
        return None if url is None else urlsplit(url).path

    def upload(self) -> int | None:
        """Put the object; None when it is there."""
        url = self.upload_url()
        return None if url is None else self.send(Call("PUT", url, ABC)).status

    def announce(self) -> None:
        """Announce the object as ann and send its bytes, so that only the last request is missing."""
        self.admin("DELETE", f"/channels/recordings/objects/{OBJECT}", accept=(404,))
        body = json.dumps(self._zone_bodies()["/api/initiateFileUpload"]).encode()
        answer = self.send(Call("POST", "/api/initiateFileUpload", body), self.credential("write"))
        assert answer.status == 200, answer
        url = urlsplit(answer.json()["signedUploadUrl"]).path
        assert self.send(Call("PUT", url, ABC)).status == 200

    # -- requests ------------------------------------------------------------------------------------------------

    def call(self, route: str) -> Call:
        """A good request for a route, after `prepare`."""
        found = self.prepare(route)
        if route in DESCRIBED:
            return self._described(DESCRIBED[route], found)
        return self._plain(route)

    def _described(self, operation: Operation, found: Mapping[str, str]) -> Call:
        values = {name: str(example(schema)) for name, schema in operation.parameters.items()} | found
        if operation.who == ("node",):
            values = dict.fromkeys(values, "recordings")
        target = re.sub(r"{(\w+)(?::\w+)?}", lambda match: quote(values[match.group(1)], safe=""), operation.path)
        query = "&".join(f"{name}={quote(str(example(one)))}" for name, one in operation.query.items())
        target = f"{target}?{query}" if query else target
        if operation.body is None:
            body, headers = None, {}
        elif operation.body is BYTES:
            body, headers = str(example(operation.body)).encode(), {"Content-Type": "application/octet-stream"}
        else:
            body, headers = json.dumps(example(operation.body)).encode(), {"Content-Type": "application/json"}
        if operation.path == "/api/v1/nodes/report":
            body = json.dumps({"label": "rig-1", "owner": "ann"}).encode()
        if operation.who == ("node",):
            headers |= self.signed(operation.method, target, body or b"")
        return Call(operation.method, target, body, headers)

    def _plain(self, route: str) -> Call:
        method, _, path = route.partition(" ")
        if path == "/store":
            return Call(method, path, ABC)
        if path.startswith("/bucket/"):
            return self._bucket(method, path)
        if path.startswith(("/registerClient/", "/client/")):
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            target = f"/client/{CLOUD.id}" if path.startswith("/client/") else NEW_CLOUD.link()
            return Call(method, target, b"user=ann", form) if method == "POST" else Call(method, target)
        if path.endswith("/r/{zone}"):
            wanted = {"type": "fileUpload", "uri": f"sha1://{SHA1}", "timeoutMsec": 0}
            named = {"resourceName": "recordings", "zone": "recordings", "request": wanted, "timeoutMsec": 0}
            target = path.replace("{token}", self.tokens["read"]).replace("{zone}", "recordings")
            return Call(method, target, json.dumps({"type": "requestFromClient", **named}).encode())
        if path == "/p/{token}":
            return Call(method, path.replace("{token}", self.tokens["write"]))
        if path.startswith("/sha1/"):
            return Call(method, path.replace("{hash}", SHA1).replace("{name}", "session.nwb"))
        if path == "/":
            return Call(method, path)
        if path == "/api/v1/bands":
            return Call(method, path, None, self.signed("GET", path))
        bodies = self._bodies()
        body = None if method == "GET" else json.dumps(bodies[path]).encode()
        return Call(method, path, body, {} if body is None else {"Content-Type": "application/json"})

    def _bodies(self) -> dict[str, Any]:
        subfeed = {"feedId": self.feed, "subfeedHash": SUBFEED}
        stat = self.file.stat()
        asked = {"type": "getNodeConfig", "nodeId": NODE, "ownerId": "ann"}
        return {
            "/probe": {},
            "/storeFile": {"localFilePath": str(self.file)},
            "/linkFile": {"localFilePath": str(self.file), "size": stat.st_size, "mtime": stat.st_mtime},
            "/loadFile": {"fileKey": {"sha1": SHA1}},
            "/downloadFileData": {"fileKey": {"sha1": SHA1}},
            "/uploadFile": {"sha1": SHA1, "channel": "default"},
            "/createSignedFileUploadUrl": {"channelName": "default", "sha1": SHA1, "size": len(ABC)},
            "/feed/createFeed": {},
            "/feed/deleteFeed": {"feedId": "0" * 64},
            "/feed/getFeedId": {"feedName": "tests"},
            "/feed/getFeedInfo": {"feedId": self.feed},
            "/feed/appendMessages": {**subfeed, "messages": [{"a": 1}]},
            "/feed/getNumLocalMessages": subfeed,
            "/feed/watchForNewMessages": {"subfeedWatches": {}, "waitMsec": 0},
            "/mutable/get": {"key": "tests"},
            "/mutable/set": {"key": "tests", "value": 1},
            "/mutable/delete": {"key": "tests"},
            "/task/registerTaskFunctions": {"taskFunctions": [], "timeoutMsec": 0},
            "/task/updateTaskStatus": {"channelName": "default", "taskId": "unknown", "status": "running"},
            "/task/createSignedTaskResultUploadUrl": {"channelName": "default", "taskId": SHA1, "size": 2},
            "/task/requestTask": {
                "channelName": "default",
                "taskFunctionId": "add.1",
                "taskKwargs": {},
                "taskFunctionType": "pure-calculation",
                "timeoutMsec": 0,
            },
            "/task/waitForTaskResult": {
                "channelName": "default",
                "taskId": "unknown",
                "taskResultUrl": None,
                "taskFunctionType": "action",
                "timeoutMsec": 0,
            },
            "/api/kacheryNode": {
                "body": asked,
                "nodeId": NODE,
                "signature": sign_2021(NODE_KEY, canonical_2021(asked)),
            },
            "/api/getChannelBucketBaseUrl": {"channelName": "recordings"},
            "/api/resource": {
                "type": "getResourceInfo",
                "resourceId": self.admin("GET", "/channels/recordings")["resourceId"],
            },
            "/api/kacheryHub": {},
            "/api/gateway": CLOUD.file("findFile", ABC, "recordings"),
            **self._zone_bodies(),
        }

    def _zone_bodies(self) -> dict[str, Any]:
        """Requests of kachery 2."""
        zone, user = {"zoneName": "recordings"}, {"userId": "ann"}
        file = {"hashAlg": "sha1", "hash": SHA1, **zone}
        fields: dict[str, dict[str, Any]] = {
            "initiateFileUpload": {**file, "size": len(ABC), "workToken": ""},
            "finalizeFileUpload": {**file, "size": len(ABC), "objectKey": f"recordings/{OBJECT}"},
            "findFile": file,
            "addUser": {"userId": "carol"},
            "getUser": user,
            "getUsers": {},
            "setUserInfo": {**user, "name": "Ann"},
            "resetUserApiKey": user,
            "computeUserStats": user,
            "addZone": {"zoneName": "tracking", **user},
            "getZone": zone,
            "getZones": {},
            "setZoneInfo": {**zone, "publicDownload": False},
            "deleteZone": {"zoneName": "tracking"},
            "usage": user,
        }
        return {f"/api/{kind}": {"type": f"{kind}Request", **found} for kind, found in fields.items()}

    def _bucket(self, method: str, path: str) -> Call:
        if method == "PUT":
            self.admin("DELETE", f"/channels/recordings/objects/{OBJECT}", accept=(404,))
            url = self.upload_url()
            assert url is not None
            return Call(method, url, ABC)
        if "{capability}" in path:
            answer = self.send(
                Call("GET", "/api/v1/nodes/memberships"), self.signed("GET", "/api/v1/nodes/memberships")
            )
            return Call(method, f"{urlsplit(answer.json()['memberships'][0]['bucketUrl']).path}/{OBJECT}")
        return Call(method, f"/bucket/recordings/{OBJECT}")
