"""Reference for appends: single-row commits in SQLite (WAL, synchronous=FULL), plain sqlite3 in a loop, one thread."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path


def measure(path: Path, rows: int) -> float:
    """Rows per second, each with a commit of its own."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE messages (position INTEGER PRIMARY KEY, message TEXT NOT NULL)")
        text = "m" * 100
        begun = time.perf_counter()
        for position in range(rows):
            connection.execute("INSERT INTO messages VALUES (?, ?)", (position, text))
        return rows / (time.perf_counter() - begun)
    finally:
        connection.close()
