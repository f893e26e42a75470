"""A small key-value store; keys and values are JSON. The records log is the truth, the table an index."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.strict_json import check_signable
from kachery_lab.db.engine import Database
from kachery_lab.db.models import mutables
from kachery_lab.errors import Forbidden, InvalidInput
from kachery_lab.services import bucket_index, feed_index, origins
from kachery_lab.services.logs import LogWriter, to_line
from kachery_lab.services.principals import Principal

OTHER_CODES = "_other_client_auth_codes"
"""The key under which a local client keeps additional codes for browsers; the older daemon's name."""
_INTERNAL = ("feedConfig", "feedIdForName")


class MutableService:
    """Reads from the index, writes through the records log."""

    def __init__(self, database: Database, log: LogWriter) -> None:
        self._database = database
        self._log = log

    async def get(self, key: object, principal: Principal) -> tuple[bool, object]:
        """(Whether the key exists, its value)."""
        text = self._key_text(key, principal)
        statement = select(mutables.c.value).where(mutables.c.key_sha1 == _sha1(text))
        value = await self._database.read(lambda conn: conn.execute(statement).scalar_one_or_none())
        return (False, None) if value is None else (True, json.loads(value))

    async def set(self, key: object, value: object, principal: Principal, *, update: bool = True) -> bool:
        """Set a value, durable on return. False, and nothing changed, when `update` is off and the key exists."""
        text = self._key_text(key, principal)
        if value is None:
            raise InvalidInput("value: null is not allowed; use delete")
        record = {
            "type": "mutable",
            "key": text,
            "value": json.dumps(value, separators=(",", ":"), ensure_ascii=False),
            "update": update,
            "at": int(time.time() * 1000),
        }
        return await self._log.append([to_line(record)], lambda conn: apply_set(conn, record))

    async def delete(self, key: object, principal: Principal) -> bool:
        """Whether the key existed; it is gone durably."""
        text = self._key_text(key, principal)
        if not (await self.get(key, principal))[0]:
            return False
        record = {"type": "mutableDelete", "key": text}
        return await self._log.append([to_line(record)], lambda conn: apply_delete(conn, record))

    def _key_text(self, key: object, principal: Principal) -> str:
        if key is None:
            raise InvalidInput("key: null is not allowed")
        check_signable(key, "key")
        if isinstance(key, dict) and key.get("type") in _INTERNAL:
            raise Forbidden("this key is the server's own", hint="Use the feed calls for feeds and their names")
        if key == OTHER_CODES and principal.kind == "browser":
            raise Forbidden("a browser's code may not read or change the codes of others")
        return canonical_2021(key)


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


def apply_set(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `mutable` record; False when it was not to replace a value and there was one."""
    row = {"key_sha1": _sha1(record["key"]), "key": record["key"], "value": record["value"], "updated_at": record["at"]}
    statement = insert(mutables).values(row)
    if record["update"]:
        statement = statement.on_conflict_do_update(
            index_elements=[mutables.c.key_sha1], set_={"value": row["value"], "updated_at": row["updated_at"]}
        )
    else:
        statement = statement.on_conflict_do_nothing()
    return conn.execute(statement).rowcount > 0


def apply_delete(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `mutableDelete` record; whether the key existed."""
    return conn.execute(delete(mutables).where(mutables.c.key_sha1 == _sha1(record["key"]))).rowcount > 0


def count(conn: Connection) -> int:
    """How many mutables are in the index."""
    return conn.execute(select(func.count()).select_from(mutables)).scalar_one()


def apply_record(conn: Connection, record: dict[str, Any]) -> None:
    """Index one record of the records log."""
    kind = record["type"]
    if kind == "mutable":
        apply_set(conn, record)
    elif kind == "mutableDelete":
        apply_delete(conn, record)
    elif kind == "origin":
        origins.apply_record(conn, record)
    elif kind in bucket_index.APPLY:
        bucket_index.APPLY[kind](conn, record)
    else:
        feed_index.apply_record(conn, record)


def clear_records(conn: Connection) -> None:
    """Forget all that the records log tells, before it is read anew."""
    conn.execute(delete(mutables))
    bucket_index.clear_index(conn)
    origins.clear(conn)
    feed_index.clear_records_log(conn)
