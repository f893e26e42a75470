"""One subfeed: its end, and appends to it one group at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from kachery_lab.core.feeds import Checkpoint, SignedMessage, SubfeedHead, sign_messages
from kachery_lab.core.ids import FeedId, RequestId, SubfeedHash
from kachery_lab.core.keys import PrivateKey
from kachery_lab.db.engine import Database
from kachery_lab.db.models import append_requests
from kachery_lab.errors import FeedPosition, Forbidden, RequestIdReused
from kachery_lab.services import feed_index
from kachery_lab.services.events import Events
from kachery_lab.services.logs import LogWriter

REQUESTS_KEPT_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Appended:
    """Answer to an append: the number of its first message, and how many messages it added."""

    position: int
    count: int


@dataclass(slots=True)
class AppendRequest:
    """Messages of one append, as canonical JSON texts."""

    texts: list[str]
    expected_position: int | None = None
    request_id: RequestId | None = None
    done: asyncio.Future[Appended] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def digest(self) -> str:
        """Tells whether a repeated request is the same one."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()


@dataclass(slots=True)
class _Group:
    """What one commit adds: journal lines, index rows, and the answers to give after it."""

    head: SubfeedHead
    lines: list[dict[str, Any]] = field(default_factory=list)
    messages: list[SignedMessage] = field(default_factory=list)
    requests: dict[str, tuple[str, Appended]] = field(default_factory=dict)
    answers: list[tuple[AppendRequest, Appended | Exception]] = field(default_factory=list)


class Subfeed:
    """Serialises appends: while one group is being committed the next gathers, so many callers share one flush.

    At most one task works on a subfeed; that task is its lock.
    """

    def __init__(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        key: PrivateKey,
        database: Database,
        log: LogWriter,
        events: Events,
        deleted: Callable[[], bool],
    ) -> None:
        self.task: asyncio.Task[None] | None = None
        self._feed_id = feed_id
        self._subfeed_hash = subfeed_hash
        self._key = key
        self._database = database
        self._log = log
        self._events = events
        self._deleted = deleted
        self._pending: list[AppendRequest] = []
        self._head: SubfeedHead | None = None

    def idle(self) -> bool:
        """Whether nobody is appending."""
        return self.task is None and not self._pending

    async def append(self, request: AppendRequest) -> Appended:
        """Raises FeedPosition, RequestIdReused, Forbidden, StorageFull, Unavailable. Cancelling does not undo it."""
        self._pending.append(request)
        if self.task is None:
            self.task = asyncio.create_task(self._work())
        return await asyncio.shield(request.done)

    async def _work(self) -> None:
        try:
            while self._pending:
                requests, self._pending = self._pending, []
                try:
                    await self._commit(requests)
                except Exception as error:
                    for request in requests:
                        _fail(request, error)
        finally:
            self.task = None

    async def _commit(self, requests: list[AppendRequest]) -> None:
        if self._deleted():
            raise Forbidden(f"the feed {self._feed_id} was deleted")
        subfeed = (self._feed_id, self._subfeed_hash)
        if self._head is None:
            self._head = await self._database.read(lambda conn: feed_index.load_head(conn, *subfeed))
        known = await self._known_requests(requests)
        group = (
            await asyncio.to_thread(self._sign, requests, known) if _large(requests) else self._sign(requests, known)
        )
        if group.messages:
            checkpoint = Checkpoint.sign(self._key, self._subfeed_hash, group.head)
            group.lines[-1]["checkpoint"] = checkpoint.to_json()
            lines = [json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() for line in group.lines]
            now = group.lines[-1]["at"]
            await self._log.append(
                lines,
                lambda conn: feed_index.add_messages(
                    conn, *subfeed, group.head, checkpoint.signature, group.messages, group.requests, now
                ),
            )
            self._head = group.head
        for request, answer in group.answers:
            if isinstance(answer, Exception):
                _fail(request, answer)
            elif not request.done.done():
                request.done.set_result(answer)
        if group.messages:
            self._events.publish(subfeed)

    async def _known_requests(self, requests: list[AppendRequest]) -> dict[str, tuple[str, Appended]]:
        ids = [request.request_id for request in requests if request.request_id is not None]
        if not ids:
            return {}
        statement = select(append_requests).where(
            append_requests.c.subfeed_id == feed_index.subfeed_id(self._feed_id, self._subfeed_hash),
            append_requests.c.request_id.in_(ids),
        )
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        # `row.count` is a method of tuples.
        return {row.request_id: (row.digest, Appended(row.position, row._mapping["count"])) for row in rows}

    def _sign(self, requests: list[AppendRequest], known: dict[str, tuple[str, Appended]]) -> _Group:
        """Sign what is accepted, in order. Requests that lose add nothing; they are told after the commit, when what
        they lost to is certain."""
        assert self._head is not None
        group = _Group(self._head)
        now = int(time.time() * 1000)
        for request in requests:
            try:
                answer = self._repeated(request, known) or self._add(group, request, now)
            except (FeedPosition, RequestIdReused) as error:
                group.answers.append((request, error))
                continue
            group.answers.append((request, answer))
            if request.request_id is not None:
                known[request.request_id] = (request.digest(), answer)
        return group

    @staticmethod
    def _repeated(request: AppendRequest, known: dict[str, tuple[str, Appended]]) -> Appended | None:
        if request.request_id is None or request.request_id not in known:
            return None
        digest, answer = known[request.request_id]
        if digest != request.digest():
            raise RequestIdReused(
                f"requestId: {request.request_id!r} was used on this subfeed for other messages",
                hint="Use a new request id for new messages",
            )
        return answer

    def _add(self, group: _Group, request: AppendRequest, now: int) -> Appended:
        start = group.head
        if request.expected_position is not None and request.expected_position != start.num_messages:
            raise FeedPosition(
                f"the subfeed has {start.num_messages} messages, not {request.expected_position}",
                num_messages=start.num_messages,
                head_signature=start.signature,
                hint="Read the new messages, then decide whether to append after them",
            )
        answer = Appended(start.num_messages, len(request.texts))
        if not request.texts:
            return answer
        signed, group.head = sign_messages(self._key, start, request.texts, now)
        line: dict[str, Any] = {
            "type": "append",
            "feedId": self._feed_id,
            "subfeedHash": self._subfeed_hash,
            "position": start.num_messages,
            "at": now,
            "messages": [[m.message, m.timestamp, m.signature, m.meta_data] for m in signed],
        }
        if request.request_id is not None:
            line["requestId"], line["digest"] = request.request_id, request.digest()
            group.requests[request.request_id] = (line["digest"], answer)
        group.lines.append(line)
        group.messages.extend(signed)
        return answer


def _large(requests: list[AppendRequest]) -> bool:
    return sum(len(request.texts) for request in requests) > 20


def _fail(request: AppendRequest, error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
        # The caller may have gone away; its error must not be reported as unseen.
        request.done.exception()
