"""Tasks of this hub's channels, who may run what there, and reports that wait for another hub."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, Table, Text

from kachery_lab.db.models.base import metadata

tasks = Table(
    "tasks",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column("task_hash", Text, nullable=False),
    Column("function_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("backend_id", Text, doc="NULL: a value of its own, which most backends have"),
    Column("requester", Text, nullable=False, doc="kind:name of who asked last"),
    Column("state", Text, nullable=False, doc="open, leased, finished or error"),
    Column("error_message", Text),
    Column("lease_id", Text, unique=True, doc="of the present or the last lease; NULL: nobody took it"),
    Column("holder", Text, doc="node id of that lease"),
    Column("delivered", Boolean, nullable=False, doc="whether the holder says that it gave the task to a backend"),
    Column("leases", Integer, nullable=False, doc="how many there were"),
    Column("leased_at", BigInteger),
    Column("changed_at", BigInteger, nullable=False),
    Index("ix_tasks_channel_task_hash", "channel", "task_hash"),
    Index("ix_tasks_state_changed_at", "state", "changed_at"),
)

task_functions = Table(
    "task_functions",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("function_id", Text, primary_key=True, doc="`*`: all functions without an entry of their own"),
    Column("max_run_seconds", Integer, nullable=False),
)

task_grants = Table(
    "task_grants",
    metadata,
    Column("channel", Text, ForeignKey("channels.name", ondelete="CASCADE"), primary_key=True),
    Column("function_id", Text, primary_key=True),
    Column("subject_kind", Text, primary_key=True, doc="node, user or client"),
    Column("subject", Text, primary_key=True),
    Column("granted", Integer, nullable=False, doc="requestTasks, provideTasks or both"),
    Column("created_at", BigInteger, nullable=False),
)

task_reports = Table(
    "task_reports",
    metadata,
    Column("lease_id", Text, primary_key=True),
    Column("channel", Text, nullable=False, doc="of the joined hub"),
    Column("task_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("error_message", Text),
    Column("created_at", BigInteger, nullable=False),
)
