"""Uploads that were announced and are not finished, limits of who uploads, and what was moved on each day."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Table, Text

from kachery_lab.db.models.base import metadata

pending_uploads = Table(
    "pending_uploads",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("principal", Text, primary_key=True, index=True),
    Column("size", BigInteger, nullable=False, doc="announced, then the real one"),
    Column("exact", Boolean, nullable=False, doc="whether the announced size is in bytes"),
    Column("label", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("received", Boolean, nullable=False, doc="whether the bytes are here and verified"),
    sqlite_with_rowid=False,
)

quotas = Table(
    "quotas",
    metadata,
    Column("subject", Text, primary_key=True, doc="kind:name"),
    Column("max_bytes", BigInteger, doc="NULL: no limit"),
    Column("max_objects", BigInteger, doc="NULL: no limit"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("day", Text, primary_key=True, doc="yyyy-mm-dd in UTC"),
    Column("channel", Text, primary_key=True, doc="also of channels that are gone"),
    Column("principal", Text, primary_key=True, doc="empty: anybody"),
    Column("uploads", BigInteger, nullable=False),
    Column("bytes_uploaded", BigInteger, nullable=False),
    Column("downloads", BigInteger, nullable=False),
    Column("bytes_downloaded", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
