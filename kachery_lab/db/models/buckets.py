"""What lies in a channel's bucket: references to blobs by object path, never copies."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Table, Text

from kachery_lab.db.models.base import metadata

bucket_objects = Table(
    "bucket_objects",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True, doc="without the channel's name"),
    Column("sha1", Text, nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
    Column("label", Text, nullable=False),
    Column("principal", Text, nullable=False, doc="kind:name of who uploaded it"),
    Column("stored_at", BigInteger, nullable=False),
    Column("on_demand", Boolean, nullable=False, doc="made because somebody asked, not by an upload"),
    sqlite_with_rowid=False,
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("deleted_at", BigInteger, nullable=False),
    Column("deleted_by", Text, nullable=False),
    sqlite_with_rowid=False,
)
