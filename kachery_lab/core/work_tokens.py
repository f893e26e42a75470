"""The puzzle that kachery 2 clients solve before they announce an upload (spec/gateway-and-v2.md section 4)."""

from __future__ import annotations

import hashlib

from kachery_lab.core.ids import Sha1

ZERO_BITS = 13


def is_work_token(sha1: Sha1, token: str) -> bool:
    """Whether the SHA-1 of the hash's text followed by the token begins with 13 zero bits."""
    data = f"{sha1}{token}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha1(data, usedforsecurity=False).digest()
    return int.from_bytes(digest[:2], "big") >> (16 - ZERO_BITS) == 0
