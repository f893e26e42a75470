"""What lies in a channel's bucket: references to blobs by object path, never copies."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Table, Text

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
    Column("stored_at", BigInteger, nullable=False, index=True),
    Column("on_demand", Boolean, nullable=False, doc="made because somebody asked, not by an upload"),
    Index("ix_bucket_objects_channel", "channel", "stored_at"),
    Index("ix_bucket_objects_principal", "principal", "stored_at"),
    sqlite_with_rowid=False,
)

bucket_totals = Table(
    "bucket_totals",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("principal", Text, primary_key=True, index=True),
    Column("objects", BigInteger, nullable=False, doc="rows of bucket_objects, changed together with them"),
    Column("bytes", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("deleted_at", BigInteger, nullable=False),
    Column("deleted_by", Text, nullable=False),
    # What a restored object gets back; NULL: it cannot be restored any more.
    Column("sha1", Text, index=True),
    Column("size", BigInteger),
    Column("label", Text),
    Column("principal", Text),
    Column("stored_at", BigInteger),
    sqlite_with_rowid=False,
)
