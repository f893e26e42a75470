"""Single facts about this installation, kept in the database."""

from __future__ import annotations

from kachery_lab.db.engine import Database
from kachery_lab.services.logs import get_meta, set_meta


class Facts:
    """Texts by key: the volume id, and how far each log was read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_sync(self, key: str) -> str | None:
        """Blocking: a fact, or None."""
        return self._database.read_sync(lambda conn: get_meta(conn, key))

    def set_sync(self, key: str, value: str) -> None:
        """Blocking: set a fact, durably."""
        self._database.write_sync(lambda conn: set_meta(conn, key, value))

    async def get(self, key: str) -> str | None:
        """A fact, or None."""
        return await self._database.read(lambda conn: get_meta(conn, key))

    async def set(self, key: str, value: str) -> None:
        """Set a fact, durably."""
        await self._database.write(lambda conn: set_meta(conn, key, value))
