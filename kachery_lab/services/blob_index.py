"""The index of blobs in the database: what a row says, and how it is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select
from sqlalchemy.dialects.sqlite import Insert, insert

from kachery_lab.blobs.files import Fingerprint
from kachery_lab.blobs.receive import Received
from kachery_lab.core.ids import Sha1
from kachery_lab.db.models import blobs
from kachery_lab.db.prepared import Prepared
from kachery_lab.services.principals import Principal


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """An index row, as listings show it."""

    sha1: str
    size: int
    sha256: str | None
    manifest_sha1: str | None
    stored_at: int
    stored_by: str
    origin: str


def one(sha1: str) -> Select[Any]:
    """The row of a blob."""
    return select(blobs).where(blobs.c.sha1 == sha1)


def fingerprint(row: Row[Any]) -> Fingerprint:
    """What was last verified; only for rows that have it (`inode`)."""
    return Fingerprint(row.size, row.mtime_ns, row.ctime_ns, row.inode)


def info_of(row: Row[Any]) -> BlobInfo:
    """A row as listings show it."""
    return BlobInfo(row.sha1, row.size, row.sha256, row.manifest_sha1, row.stored_at, row.stored_by, row.origin)


def row_of(received: Received, manifest: Sha1 | None, principal: Principal) -> dict[str, Any]:
    """The row of a blob that was just stored or verified."""
    now = int(time.time() * 1000)
    return {
        "sha1": received.sha1,
        "sha256": received.sha256,
        "size": received.size,
        "stored_at": now,
        "stored_by": principal.name,
        "stored_from": principal.peer,
        "origin": "local",
        "manifest_sha1": manifest,
        "mtime_ns": received.fingerprint.mtime_ns,
        "ctime_ns": received.fingerprint.ctime_ns,
        "inode": received.fingerprint.inode,
        "verified_at": now,
    }


def _make_upsert() -> Insert:
    statement = insert(blobs)
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=[blobs.c.sha1],
        set_={
            "sha256": func.coalesce(new.sha256, blobs.c.sha256),
            "manifest_sha1": func.coalesce(new.manifest_sha1, blobs.c.manifest_sha1),
            "size": new.size,
            "mtime_ns": new.mtime_ns,
            "ctime_ns": new.ctime_ns,
            "inode": new.inode,
            "verified_at": new.verified_at,
        },
    )


_UPSERT = Prepared(_make_upsert())
"""Made once: making it takes longer than running it."""


def upsert(conn: Connection, row: dict[str, Any]) -> None:
    """Insert a row, or renew what verification found in the one that is there. Who stored it first stays."""
    _UPSERT(conn, row)
