"""How a connection to the database file is opened; the only place that sets pragmas.

One connection writes and checkpoints. Readers open the file read-only, so that neither a full log nor their own closing
makes them checkpoint: SQLite before 3.51.3 can damage a database when two connections checkpoint at once.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from kachery_lab.errors import StartRefused

CHECKPOINT_PAGES = 1000
KEPT_LOG_BYTES = 64 * 1024 * 1024
_MEMORY = 2
_FULL = 2


def open_writer(path: Path, busy_timeout: float) -> sqlite3.Connection:
    """The connection that writes and checkpoints. Raises `StartRefused`, also when there is no file.

    It never makes one: opened again after a fault, an empty database must not take the place of a lost one.
    """
    return _open(
        path,
        "rw",
        busy_timeout,
        {"journal_mode": "wal", "wal_autocheckpoint": CHECKPOINT_PAGES, "journal_size_limit": KEPT_LOG_BYTES},
    )


def open_reader(path: Path, busy_timeout: float) -> sqlite3.Connection:
    """A connection that can neither write nor checkpoint. Raises `StartRefused`."""
    return _open(path, "ro", busy_timeout, {"wal_autocheckpoint": 0, "query_only": 1})


def create_private(path: Path) -> None:
    """Make an empty file that only the server's user can read; an existing one is left alone.

    SQLite gives `-wal` and `-shm` the mode of the database. An existing file is not even opened: closing any
    descriptor of it would drop the locks that SQLite holds in this process.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StartRefused(f"the database {path} cannot be made: {error.strerror}") from error
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make new and renamed entries of `directory` survive a power cut. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, mode: str, busy_timeout: float, own: dict[str, int | str]) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=busy_timeout,
            # None: the driver itself begins nothing; every BEGIN is ours.
            isolation_level=None,
            # Opened by the starting thread, used by one worker thread.
            check_same_thread=False,
            cached_statements=256,
        )
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    try:
        _apply(connection, path, {"synchronous": _FULL, "foreign_keys": 1, "temp_store": _MEMORY, **own})
        _verify(connection, path, {"journal_mode": "wal", "busy_timeout": int(busy_timeout * 1000)})
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _apply(connection: sqlite3.Connection, path: Path, pragmas: dict[str, int | str]) -> None:
    for name, value in pragmas.items():
        connection.execute(f"PRAGMA {name}={value}").close()
    _verify(connection, path, pragmas)


def _verify(connection: sqlite3.Connection, path: Path, pragmas: dict[str, int | str]) -> None:
    for name, wanted in pragmas.items():
        (found,) = connection.execute(f"PRAGMA {name}").fetchone()
        if found != wanted:
            raise StartRefused(
                f"SQLite does not take {name}={wanted} for {path} (it says {found})",
                hint="put the metadata directory (KACHERY_LAB_METADATA_DIR) on a local disk",
            )


def _unusable(path: Path, error: sqlite3.Error) -> StartRefused:
    return StartRefused(
        f"the database {path} cannot be opened: {error}",
        hint="restore a backup, or move the file away and run `kachery-lab reindex`",
    )
