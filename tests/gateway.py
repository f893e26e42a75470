"""What kachery-cloud sends to a gateway, made by hand: signed in the Python client's dialect, or the browser's.

And its whole requests to a hub in the test's process, with what they are answered. A module that wants the fixtures
binds their names: imported under the name of an argument, they would look like mistakes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.hubs import Hub
from tests.servers import Answer

ZONE = "lab"
OTHER = "others"
PUBLIC = "open"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """With two private zones and a public one."""
    with Hub(tmp_path_factory.mktemp("gateway")) as running:
        for zone in (ZONE, OTHER, PUBLIC):
            running.make_channel(zone, public=zone == PUBLIC)
        yield running


@pytest.fixture
def writer(hub: Hub) -> CloudClient:
    return make_writer(hub)


@pytest.fixture
def data() -> bytes:
    """Bytes of a file that is nowhere yet."""
    return os.urandom(1000)


def python_text(value: object) -> str:
    """Canonical JSON of the Python clients."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def browser_text(value: object) -> str:
    """Canonical JSON of the browser's clients, for values without fractions."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class CloudClient:
    """A client key and what it signs. `send`: POSTs bytes to /api/gateway."""

    def __init__(self, seed: bytes | None = None) -> None:
        self.key = PrivateKey(seed) if seed is not None else PrivateKey.generate()

    @property
    def id(self) -> str:
        return self.key.public_hex

    def signature(self, payload: object, text: Callable[[object], str] = python_text) -> str:
        return self.key.sign(hashlib.sha1(text(payload).encode()).digest()).hex()

    def envelope(self, kind: str, *, timestamp: int | None = None, **fields: Any) -> dict[str, Any]:
        """A signed request of now."""
        now = int(time.time() * 1000) if timestamp is None else timestamp
        payload = {"type": kind, **fields, "timestamp": now}
        return {"payload": payload, "fromClientId": self.id, "signature": self.signature(payload)}

    def file(self, kind: str, data: bytes, zone: str | None = None, **fields: Any) -> dict[str, Any]:
        """A request about a file."""
        named = {} if zone is None else {"zone": zone}
        return self.envelope(kind, hashAlg="sha1", hash=hashlib.sha1(data).hexdigest(), **named, **fields)

    def link(self, zone: str = "default", label: str = "rig") -> str:
        """The path of the link that `kachery-cloud-init` prints."""
        signature = self.signature({"type": "addClient"})
        return f"/registerClient/{self.id}?signature={signature}&zone={zone}&label={quote(label)}"


def refused(answer: Answer, status: int) -> str:
    """The text of a refusal of the gateway."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    assert text.startswith("Error: ")
    return text


def make_client(hub: Hub, user: str, roles: Role = Role.NONE, zone: str = ZONE) -> CloudClient:
    """A client key of a user, who gets these roles in a zone."""
    client = CloudClient()
    hub.call(hub.node.clients.add(OPERATOR, client.id, UserName(user), "rig"))
    if roles:
        hub.call(hub.node.authorizations.grant(OPERATOR, zone, "user", user, roles))
    return client


def make_writer(hub: Hub) -> CloudClient:
    """May upload and read in the zone."""
    return make_client(hub, "writer", Role.REQUEST_FILES | Role.PROVIDE_FILES)


def ask(hub: Hub, envelope: Any) -> Answer:
    return hub.post("/api/gateway", envelope)


def ok(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    found = answer.json()
    assert isinstance(found, dict)
    return found


def announce(hub: Hub, client: CloudClient, data: bytes, zone: str | None = ZONE) -> dict[str, Any]:
    """The first request of an upload."""
    return ok(ask(hub, client.file("initiateFileUpload", data, zone, size=len(data))))


def finalization(client: CloudClient, data: bytes, key: str, zone: str | None = ZONE, **more: Any) -> dict[str, Any]:
    """The last one, to be sent."""
    return client.file("finalizeFileUpload", data, zone, **{"size": len(data), "objectKey": key, **more})


def store(hub: Hub, client: CloudClient, data: bytes, zone: str | None = ZONE) -> dict[str, Any]:
    """The three requests of an upload; what was announced."""
    announced = announce(hub, client, data, zone)
    assert announced["alreadyExists"] is False
    assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
    done = ok(ask(hub, finalization(client, data, announced["objectKey"], zone)))
    assert done == {"type": "finalizeFileUpload"}
    return announced
