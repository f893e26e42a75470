"""What of a subfeed belongs to which channel, and the newest checkpoint that was received for it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, Table, Text

from kachery_lab.db.models.base import metadata

feed_channels = Table(
    "feed_channels",
    metadata,
    Column("subfeed_id", Integer, ForeignKey("subfeeds.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("origin", Text, primary_key=True, doc="hub node id and channel"),
    Column("num_received", BigInteger, nullable=False, doc="so many messages came through the channel"),
    Column("num_shown", BigInteger, nullable=False, doc="so many lie in the channel's bucket; own hub only"),
    Column("shown_bytes", BigInteger, nullable=False, doc="what they count against the channel's limit"),
    Column("shown_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

subfeed_checkpoints = Table(
    "subfeed_checkpoints",
    metadata,
    Column("subfeed_id", Integer, ForeignKey("subfeeds.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("count", BigInteger, nullable=False, doc="may be more than there are messages here"),
    Column("head", LargeBinary(32), nullable=False),
    Column("signature", Text, nullable=False),
    sqlite_with_rowid=False,
)
