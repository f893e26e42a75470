"""Blobs whose bytes stay in a file outside the store: linked ones, and those of resource directories."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Table, Text

from kachery_lab.db.models.base import metadata

links = Table(
    "links",
    metadata,
    Column("sha1", Text, primary_key=True),
    Column("path", Text, nullable=False, doc="as the client sent it"),
    Column("size", BigInteger, nullable=False),
    Column("mtime", Float, nullable=False, doc="seconds, as the client sent it"),
    Column("manifest_sha1", Text),
    Column("sha256", Text),
    Column("linked_at", BigInteger, nullable=False),
    Column("linked_by", Text, nullable=False),
    Column("linked_from", Text),
    # The fingerprint of the file when its bytes were last verified; NULL: never.
    Column("mtime_ns", BigInteger),
    Column("ctime_ns", BigInteger),
    Column("inode", BigInteger),
    Column("device", BigInteger),
    sqlite_with_rowid=False,
)

resource_files = Table(
    "resource_files",
    metadata,
    Column("channel", Text, primary_key=True),
    Column("path", Text, primary_key=True, doc="as the server opens it"),
    Column("sha1", Text, nullable=False, index=True, doc="of the content, whatever name it was found under"),
    Column("sha256", Text, nullable=False),
    # The file's fingerprint when it was hashed.
    Column("size", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    Column("ctime_ns", BigInteger, nullable=False),
    Column("inode", BigInteger, nullable=False),
    Column("device", BigInteger, nullable=False),
    Column("hashed_at", BigInteger, nullable=False),
)
