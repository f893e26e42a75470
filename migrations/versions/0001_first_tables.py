"""First tables: users and tokens, blobs and links, feeds and messages, mutables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("sha1", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("stored_at", sa.BigInteger(), nullable=False),
        sa.Column("stored_by", sa.Text(), nullable=False),
        sa.Column("stored_from", sa.Text(), nullable=True),
        sa.Column("origin", sa.Text(), server_default="local", nullable=False),
        sa.Column("manifest_sha1", sa.Text(), nullable=True),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=True),
        sa.Column("ctime_ns", sa.BigInteger(), nullable=True),
        sa.Column("inode", sa.BigInteger(), nullable=True),
        sa.Column("verified_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("sha1", name=op.f("pk_blobs")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "feed_names",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("feed_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_feed_names")),
    )
    op.create_table(
        "feeds",
        sa.Column("feed_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("feed_id", name=op.f("pk_feeds")),
    )
    op.create_table(
        "links",
        sa.Column("sha1", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime", sa.Float(), nullable=False),
        sa.Column("manifest_sha1", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("linked_at", sa.BigInteger(), nullable=False),
        sa.Column("linked_by", sa.Text(), nullable=False),
        sa.Column("linked_from", sa.Text(), nullable=True),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=True),
        sa.Column("ctime_ns", sa.BigInteger(), nullable=True),
        sa.Column("inode", sa.BigInteger(), nullable=True),
        sa.Column("device", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("sha1", name=op.f("pk_links")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_meta")),
    )
    op.create_table(
        "mutables",
        sa.Column("key_sha1", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_sha1", name=op.f("pk_mutables")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "users",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_users")),
    )
    op.create_table(
        "subfeeds",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("feed_id", sa.Text(), nullable=False),
        sa.Column("subfeed_hash", sa.Text(), nullable=False),
        sa.Column("num_messages", sa.BigInteger(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=True),
        sa.Column("head", sa.LargeBinary(length=32), nullable=False),
        sa.Column("checkpoint_signature", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["feed_id"], ["feeds.feed_id"], name=op.f("fk_subfeeds_feed_id_feeds"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subfeeds")),
        sa.UniqueConstraint("feed_id", "subfeed_hash", name=op.f("uq_subfeeds_feed_id_subfeed_hash")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("token_hash", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_tokens_user_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_tokens_token_hash")),
    )
    op.create_table(
        "append_requests",
        sa.Column("subfeed_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["subfeed_id"], ["subfeeds.id"], name=op.f("fk_append_requests_subfeed_id_subfeeds"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("subfeed_id", "request_id", name=op.f("pk_append_requests")),
    )
    op.create_index(op.f("ix_append_requests_created_at"), "append_requests", ["created_at"], unique=False)
    op.create_table(
        "messages",
        sa.Column("subfeed_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("timestamp", sa.BigInteger(), nullable=False),
        sa.Column("signature", sa.LargeBinary(length=64), nullable=False),
        sa.Column("body_sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("meta_data", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["subfeed_id"], ["subfeeds.id"], name=op.f("fk_messages_subfeed_id_subfeeds"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("subfeed_id", "position", name=op.f("pk_messages")),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("messages")
    op.drop_index(op.f("ix_append_requests_created_at"), table_name="append_requests")
    op.drop_table("append_requests")
    op.drop_table("tokens")
    op.drop_table("subfeeds")
    op.drop_table("users")
    op.drop_table("mutables")
    op.drop_table("meta")
    op.drop_table("links")
    op.drop_table("feeds")
    op.drop_table("feed_names")
    op.drop_table("blobs")
