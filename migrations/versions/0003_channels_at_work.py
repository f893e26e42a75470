"""Feeds and tasks between nodes: what of a subfeed belongs to which channel; tasks, their leases and rights."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "feed_channels",
        sa.Column("subfeed_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("num_received", sa.BigInteger(), nullable=False),
        sa.Column("num_shown", sa.BigInteger(), nullable=False),
        sa.Column("shown_bytes", sa.BigInteger(), nullable=False),
        sa.Column("shown_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["subfeed_id"], ["subfeeds.id"], name=op.f("fk_feed_channels_subfeed_id_subfeeds"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("subfeed_id", "origin", name=op.f("pk_feed_channels")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "subfeed_checkpoints",
        sa.Column("subfeed_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("head", sa.LargeBinary(length=32), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["subfeed_id"], ["subfeeds.id"], name=op.f("fk_subfeed_checkpoints_subfeed_id_subfeeds"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("subfeed_id", name=op.f("pk_subfeed_checkpoints")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "task_functions",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("function_id", sa.Text(), nullable=False),
        sa.Column("max_run_seconds", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["channel"], ["channels.name"], name=op.f("fk_task_functions_channel_channels"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("channel", "function_id", name=op.f("pk_task_functions")),
    )
    op.create_table(
        "task_grants",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("function_id", sa.Text(), nullable=False),
        sa.Column("subject_kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("granted", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["channel"], ["channels.name"], name=op.f("fk_task_grants_channel_channels"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("channel", "function_id", "subject_kind", "subject", name=op.f("pk_task_grants")),
    )
    op.create_table(
        "task_reports",
        sa.Column("lease_id", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("pk_task_reports")),
    )
    op.create_table(
        "tasks",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("task_hash", sa.Text(), nullable=False),
        sa.Column("function_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("backend_id", sa.Text(), nullable=True),
        sa.Column("requester", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("lease_id", sa.Text(), nullable=True),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.Column("delivered", sa.Boolean(), nullable=False),
        sa.Column("leases", sa.Integer(), nullable=False),
        sa.Column("leased_at", sa.BigInteger(), nullable=True),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["channel"], ["channels.name"], name=op.f("fk_tasks_channel_channels"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("channel", "task_id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("lease_id", name=op.f("uq_tasks_lease_id")),
    )
    with op.batch_alter_table("tasks", schema=None) as batch_op:
        batch_op.create_index("ix_tasks_channel_task_hash", ["channel", "task_hash"], unique=False)
        batch_op.create_index("ix_tasks_state_changed_at", ["state", "changed_at"], unique=False)


def downgrade() -> None:
    op.drop_table("tasks")
    op.drop_table("task_reports")
    op.drop_table("task_grants")
    op.drop_table("task_functions")
    op.drop_table("subfeed_checkpoints")
    op.drop_table("feed_channels")
