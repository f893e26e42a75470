"""People, by the name that they have in this server."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Table, Text

from kachery_lab.db.models.base import metadata

users = Table(
    "users",
    metadata,
    Column("name", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
)
