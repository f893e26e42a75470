"""What the tests of the engine share: a database with one table, and ways to keep its writer busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from kachery_lab.db.engine import Database


def make(path: Path, **settings: Any) -> Database:
    opened = Database.open(path, **settings)
    opened.write_sync(lambda c: run(c, "CREATE TABLE IF NOT EXISTS t (k INTEGER PRIMARY KEY, v TEXT)"))
    return opened


def run(connection: Connection, sql: str) -> None:
    connection.exec_driver_sql(sql)


def put(key: int, value: str = "") -> Callable[[Connection], int]:
    statement = text("INSERT INTO t VALUES (:k, :v)")
    return lambda connection: connection.execute(statement, {"k": key, "v": value}).rowcount


def keys(connection: Connection) -> list[int]:
    return list(connection.exec_driver_sql("SELECT k FROM t ORDER BY k").scalars())


@contextmanager
def writer_held(database: Database) -> Iterator[None]:
    """Keeps the writer busy, so that what is queued meanwhile becomes one group."""
    started, release = threading.Event(), threading.Event()

    def hold(_: Connection) -> None:
        started.set()
        release.wait(10)

    holder = threading.Thread(target=database.write_sync, args=(hold,))
    holder.start()
    started.wait(10)
    try:
        yield
    finally:
        release.set()
        holder.join()


async def together(database: Database, *functions: Callable[[Connection], Any], single: bool = False) -> list[Any]:
    with writer_held(database):
        tasks = [asyncio.create_task(database.write(fn, single=single)) for fn in functions]
        while database.queued_writes < len(functions):
            await asyncio.sleep(0.001)
    return await asyncio.gather(*tasks, return_exceptions=True)
