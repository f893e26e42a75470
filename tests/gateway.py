"""What kachery-cloud sends to a gateway, made by hand: signed in the Python client's dialect, or the browser's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from kachery_lab.core.keys import PrivateKey
from tests.servers import Answer


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
