"""Bring the schema up to date, or refuse a database of a newer program.

Alembic and SQLAlchemy are imported only when there is something to do: at most starts the revision is already `HEAD`,
and importing them would take longer than all the rest of the check.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kachery_lab.db.connections import create_private, sync_directory
from kachery_lab.errors import StartRefused

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

HEAD = "0004"
"""The newest revision in migrations/versions; a test holds the two together."""

LOCK_TIMEOUT = 30.0

# Shipped in the wheel, or beside the package in a checkout.
_PLACES = (Path(__file__).parents[1] / "_migrations", Path(__file__).parents[2] / "migrations")


class MigrationReport(NamedTuple):
    """What `migrate` did. `from_revision` is None for a new database; `backup` when there was nothing to back up."""

    from_revision: str | None
    to_revision: str
    backup: Path | None


def migrate(path: Path, *, backup_dir: Path) -> MigrationReport:
    """Make the database at `path` one of revision `HEAD`; an absent or empty file becomes a new one.

    An older database is first copied into `backup_dir`. All revisions are applied in one transaction: a kill leaves
    the old schema or the new one. Two programs that migrate at once do it once. Raises `StartRefused` for a newer
    database, one of another program, a file that is no database, and when the copy or the change fails; then nothing
    has changed.
    """
    try:
        revision = current_revision(path)
        if revision == HEAD:
            return MigrationReport(revision, HEAD, None)
        return _upgrade(path, backup_dir)
    except (sqlite3.Error, OSError) as error:
        raise StartRefused(
            f"the database {path} cannot be read or brought up to date: {error}",
            hint="restore a backup, or move the file away and run `kachery-lab reindex`",
        ) from error


def current_revision(path: Path) -> str | None:
    """The revision of the database at `path`; None when there is no file or nothing in it.

    Raises `StartRefused` when tables of another program are in it, `sqlite3.Error` when it cannot be read. Changes
    nothing, except that it undoes what a killed process left half done.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        return _revision(path, "ro")
    except sqlite3.OperationalError as error:
        # A process that was killed left a change half made: only a connection that may write can undo it.
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:
            raise
        return _revision(path, "rw")


def _revision(path: Path, mode: str) -> str | None:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" in names:
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            if rows:
                return str(rows[0][0])
    if names - {"alembic_version", "sqlite_sequence", "sqlite_stat1"}:
        raise StartRefused(
            f"{path} is a database of another program: it has tables but no kachery-lab revision",
            hint="set KACHERY_LAB_METADATA_DIR to a directory of its own",
        )
    return None


def scripts_directory() -> Path:
    """Where the revisions lie. Raises `StartRefused` when the installation lacks them."""
    for place in _PLACES:
        if (place / "env.py").is_file():
            return place
    raise StartRefused("the installation is incomplete: it has no migrations", hint="install kachery-lab again")


def alembic_config() -> Config:
    """Alembic's configuration for use inside the program; the command line reads pyproject.toml."""
    from alembic.config import Config

    config = Config()
    # A percent sign in the path would be read as the start of a reference to another setting.
    config.set_main_option("script_location", str(scripts_directory()).replace("%", "%%"))
    return config


@contextmanager
def migration_transaction(path: Path) -> Iterator[Connection]:
    """One immediate transaction on the database for changing its schema; committed at the end, undone by an exception.

    Raises what SQLAlchemy raises.
    """
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    create_private(path)
    engine = create_engine("sqlite+pysqlite://", creator=lambda: _open(path), poolclass=NullPool)
    event.listen(engine, "begin", _begin_immediate)
    try:
        with engine.begin() as connection:
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise StartRefused(f"bringing {path} up to date would leave rows without their parents: {broken}")
    finally:
        engine.dispose()


