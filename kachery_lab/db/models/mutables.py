"""Small local values by key."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Table, Text

from kachery_lab.db.models.base import metadata

mutables = Table(
    "mutables",
    metadata,
    Column("key_sha1", Text, primary_key=True),
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
