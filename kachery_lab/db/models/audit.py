"""Who changed or was refused what."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, Table, Text

from kachery_lab.db.models.base import metadata

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("principal", Text, nullable=False),
    Column("peer", Text),
    Column("action", Text, nullable=False),
    Column("object", Text, nullable=False),
    Column("outcome", Text, nullable=False, doc="done, or the code of the refusal"),
    Column("detail", Text, nullable=False),
)
