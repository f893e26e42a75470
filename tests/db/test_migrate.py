"""New, current, older, newer, foreign and half-migrated databases."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Engine, Integer, Table, event

from kachery_lab.db import migrate as module
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import HEAD, migrate, schema_drift
from kachery_lab.db.models import metadata
from kachery_lab.errors import StartRefused

NEXT = """
from alembic import op
import sqlalchemy as sa
revision, down_revision = "next", "{head}"
def upgrade():
    op.add_column("users", sa.Column("note", sa.Text()))
    op.execute("UPDATE users SET note = name")
    with op.batch_alter_table("feeds") as batch:
        batch.alter_column("created_at", nullable=True)
def downgrade():
    op.drop_column("users", "note")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite3"


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    return tmp_path / "backups"


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of the future: one revision more."""
    scripts = tmp_path / "scripts % of tomorrow"
    shutil.copytree(module.scripts_directory(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "next.py").write_text(NEXT.format(head=HEAD))
    monkeypatch.setattr(module, "_PLACES", (scripts,))
    monkeypatch.setattr(module, "HEAD", "next")


def sql(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def schema(path: Path) -> list[tuple[object, ...]]:
    return sql(path, "SELECT type, name, sql FROM sqlite_master ORDER BY type, name")


def fill(path: Path) -> None:
    sql(path, "INSERT INTO users VALUES ('ann', 1)")
    sql(path, "INSERT INTO feeds VALUES ('f', 1, NULL)")
    sql(path, "INSERT INTO subfeeds (feed_id, subfeed_hash, num_messages, head) VALUES ('f', 'h', 0, x'00')")


def test_the_constant_is_the_head() -> None:
    assert ScriptDirectory.from_config(module.alembic_config()).get_heads() == [HEAD]


def test_models_and_migrations_agree() -> None:
    assert schema_drift() == []


def test_drift_is_found() -> None:
    extra = Table("forgotten", metadata, Column("id", Integer, primary_key=True))
    users = metadata.tables["users"]
    users.dialect_options["sqlite"]["with_rowid"] = False
    try:
        drift = schema_drift()
        assert any(line[0] == "add_table" and line[1].name == "forgotten" for line in drift)
        assert ("not in migrations", "users: table without_rowid=1 strict=0") in drift
        assert module.main(["--check"]) == 1
    finally:
        metadata.remove(extra)
        users.dialect_options["sqlite"]["with_rowid"] = True
    assert schema_drift() == []


def test_check_command(tmp_path: Path) -> None:
    command_line = [sys.executable, "-m", "kachery_lab.db.migrate", "--check"]
    checked = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_a_new_database(path: Path, backups: Path) -> None:
    assert migrate(path, backup_dir=backups) == (None, HEAD, None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {name for kind, name, _ in schema(path) if kind == "table"} == {*metadata.tables, "alembic_version"}
    assert not backups.exists()
    fill(path)
    before = path.read_bytes()
    assert migrate(path, backup_dir=backups) == (HEAD, HEAD, None)
    assert path.read_bytes() == before
    assert not backups.exists()


def test_an_empty_file_is_a_new_database(path: Path, backups: Path) -> None:
    path.touch()
    assert migrate(path, backup_dir=backups) == (None, HEAD, None)


def test_down_to_nothing_and_up_again(path: Path, backups: Path) -> None:
    migrate(path, backup_dir=backups)
    whole = schema(path)
    config = module.alembic_config()
    with module.migration_transaction(path) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert [row[1] for row in schema(path) if row[0] == "table"] == ["alembic_version"]
    assert migrate(path, backup_dir=backups) == (None, HEAD, None)
    assert schema(path) == whole


def test_a_database_of_the_first_revision(path: Path, backups: Path) -> None:
    config = module.alembic_config()
    with module.migration_transaction(path) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    fill(path)
    sql(path, "INSERT INTO tokens VALUES ('i', 'h', 'ann', 'old', 'admin', 1, NULL, NULL)")
    report = migrate(path, backup_dir=backups)
    assert report[:2] == ("0001", HEAD)
    columns = "user, label, scopes, created_at, expires_at, channels, revoked_at"
    assert sql(path, f"SELECT {columns} FROM tokens") == [("ann", "old", "admin", 1, None, None, None)]
    assert {name for kind, name, _ in schema(path) if kind == "table"} == {*metadata.tables, "alembic_version"}
    assert sql(path, "SELECT count(*) FROM channels") == [(0,)]


CHEAP = """
import sys
from pathlib import Path
from kachery_lab.db.migrate import migrate
report = migrate(Path(sys.argv[1]), backup_dir=Path(sys.argv[2]))
print(report.to_revision, {"alembic", "sqlalchemy"} & set(sys.modules))
"""


def test_a_current_database_imports_nothing(path: Path, backups: Path) -> None:
    migrate(path, backup_dir=backups)
    command_line = [sys.executable, "-c", CHEAP, str(path), str(backups)]
    assert subprocess.run(command_line, capture_output=True, text=True, check=True).stdout == f"{HEAD} set()\n"


def test_a_newer_database_is_refused(path: Path, backups: Path) -> None:
    migrate(path, backup_dir=backups)
    fill(path)
    sql(path, "UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(StartRefused, match=r"made by a newer kachery-lab.*9999") as refusal:
        migrate(path, backup_dir=backups)
    assert "upgrade the program, or restore the backup" in str(refusal.value.hint)
    assert path.read_bytes() == before
    assert not backups.exists()
    sql(path, f"UPDATE alembic_version SET version_num = '{HEAD}'")
    assert migrate(path, backup_dir=backups) == (HEAD, HEAD, None)


def test_other_files_are_refused(path: Path, backups: Path) -> None:
    sql(path, "CREATE TABLE somebody_elses (a)")
    with pytest.raises(StartRefused, match="another program"):
        migrate(path, backup_dir=backups)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StartRefused, match="not a database"):
        migrate(path, backup_dir=backups)
    assert path.read_bytes() == b"no database " * 1000


def test_an_older_database_is_backed_up_first(
    path: Path, backups: Path, next_revision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as today:
        today.setattr(module, "HEAD", HEAD)
        migrate(path, backup_dir=backups)
    fill(path)
    old = schema(path)
    report = migrate(path, backup_dir=backups)
    assert report[:2] == (HEAD, "next")
    assert report.backup is not None
    assert [report.backup] == list(backups.iterdir())
    assert report.backup.name.startswith(f"index-{HEAD}-")
    assert report.backup.stat().st_mode & 0o777 == 0o600
    assert backups.stat().st_mode & 0o777 == 0o700
    assert schema(report.backup) == old
    assert sql(report.backup, "SELECT * FROM users") == [("ann", 1)]
    assert sql(path, "SELECT * FROM users") == [("ann", 1, "ann")]
    assert len(sql(path, "SELECT * FROM subfeeds")) == 1  # batch mode replaced `feeds` and deleted nothing
    with monkeypatch.context() as today:  # the former program
        today.setattr(module, "HEAD", HEAD)
        today.setattr(module, "_PLACES", (Path(__file__).parents[2] / "migrations",))
        with pytest.raises(StartRefused, match="newer"):
            migrate(path, backup_dir=backups)
        assert migrate(report.backup, backup_dir=backups) == (HEAD, HEAD, None)


def test_no_backup_no_migration(
    path: Path, backups: Path, next_revision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as today:
        today.setattr(module, "HEAD", HEAD)
        migrate(path, backup_dir=backups)
    old = schema(path)
    backups.write_text("a file where the directory should be")
    with pytest.raises(StartRefused, match="no backup of"):
        migrate(path, backup_dir=backups)
    assert schema(path) == old
    backups.unlink()
    assert migrate(path, backup_dir=backups).to_revision == "next"


def test_two_programs_at_once(path: Path, backups: Path, next_revision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as today:
        today.setattr(module, "HEAD", HEAD)
        migrate(path, backup_dir=backups)
    program = (
        "import sys; from pathlib import Path; from kachery_lab.db import migrate as m;"
        "m._PLACES, m.HEAD = (Path(sys.argv[1]),), 'next';"
        "print(m.migrate(Path(sys.argv[2]), backup_dir=Path(sys.argv[3])).to_revision)"
    )
    command_line = [sys.executable, "-c", program, str(module.scripts_directory()), str(path), str(backups)]
    both = [subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [running.communicate()[0] for running in both] == ["next\n", "next\n"]
    assert len(list(backups.iterdir())) == 1


def test_waits_for_a_writer(path: Path, backups: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, other.execute, ("ROLLBACK",))
        timer.start()
        assert migrate(path, backup_dir=backups).to_revision == HEAD
        timer.join()


def killed_at(number: int, path: Path, backups: Path) -> bool:
    """Migrate in a process that dies before the statement with this number; whether it died."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(*_: object) -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        event.listen(Engine, "before_cursor_execute", die)
        event.listen(Engine, "commit", die)
        try:
            migrate(path, backup_dir=backups)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def kill_everywhere(path: Path, backups: Path, prepare: Path | None) -> Iterator[list[tuple[object, ...]]]:
    """The schema found after a kill before each statement of the migration in turn."""
    number = 0
    while True:
        number += 1
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        shutil.rmtree(backups, ignore_errors=True)
        if prepare is not None:
            shutil.copy(prepare, path)
        if not killed_at(number, path, backups):
            return
        yield schema(path) if path.exists() else []


