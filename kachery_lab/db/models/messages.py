"""Messages of subfeeds, and the append requests that may be repeated."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, Table, Text

from kachery_lab.db.models.base import metadata

messages = Table(
    "messages",
    metadata,
    Column("subfeed_id", Integer, ForeignKey("subfeeds.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("message", Text, nullable=False, doc="canonical JSON"),
    Column("timestamp", BigInteger, nullable=False),
    Column("signature", LargeBinary(64), nullable=False),
    Column("body_sha256", LargeBinary(32), nullable=False),
    Column("meta_data", Text),
    sqlite_with_rowid=False,
)

append_requests = Table(
    "append_requests",
    metadata,
    Column("subfeed_id", Integer, ForeignKey("subfeeds.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("request_id", Text, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False, index=True),
)
