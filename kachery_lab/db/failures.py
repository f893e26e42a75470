"""SQLite's result codes as errors of this program."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

from kachery_lab.errors import KacheryLabError, StorageFull, Unavailable

LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_BROKEN = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
    }
)


def result_code(error: BaseException) -> int | None:
    """The primary SQLite result code behind `error`, or None when SQLite did not raise it."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) if isinstance(cause, sqlite3.Error) else None
    return None if code is None else code & 0xFF  # the upper bits only refine the code


def translate(error: BaseException) -> BaseException:
    """The error that a caller gets for `error`.

    Locked -> `Unavailable`; full -> `StorageFull`; I/O error, damage, read-only, cannot open, time limit ->
    `Unavailable`. All else is returned unchanged: an `IntegrityError` means something to the caller, a wrong
    statement is a bug.
    """
    if isinstance(error, KacheryLabError):
        return error
    code = result_code(error)
    translated: KacheryLabError
    if code in LOCKED:
        translated = Unavailable("the database is locked by another process")
    elif code == sqlite3.SQLITE_FULL:
        translated = StorageFull("there is no room left for the database", hint="free space in the metadata directory")
    elif code == sqlite3.SQLITE_INTERRUPT:
        translated = too_slow()
    elif code in _BROKEN:
        name = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlite_errorname", "")
        translated = Unavailable(f"the database cannot be used now ({name})", hint="see the server's log")
    else:
        return error
    translated.__cause__ = error
    return translated


def commit_failure(error: BaseException) -> BaseException:
    """The error for a waiter of a group that was not committed; a new one each time, since each is raised elsewhere."""
    translated = translate(error)
    if translated is error:
        translated = Unavailable("the change could not be committed")
        translated.__cause__ = error
    return translated


def too_slow() -> Unavailable:
    """A read that reached its time limit."""
    return Unavailable("the database did not answer in time")


def closed() -> Unavailable:
    """Asked after `close()`."""
    return Unavailable("the database is closed: the server is stopping")
