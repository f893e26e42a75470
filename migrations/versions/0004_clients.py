"""The newer clients: client keys, enrolment codes, answers to signed requests; uploads announced, quotas, usage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "clients",
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=True),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("approved_at", sa.BigInteger(), nullable=True),
        sa.Column("asked_as", sa.Text(), nullable=False),
        sa.Column("asked_from", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_clients_user_users")),
        sa.PrimaryKeyConstraint("client_id", name=op.f("pk_clients")),
    )
    op.create_table(
        "enrolment_codes",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_enrolment_codes_user_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_enrolment_codes")),
        sa.UniqueConstraint("digest", name=op.f("uq_enrolment_codes_digest")),
    )
    op.create_table(
        "client_answers",
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("signature", name=op.f("pk_client_answers")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("client_answers", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_client_answers_expires_at"), ["expires_at"], unique=False)
    op.create_table(
        "resource_files",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha1", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("ctime_ns", sa.BigInteger(), nullable=False),
        sa.Column("inode", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.BigInteger(), nullable=False),
        sa.Column("hashed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("channel", "path", name=op.f("pk_resource_files")),
    )
    with op.batch_alter_table("resource_files", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_resource_files_sha1"), ["sha1"], unique=False)
    _add_uploads()


def downgrade() -> None:
    _drop_uploads()
    with op.batch_alter_table("resource_files", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_resource_files_sha1"))

    op.drop_table("resource_files")
    with op.batch_alter_table("client_answers", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_client_answers_expires_at"))

    op.drop_table("client_answers")
    op.drop_table("enrolment_codes")
    op.drop_table("clients")


def _add_uploads() -> None:
    op.create_table(
        "bucket_totals",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("objects", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["channel"], ["channels.name"], name=op.f("fk_bucket_totals_channel_channels"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("channel", "principal", name=op.f("pk_bucket_totals")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("bucket_totals", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_bucket_totals_principal"), ["principal"], unique=False)
    op.execute(
        "INSERT INTO bucket_totals (channel, principal, objects, bytes) "
        "SELECT channel, principal, count(*), sum(size) FROM bucket_objects GROUP BY channel, principal"
    )

    op.create_table(
        "pending_uploads",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("exact", sa.Boolean(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("received", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["channel"], ["channels.name"], name=op.f("fk_pending_uploads_channel_channels"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("channel", "path", "principal", name=op.f("pk_pending_uploads")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("pending_uploads", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_pending_uploads_principal"), ["principal"], unique=False)
        batch_op.create_index(batch_op.f("ix_pending_uploads_expires_at"), ["expires_at"], unique=False)

    op.create_table(
        "quotas",
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_objects", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_quotas")),
    )
    op.create_table(
        "usage_days",
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("uploads", sa.BigInteger(), nullable=False),
        sa.Column("bytes_uploaded", sa.BigInteger(), nullable=False),
        sa.Column("downloads", sa.BigInteger(), nullable=False),
        sa.Column("bytes_downloaded", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "channel", "principal", name=op.f("pk_usage_days")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "user_profiles",
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("research_description", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_user_profiles_user_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user", name=op.f("pk_user_profiles")),
    )
    with op.batch_alter_table("bucket_objects", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_bucket_objects_stored_at"), ["stored_at"], unique=False)
        batch_op.create_index("ix_bucket_objects_principal", ["principal", "stored_at"], unique=False)
        batch_op.create_index("ix_bucket_objects_channel", ["channel", "stored_at"], unique=False)
    with op.batch_alter_table("channels", schema=None) as batch_op:
        batch_op.add_column(sa.Column("max_objects", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("tombstones", schema=None) as batch_op:
        batch_op.add_column(sa.Column("sha1", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("size", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("label", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("principal", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("stored_at", sa.BigInteger(), nullable=True))
        batch_op.create_index(batch_op.f("ix_tombstones_sha1"), ["sha1"], unique=False)


def _drop_uploads() -> None:
    with op.batch_alter_table("tombstones", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tombstones_sha1"))
        for column in ("stored_at", "principal", "label", "size", "sha1"):
            batch_op.drop_column(column)
    with op.batch_alter_table("channels", schema=None) as batch_op:
        batch_op.drop_column("max_objects")
    with op.batch_alter_table("bucket_objects", schema=None) as batch_op:
        batch_op.drop_index("ix_bucket_objects_channel")
        batch_op.drop_index("ix_bucket_objects_principal")
        batch_op.drop_index(batch_op.f("ix_bucket_objects_stored_at"))
    for table in ("user_profiles", "usage_days", "quotas", "pending_uploads", "bucket_totals"):
        op.drop_table(table)
