"""Statements that run with every small request, compiled once: running them costs less than SQLAlchemy's way to it.

Values go to the driver, and come from it, as they are: for statements whose columns are text and whole numbers. A
Boolean column gives 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, CursorResult
from sqlalchemy.sql.expression import ClauseElement


class Prepared:
    """One statement, all values of which are parameters. Call it with a connection and the values by name."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._text = ""
        self._names: tuple[str, ...] = ()

    def __call__(self, conn: Connection, values: Mapping[str, Any]) -> CursorResult[Any]:
        """What `conn.execute` would give. Raises KeyError for a value that is missing."""
        if not self._text:
            self._compile(conn)
        return conn.exec_driver_sql(self._text, tuple([values[name] for name in self._names]))

    def _compile(self, conn: Connection) -> None:
        compiled = self._statement.compile(dialect=conn.dialect)
        self._names = tuple(compiled.positiontup or ())  # type: ignore[attr-defined]
        self._text = str(compiled)
