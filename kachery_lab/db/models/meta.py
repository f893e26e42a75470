"""Facts about this database itself, such as the id of the volume that it indexes."""

from __future__ import annotations

from sqlalchemy import Column, Table, Text

from kachery_lab.db.models.base import metadata

meta = Table(
    "meta",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
