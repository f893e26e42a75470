"""Access tokens of users. Only their hashes are kept."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Table, Text

from kachery_lab.db.models.base import metadata

tokens = Table(
    "tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("token_hash", Text, nullable=False, unique=True),
    Column("user", Text, ForeignKey("users.name"), nullable=False),
    Column("label", Text, nullable=False),
    Column("scopes", Text, nullable=False, doc="separated by spaces"),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, doc="NULL: never"),
    Column("channels", Text, doc="NULL: all; else names separated by spaces"),
    Column("revoked_at", BigInteger, doc="NULL: in force"),
)
