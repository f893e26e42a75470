"""Every byte string that is signed here. Nothing else may be handed to a private key."""

from __future__ import annotations

import hashlib

from kachery_lab.core.canonical_json import jcs


def prehash_2021(canonical_text: str) -> bytes:
    """What is signed in the 2021 dialect: the 20 bytes of the SHA-1 of canonical JSON (spec/signing.md section 2).

    Used for node requests, band messages and subfeed messages. It names no purpose; that is fixed by the wire format.
    """
    return hashlib.sha1(canonical_text.encode("utf-8"), usedforsecurity=False).digest()


def legacy_2021(canonical_text: str) -> bytes:
    """What was signed before that dialect: the canonical JSON itself.

    Old feeds contain it; it is verified and never signed.
    """
    return canonical_text.encode("utf-8")


def checkpoint_bytes(feed_id: str, subfeed_hash: str, count: int, head: bytes) -> bytes:
    """What a feed's key signs to fix that its subfeed has `count` messages with this rolling head (32 bytes)."""
    fields = {"count": count, "feedId": feed_id, "head": head.hex(), "subfeedHash": subfeed_hash}
    return b"kachery-lab/checkpoint/1\n" + jcs(fields)


def request_bytes(
    method: str, target: str, body_sha256: str, timestamp: int, nonce: str, node_id: str, hub_id: str
) -> bytes:
    """What a node's key signs to make a request of our own API: exactly this request, to this hub, once.

    `target` is path and query as sent, `timestamp` in seconds since 1970.
    """
    fields = {
        "bodySha256": body_sha256,
        "hubId": hub_id,
        "method": method,
        "nodeId": node_id,
        "nonce": nonce,
        "target": target,
        "timestamp": timestamp,
    }
    return b"kachery-lab/request/1\n" + jcs(fields)
