"""Nodes that registered with this hub."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Table, Text

from kachery_lab.db.models.base import metadata

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", Text, primary_key=True),
    Column("owner", Text, ForeignKey("users.name"), nullable=False),
    Column("label", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("approved_at", BigInteger, doc="NULL: it reported itself and waits for approval"),
    Column("reported_at", BigInteger, doc="NULL: never"),
)
