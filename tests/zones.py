"""What kachery 2 asks of zones, on a hub in the test's process."""

from __future__ import annotations

import time
from typing import Any

from kachery_lab.core.ids import UserName
from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.hubs import Hub, sha1_of
from tests.servers import Answer


class Zone:
    """A channel and people in it: `owner` has all roles, `writer` provides files, `reader` requests them, `other` has a
    token and nothing else. Each has a token with `read write` unless said."""

    def __init__(self, hub: Hub, *, public: bool = False, **limits: Any) -> None:
        self.hub = hub
        self.name = f"z{time.monotonic_ns():x}"
        self._number = time.monotonic_ns()
        hub.make_channel(self.name, public=public, **limits)
        for user, roles in (
            ("owner", Role.ALL),
            ("writer", Role.PROVIDE_FILES),
            ("reader", Role.REQUEST_FILES),
            ("other", Role.NONE),
        ):
            if roles:
                self.grant(user, roles)
        self.owner, self.writer, self.reader, self.other = (
            self.token(user) for user in ("owner", "writer", "reader", "other")
        )

    def user(self, name: str) -> UserName:
        """A name that no other zone of the test's hub uses."""
        return UserName(f"{name}.{self._number}")

    def grant(self, name: str, roles: Role) -> None:
        self.hub.call(self.hub.node.authorizations.grant(OPERATOR, self.name, "user", self.user(name), roles))

    def revoke(self, name: str) -> None:
        self.hub.call(self.hub.node.authorizations.revoke(OPERATOR, self.name, "user", self.user(name)))

    def token(self, name: str, *scopes: str, **more: Any) -> str:
        """A fresh token of one of the people."""
        made = self.hub.node.tokens.create(OPERATOR, self.user(name), list(scopes or ("read", "write")), **more)
        return self.hub.call(made)[1]

    def ask(self, kind: str, key: str | None, **fields: Any) -> Answer:
        """One call of kachery 2; `key` is the API key."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.hub.post(f"/api/{kind}", {"type": f"{kind}Request", **fields}, **headers)

    def initiate(self, key: str | None, data: bytes, **changes: Any) -> Answer:
        fields = {
            "size": len(data),
            "hashAlg": "sha1",
            "hash": sha1_of(data),
            "zoneName": self.name,
            "workToken": "x",
            **changes,
        }
        return self.ask("initiateFileUpload", key, **fields)

    def announced(self, data: bytes, key: str | None = None) -> str:
        """Where the bytes of a fresh announcement go."""
        made = self.initiate(key or self.owner, data)
        assert made.status == 200, made.body
        return str(made.json()["signedUploadUrl"])

    def finalize(self, key: str | None, data: bytes, **changes: Any) -> Answer:
        sha1 = changes.pop("hash", sha1_of(data))
        zone = changes.get("zoneName", self.name)
        fields = {
            "objectKey": f"{zone}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}",
            "hashAlg": "sha1",
            "hash": sha1,
            "zoneName": zone,
            "size": len(data),
            **changes,
        }
        return self.ask("finalizeFileUpload", key, **fields)

    def find(self, key: str | None, data: bytes, **changes: Any) -> Answer:
        fields = {"hashAlg": "sha1", "hash": sha1_of(data), "zoneName": self.name, **changes}
        return self.ask("findFile", key, **fields)

    def put(self, url: str, data: bytes) -> Answer:
        """As the clients PUT: no content type."""
        return self.hub.request("PUT", url, data)

    def upload(self, key: str, data: bytes) -> None:
        """All three requests; the file may be there already."""
        made = self.initiate(key, data)
        assert made.status == 200, made.body
        if made.json()["alreadyExists"]:
            return
        assert self.put(made.json()["signedUploadUrl"], data).status == 200
        answer = self.finalize(key, data)
        assert (answer.status, answer.json()["success"]) == (200, True), answer.body

    def url(self, key: str | None, data: bytes) -> str:
        """Where the file is read."""
        found = self.find(key, data)
        assert found.status == 200, found.body
        assert found.json()["found"], found.body
        return str(found.json()["url"])


def fresh(size: int = 4096) -> bytes:
    """Bytes that no other test uses."""
    stamp = time.monotonic_ns().to_bytes(8, "big")
    return (stamp * (size // 8 + 1))[:size]