def schema_drift() -> list[Any]:
    """What the revisions, applied to an empty database, lack or have beyond the tables in `models`; empty: nothing."""
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from kachery_lab.db.models import metadata

    config = alembic_config()
    options = {"compare_type": True, "compare_server_default": True}
    with tempfile.TemporaryDirectory() as directory:
        with migration_transaction(Path(directory) / "migrated") as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            drift = list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))
            migrated = _shape(connection)
        with migration_transaction(Path(directory) / "declared") as connection:
            metadata.create_all(connection)
            declared = _shape(connection)
    # Autogenerate does not look at primary keys, nor at WITHOUT ROWID.
    drift += [("not in models", line) for line in sorted(migrated - declared)]
    drift += [("not in migrations", line) for line in sorted(declared - migrated)]
    return drift


def _upgrade(path: Path, backup_dir: Path) -> MigrationReport:
    from alembic import command
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    config = alembic_config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    _refuse_unknown(path, current_revision(path), known)
    backup = None
    try:
        with migration_transaction(path) as connection:
            # Asked again, now that nobody else can write: another program may just have migrated.
            revision = current_revision(path)
            _refuse_unknown(path, revision, known)
            if revision is not None and revision != HEAD:
                backup = _back_up(path, revision, backup_dir)
            config.attributes["connection"] = connection
            command.upgrade(config, HEAD)
    except (SQLAlchemyError, CommandError) as error:
        raise StartRefused(
            f"the database {path} could not be brought up to date and is unchanged: {error}",
            hint="free space, or install the former version of kachery-lab again",
        ) from error
    return MigrationReport(revision, HEAD, backup)


def _refuse_unknown(path: Path, revision: str | None, known: set[str]) -> None:
    if revision is not None and revision not in known:
        raise StartRefused(
            f"the database {path} was made by a newer kachery-lab (revision {revision}, this program knows {HEAD})",
            hint="upgrade the program, or restore the backup that the newer one made before it changed the database",
        )


def _back_up(path: Path, revision: str, backup_dir: Path) -> Path:
    """A complete copy that survives a power cut, under a name that a half-written one never has."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    final = backup_dir / f"{path.stem}-{revision}-{stamp}-{os.urandom(3).hex()}.sqlite3"
    partial = final.with_name(f"{final.name}.tmp")
    try:
        backup_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(partial)
        with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT)) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)
            # One file: the copy must not need a log beside it.
            copy.execute("PRAGMA journal_mode=DELETE").close()
        if current_revision(partial) != revision:
            raise StartRefused("the copy has another revision")
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.rename(final)
        sync_directory(backup_dir)
    except (OSError, sqlite3.Error, StartRefused) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StartRefused(
            f"no backup of {path} could be made in {backup_dir}, so it was left as it is: {error}",
            hint="free space or mend the directory, then start again",
        ) from error
    return final


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=0
    )
    # Foreign keys off: batch mode drops the old table, which would delete the rows that refer to it. They are checked
    # before the commit.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=OFF", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _shape(connection: Connection) -> set[str]:
    """Everything that SQLite knows about the tables, one line each, whatever the order of their columns."""
    lines = set()
    for _, table, kind, _, without_rowid, strict in connection.exec_driver_sql("PRAGMA main.table_list").all():
        if table.startswith("sqlite_") or table == "alembic_version":
            continue
        lines.add(f"{table}: {kind} without_rowid={without_rowid} strict={strict}")
        for row in connection.exec_driver_sql(f'PRAGMA table_xinfo("{table}")'):
            lines.add(f"{table}: column {tuple(row)[1:]}")
        for row in connection.exec_driver_sql(f'PRAGMA foreign_key_list("{table}")'):
            lines.add(f"{table}: foreign key {tuple(row)[2:]}")
        for _, index, *rest in connection.exec_driver_sql(f'PRAGMA index_list("{table}")').all():
            columns = [row[2] for row in connection.exec_driver_sql(f'PRAGMA index_info("{index}")')]
            lines.add(f"{table}: index {columns} {rest}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """`--check`: print where models and migrations differ; 1 when they do."""
    parser = argparse.ArgumentParser(prog="python -m kachery_lab.db.migrate")
    parser.add_argument("--check", action="store_true", required=True, help="compare the models with the migrations")
    parser.parse_args(arguments)
    drift = schema_drift()
    for difference in drift:
        print(difference)
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
