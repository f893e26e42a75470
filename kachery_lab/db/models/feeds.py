"""Feeds, their local names, and their subfeeds."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, Table, Text, UniqueConstraint

from kachery_lab.db.models.base import metadata

feeds = Table(
    "feeds",
    metadata,
    Column("feed_id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("sealed_key", LargeBinary, doc="NULL: not writeable here"),
)

feed_names = Table(
    "feed_names",
    metadata,
    Column("name", Text, primary_key=True),
    Column("feed_id", Text, nullable=False),
)

subfeeds = Table(
    "subfeeds",
    metadata,
    # Integer, not BigInteger: only then is it SQLite's own row number.
    Column("id", Integer, primary_key=True),
    Column("feed_id", Text, ForeignKey("feeds.feed_id", ondelete="CASCADE"), nullable=False),
    Column("subfeed_hash", Text, nullable=False),
    Column("num_messages", BigInteger, nullable=False),
    Column("signature", Text),
    Column("head", LargeBinary(32), nullable=False),
    Column("checkpoint_signature", Text),
    UniqueConstraint("feed_id", "subfeed_hash"),
)
