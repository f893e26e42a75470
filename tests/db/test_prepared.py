"""A prepared statement does what the same statement does."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import bindparam, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import migrate
from kachery_lab.db.models import meta
from kachery_lab.db.prepared import Prepared

_INSERT = insert(meta)
PUT = Prepared(_INSERT.on_conflict_do_update(index_elements=[meta.c.key], set_={"value": _INSERT.excluded.value}))
GET = Prepared(select(meta.c.value).where(meta.c.key == bindparam("name")))


def test_writes_and_reads(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    migrate(path, backup_dir=tmp_path / "backups")
    database = Database.open(path)
    plain = select(meta.c.value).where(meta.c.key == "a")
    try:
        for value in ("one", "two'; --"):
            # In the order of the names, whatever that of the values is.
            row = {"value": value, "key": "a", "unused": "x"}
            assert database.write_sync(lambda conn, row=row: PUT(conn, row).rowcount) == 1  # type: ignore[misc]
            found = database.read_sync(lambda conn: GET(conn, {"name": "a"}).scalar_one())
            assert found == database.read_sync(lambda conn: conn.execute(plain).scalar_one()) == value
        with pytest.raises(KeyError):
            database.write_sync(lambda conn: PUT(conn, {"key": "a"}).rowcount)
    finally:
        database.close()
