"""Client keys of kachery-cloud, codes that register one, and answers to requests that one of them signed."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, Table, Text

from kachery_lab.db.models.base import metadata

clients = Table(
    "clients",
    metadata,
    Column("client_id", Text, primary_key=True, doc="Ed25519 public key"),
    Column("user", Text, ForeignKey("users.name"), doc="NULL: it waits for approval"),
    Column("label", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("approved_at", BigInteger, doc="NULL: it waits for approval"),
    Column("asked_as", Text, nullable=False, doc="who the person at the registration page said to be; may be empty"),
    Column("asked_from", Text, doc="address from which it was asked"),
)

enrolment_codes = Table(
    "enrolment_codes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    Column("user", Text, ForeignKey("users.name"), nullable=False),
    Column("label", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("uses_left", Integer, nullable=False),
)

client_answers = Table(
    "client_answers",
    metadata,
    Column("signature", Text, primary_key=True),
    Column("answer", Text, nullable=False, doc="JSON"),
    Column("expires_at", BigInteger, nullable=False, index=True),
    sqlite_with_rowid=False,
)
