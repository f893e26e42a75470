"""Requests that a client key signed: whose they are, whether they are of now, and that each takes effect once.

They carry a time and no nonce, and published clients repeat nothing by themselves, so a repeat is not refused: it gets
the answer of the first and has no effect of its own. Answers are kept as long as the time in the request is accepted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.canonical_json import python_form
from kachery_lab.core.rates import Rates
from kachery_lab.core.signatures import parse_signature, verify_2021
from kachery_lab.db.engine import Database
from kachery_lab.db.models import client_answers
from kachery_lab.errors import TooManyRequests, Unauthenticated
from kachery_lab.services.locks import KeyLocks

WINDOW_MS = 15 * 60 * 1000
"""How far the time in a request may be from this server's, either way."""
PER_SECOND = 500.0
BURST = 5000
"""Requests of one key, or of one address without a key. A lab's bulk upload stays below; a loop gone wild does not."""

Answer = dict[str, Any]


class ClientRequests:
    """Verifies signed requests and remembers what was answered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._locks: KeyLocks[str] = KeyLocks()  # one request of a signature at a time
        self._rates = Rates(PER_SECOND, BURST)

    def check_time(self, timestamp: float) -> None:
        """`timestamp` in ms since 1970. Raises Unauthenticated naming the server's time."""
        now = time.time() * 1000
        if not abs(now - timestamp) <= WINDOW_MS:
            raise Unauthenticated(
                f"the request's time is {moment(timestamp)}, {abs(now - timestamp) / 1000:.0f} s from the server's; "
                f"{WINDOW_MS // 60_000} min are allowed",
                hint="Set the clock of the client's machine, then try again",
            )

    def check_signature(self, payload: dict[str, Any], client_id: str, signature: object) -> str:
        """The signature in its one spelling. Two dialects of canonical JSON are signed by published clients: the Python
        ones escape what is not ASCII and keep `2.0`, the browser's do neither. Raises Unauthenticated, InvalidInput."""
        text = parse_signature(signature)
        if not verify_2021(client_id, payload, text, python_form_text=python_form(payload)):
            raise Unauthenticated(
                "the signature is not this client's, or not of this request",
                hint="Check KACHERY_CLOUD_CLIENT_ID and KACHERY_CLOUD_PRIVATE_KEY, or the keys in KACHERY_CLOUD_DIR",
            )
        return text

    def check_rate(self, who: str) -> None:
        """Count one request. Raises TooManyRequests."""
        wait = self._rates.wait(who, time.monotonic())
        if wait:
            raise TooManyRequests(f"more than {PER_SECOND:g} requests per second", retry_after=math.ceil(wait))

    async def once(self, signature: str, timestamp: float, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of `work`, which takes effect once for a signature, restarts of the server included; a repeat
        waits for it. An error is not kept: what failed may be tried again. Raises what `work` raises."""
        async with self._locks.hold(signature):
            answer = await self._known(signature)
            if answer is None:
                answer = await work()
                await self._keep(signature, timestamp, answer)
            return answer

    async def _known(self, signature: str) -> Answer | None:
        statement = select(client_answers.c.answer).where(client_answers.c.signature == signature)
        text = await self._database.read(lambda conn: conn.execute(statement).scalar_one_or_none())
        found: Answer | None = None if text is None else json.loads(text)
        return found

    async def _keep(self, signature: str, timestamp: float, answer: Answer) -> None:
        # From then on the request is refused for its time.
        expires = int(timestamp) + WINDOW_MS + 1000
        row = {"signature": signature, "answer": json.dumps(answer), "expires_at": expires}
        statement = insert(client_answers).values(row).on_conflict_do_nothing()
        await self._database.write(lambda conn: conn.execute(statement).rowcount)

    async def prune(self) -> int:
        """Forget answers to requests that are refused for their time by now; how many."""
        statement = delete(client_answers).where(client_answers.c.expires_at < int(time.time() * 1000))
        return await self._database.write(lambda conn: conn.execute(statement).rowcount)


def moment(ms: float) -> str:
    """A time for people; a number that no calendar holds stays one."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))
    except (OverflowError, ValueError, OSError):
        return f"{ms:g} ms"
