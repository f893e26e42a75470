"""Channels, who asked to take part in them, and who may. Roles are bits of `core.roles.Role`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Integer, LargeBinary, Table, Text

from kachery_lab.db.models.base import metadata

channels = Table(
    "channels",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, ForeignKey("users.name"), nullable=False),
    Column("public", Boolean, nullable=False),
    Column("public_local", Boolean, nullable=False, doc="whether members may offer their local files when public"),
    Column("created_at", BigInteger, nullable=False),
    Column("max_bytes", BigInteger, doc="NULL: no limit"),
    Column("max_object_bytes", BigInteger, doc="NULL: no limit"),
    Column("retention_days", Integer, doc="NULL: objects stay"),
    Column("resource_id", Text, nullable=False, doc="public key that signs certificates of this channel"),
    Column("sealed_resource_key", LargeBinary, nullable=False),
    Column("epoch", Integer, nullable=False, doc="raising it ends every capability of the channel"),
    Column("max_objects", BigInteger, doc="NULL: no limit"),
)

memberships = Table(
    "memberships",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("node_id", Text, ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("asked", Integer, nullable=False),
    Column("offer", Text, nullable=False, doc="local or uploaded"),
    Column("created_at", BigInteger, nullable=False),
)

authorizations = Table(
    "authorizations",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("subject_kind", Text, primary_key=True, doc="node, user or client"),
    Column("subject", Text, primary_key=True),
    Column("granted", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

passcodes = Table(
    "passcodes",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True, doc="keyed hash: passcodes are too short for a plain one"),
    Column("id", Text, nullable=False, unique=True),
    Column("label", Text, nullable=False),
    Column("granted", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

membership_passcodes = Table(
    "membership_passcodes",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("node_id", Text, ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True),
)