@pytest.mark.slow
def test_a_new_database_killed_at_each_statement(path: Path, backups: Path) -> None:
    found = []
    for left in kill_everywhere(path, backups, None):
        found.append(left)
        assert left == []
        assert migrate(path, backup_dir=backups).to_revision == HEAD
        assert {row[1] for row in schema(path) if row[0] == "table"} >= set(metadata.tables)
    assert len(found) > len(metadata.tables)


@pytest.mark.slow
def test_an_older_database_killed_at_each_statement(
    path: Path, backups: Path, tmp_path: Path, next_revision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as today:
        today.setattr(module, "HEAD", HEAD)
        migrate(tmp_path / "old", backup_dir=backups)
    fill(tmp_path / "old")
    old = schema(tmp_path / "old")
    points = 0
    for left in kill_everywhere(path, backups, tmp_path / "old"):
        points += 1
        assert left == old
        assert sql(path, "SELECT * FROM users") == [("ann", 1)]
        assert migrate(path, backup_dir=backups).to_revision == "next"
        assert sql(path, "SELECT note FROM users") == [("ann",)]
    assert points > 8


@pytest.mark.slow
def test_killed_positive_control(path: Path, backups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the transaction a kill leaves something that is neither old nor new."""
    monkeypatch.setattr(module, "_begin_immediate", lambda _: None)
    complete = len(metadata.tables) + 1
    partial = [
        left
        for left in kill_everywhere(path, backups, None)
        if 0 < len([row for row in left if row[0] == "table"]) < complete
    ]
    assert partial


def test_a_failing_migration_changes_nothing(
    path: Path, backups: Path, next_revision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as today:
        today.setattr(module, "HEAD", HEAD)
        migrate(path, backup_dir=backups)
    sql(path, "ALTER TABLE users ADD COLUMN note TEXT")  # the revision will add it a second time
    old = schema(path)
    with pytest.raises(StartRefused, match="unchanged"):
        migrate(path, backup_dir=backups)
    assert schema(path) == old


def test_broken_references_are_refused(path: Path, backups: Path) -> None:
    migrate(path, backup_dir=backups)
    with pytest.raises(StartRefused, match="parents"), module.migration_transaction(path) as connection:
        connection.exec_driver_sql("INSERT INTO tokens VALUES ('i', 'h', 'nobody', '', '', 1, NULL, NULL, NULL)")
    assert sql(path, "SELECT * FROM tokens") == []


def test_an_incomplete_installation(path: Path, backups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLACES", (tmp_path,))
    with pytest.raises(StartRefused, match="incomplete"):
        migrate(path, backup_dir=backups)


def test_the_engine_opens_what_was_migrated(path: Path, backups: Path) -> None:
    migrate(path, backup_dir=backups)
    database = Database.open(path, read_threads=1)
    users = metadata.tables["users"]
    database.write_sync(lambda c: c.execute(sqlalchemy.insert(users), {"name": "ann", "created_at": 1}).rowcount)
    assert database.read_sync(lambda c: c.execute(sqlalchemy.select(users.c.name)).scalar()) == "ann"
    database.close()
