"""The tables hold what they promise: keys, cascades, and the shape that the design names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from kachery_lab.db import models
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import migrate

FEED, SUBFEED = "f" * 64, "a" * 40


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    migrate(tmp_path / "db", backup_dir=tmp_path)
    opened = Database.open(tmp_path / "db", read_threads=1)
    yield opened
    opened.close()


def test_the_tables() -> None:
    assert set(models.metadata.tables) == {
        *("meta", "users", "tokens", "blobs", "links", "feeds", "feed_names", "subfeeds", "messages"),
        *("append_requests", "mutables", "nodes", "channels", "memberships", "authorizations", "passcodes"),
        *("membership_passcodes", "bucket_objects", "tombstones", "blob_origins", "audit"),
        *("bucket_totals", "pending_uploads", "quotas", "usage_days", "user_profiles"),
        *("clients", "client_answers", "enrolment_codes", "resource_files"),
        *("feed_channels", "subfeed_checkpoints", "tasks", "task_functions", "task_grants", "task_reports"),
    }


def test_without_rowid(database: Database) -> None:
    def without_rowid(connection: Connection) -> set[str]:
        rows = connection.exec_driver_sql("SELECT name FROM pragma_table_list WHERE schema = 'main' AND wr = 1")
        return set(rows.scalars())

    assert database.read_sync(without_rowid) == {
        *("blobs", "links", "messages", "mutables", "bucket_objects", "tombstones", "blob_origins"),
        *("bucket_totals", "pending_uploads", "usage_days", "client_answers"),
        *("feed_channels", "subfeed_checkpoints"),
    }


def test_every_constraint_has_a_name() -> None:
    for table in models.metadata.tables.values():
        for constraint in table.constraints:
            assert constraint.name, f"{table.name}: {constraint}"


def make_feed(connection: Connection) -> int:
    connection.execute(insert(models.feeds), {"feed_id": FEED, "created_at": 1, "sealed_key": None})
    subfeed = {"feed_id": FEED, "subfeed_hash": SUBFEED, "num_messages": 1, "head": bytes(32)}
    number = connection.execute(insert(models.subfeeds), subfeed).inserted_primary_key
    assert number is not None
    message = {"subfeed_id": number[0], "position": 0, "message": "{}", "timestamp": 2**53, "signature": bytes(64)}
    connection.execute(insert(models.messages), message | {"body_sha256": bytes(32)})
    request = {"subfeed_id": number[0], "request_id": "r", "digest": "d", "position": 0, "count": 1, "created_at": 1}
    connection.execute(insert(models.append_requests), request)
    return int(number[0])


def test_deleting_a_feed_deletes_what_is_in_it(database: Database) -> None:
    database.write_sync(make_feed)
    database.write_sync(lambda c: c.execute(delete(models.feeds)).rowcount)
    for table in (models.subfeeds, models.messages, models.append_requests):
        assert database.read_sync(lambda c, t=table: c.execute(select(func.count()).select_from(t)).scalar()) == 0


def test_one_message_per_position(database: Database) -> None:
    number = database.write_sync(make_feed)
    again = {"subfeed_id": number, "position": 0, "message": "[]", "timestamp": 0, "signature": bytes(64)}
    with pytest.raises(IntegrityError):
        database.write_sync(lambda c: c.execute(insert(models.messages), again | {"body_sha256": bytes(32)}).rowcount)
    assert database.read_sync(lambda c: c.execute(select(models.messages.c.message)).scalars().all()) == ["{}"]


def test_one_subfeed_per_hash(database: Database) -> None:
    database.write_sync(make_feed)
    again = {"feed_id": FEED, "subfeed_hash": SUBFEED, "num_messages": 0, "head": bytes(32)}
    with pytest.raises(IntegrityError):
        database.write_sync(lambda c: c.execute(insert(models.subfeeds), again).rowcount)


def test_a_token_needs_its_user(database: Database) -> None:
    token = {"id": "t", "token_hash": "h", "user": "ann", "label": "", "scopes": "read write", "created_at": 1}
    with pytest.raises(IntegrityError):
        database.write_sync(lambda c: c.execute(insert(models.tokens), token).rowcount)
    database.write_sync(lambda c: c.execute(insert(models.users), {"name": "ann", "created_at": 1}).rowcount)
    database.write_sync(lambda c: c.execute(insert(models.tokens), token).rowcount)
    with pytest.raises(IntegrityError):
        database.write_sync(lambda c: c.execute(insert(models.tokens), token | {"id": "t2"}).rowcount)
    with pytest.raises(IntegrityError):
        database.write_sync(lambda c: c.execute(delete(models.users)).rowcount)


def test_origin_is_local_unless_said(database: Database) -> None:
    blob = {"sha1": SUBFEED, "size": 2**40, "stored_at": 1, "stored_by": "local"}
    database.write_sync(lambda c: c.execute(insert(models.blobs), blob).rowcount)
    row = database.read_sync(lambda c: c.execute(select(models.blobs)).mappings().one())
    assert row["origin"] == "local"
    assert row["size"] == 2**40
    assert [name for name, value in row.items() if value is None] == [
        *("sha256", "stored_from", "manifest_sha1", "mtime_ns", "ctime_ns", "inode", "verified_at")
    ]
