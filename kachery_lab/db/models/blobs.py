"""Blobs whose bytes lie in the store. The volume is the truth, this table is its index."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Table, Text

from kachery_lab.db.models.base import metadata

blobs = Table(
    "blobs",
    metadata,
    Column("sha1", Text, primary_key=True),
    Column("sha256", Text, doc="NULL: not computed yet"),
    Column("size", BigInteger, nullable=False),
    Column("stored_at", BigInteger, nullable=False),
    Column("stored_by", Text, nullable=False),
    Column("stored_from", Text, doc="address of the peer, where one was known"),
    Column("origin", Text, nullable=False, server_default="local"),
    Column("manifest_sha1", Text),
    # The fingerprint of the file when its bytes were last verified; NULL: never.
    Column("mtime_ns", BigInteger),
    Column("ctime_ns", BigInteger),
    Column("inode", BigInteger),
    Column("verified_at", BigInteger),
    sqlite_with_rowid=False,
)

blob_origins = Table(
    "blob_origins",
    metadata,
    Column("sha1", Text, primary_key=True),
    Column("origin", Text, primary_key=True, doc="`local`, or hub node id and channel; a blob without any is local"),
    Column("recorded_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
