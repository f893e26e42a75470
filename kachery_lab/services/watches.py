"""Reading subfeeds: what is there now, waiting for more, and paging through it without holding it in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from kachery_lab.core.feeds import SignedMessage
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.db.engine import Database
from kachery_lab.db.models import messages, subfeeds
from kachery_lab.errors import Unavailable
from kachery_lab.services import feed_index
from kachery_lab.services.events import Events

GATHER_SECONDS = 0.03
"""After the first new message a watch of several subfeeds waits so long for the others; the older daemon does too."""
PAGE_MESSAGES = 1000
PAGE_CHARACTERS = 1 << 20
MAX_WAIT_SECONDS = 3600.0
WOKEN_AT_ONCE = 64
"""So many of those whom one message wakes look for it at once. The event loop would do nothing else for seconds when
thousands did, and others' requests wait."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One subfeed to read from `position` on: also the number of messages the reader has."""

    feed_id: FeedId
    subfeed_hash: SubfeedHash
    position: int


@dataclass(frozen=True, slots=True)
class Span:
    """Messages `start` to `end` (exclusive) of a watched subfeed exist."""

    watch: Watch
    start: int
    end: int


class WatchService:
    """Reads the index only; every view of a subfeed sees the same messages."""

    def __init__(self, database: Database, events: Events) -> None:
        self._database = database
        self._events = events
        self._woken = asyncio.Semaphore(WOKEN_AT_ONCE)

    async def num_messages(self, feed_id: FeedId, subfeed_hash: SubfeedHash) -> int:
        """How many messages are here; 0 for what was never mentioned."""
        head = await self._database.read(lambda conn: feed_index.load_head(conn, feed_id, subfeed_hash))
        return head.num_messages

    async def watch(
        self,
        watches: Mapping[str, Watch],
        *,
        wait_ms: float,
        max_messages: int = 0,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[dict[str, Span], bool]:
        """(The spans that have messages, whether it waited). `max_messages` 0: no limit.

        Answers at once when there is something; else waits until there is, at most `wait_ms`, inside of `waiting()`.
        """
        topics = {(watch.feed_id, watch.subfeed_hash) for watch in watches.values()}
        with self._events.subscribe(topics) as subscription:
            found = await self._look(watches, max_messages)
            if found or wait_ms <= 0:
                return found, False
            until = time.monotonic() + min(wait_ms / 1000, MAX_WAIT_SECONDS)
            with waiting():
                while not found and await subscription.wait(until - time.monotonic()):
                    async with self._woken:
                        found = await self._look(watches, max_messages)
                    if 0 < len(found) < len(watches):
                        # Others may be about to have some too.
                        await subscription.wait(min(GATHER_SECONDS, until - time.monotonic()))
                        found = await self._look(watches, max_messages)
            return found, True

    async def _look(self, watches: Mapping[str, Watch], max_messages: int) -> dict[str, Span]:
        def look(conn: Connection) -> dict[str, Span]:
            spans = {}
            for name, watch in watches.items():
                count = feed_index.load_head(conn, watch.feed_id, watch.subfeed_hash).num_messages
                end = min(count, watch.position + max_messages) if max_messages else count
                if end > watch.position:
                    spans[name] = Span(watch, watch.position, end)
            return spans

        return await self._database.read(look)

    async def read(self, span: Span, *, signed: bool) -> AsyncIterator[list[str]]:
        """Pages of JSON texts, message by message in order: bare messages, or whole envelopes when `signed`.

        Raises Unavailable when messages of the span are gone, as after a deletion while it is read.
        """
        position = span.start
        previous: str | None = None
        while position < span.end:
            page = await self._database.read(lambda conn, at=position: _page(conn, span, at))  # type: ignore[misc]
            if not page:
                raise Unavailable("the feed was deleted while it was read")
            if signed:
                texts = []
                previous = previous if position > span.start else await self._signature_before(span)
                for message in page:
                    texts.append(message.envelope_text(previous))
                    previous = message.signature
                yield texts
            else:
                yield [message.message for message in page]
            position += len(page)

    async def _signature_before(self, span: Span) -> str | None:
        if span.start == 0:
            return None
        statement = select(messages.c.signature).where(
            messages.c.subfeed_id == feed_index.subfeed_id(span.watch.feed_id, span.watch.subfeed_hash),
            messages.c.position == span.start - 1,
        )
        found = await self._database.read(lambda conn: conn.execute(statement).scalar_one())
        return bytes(found).hex()


def _page(conn: Connection, span: Span, position: int) -> list[SignedMessage]:
    """Consecutive messages from `position`: at most PAGE_MESSAGES, and no more once they exceed PAGE_CHARACTERS."""
    row_id = conn.execute(
        select(subfeeds.c.id).where(
            subfeeds.c.feed_id == span.watch.feed_id, subfeeds.c.subfeed_hash == span.watch.subfeed_hash
        )
    ).scalar_one_or_none()
    statement = (
        select(messages)
        .where(messages.c.subfeed_id == row_id, messages.c.position >= position, messages.c.position < span.end)
        .order_by(messages.c.position)
        .limit(PAGE_MESSAGES)
    )
    page: list[SignedMessage] = []
    characters = 0
    result = conn.execution_options(yield_per=64).execute(statement)
    for row in result:
        page.append(_message(row))
        characters += len(row.message)
        if characters > PAGE_CHARACTERS:
            break
    result.close()
    return page


def _message(row: Any) -> SignedMessage:
    return SignedMessage(row.position, row.message, row.timestamp, row.signature.hex(), row.body_sha256, row.meta_data)
