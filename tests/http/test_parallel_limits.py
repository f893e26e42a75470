"""Changes that come together do not overrun a limit: of those that fit one by one exactly as many succeed as fit.

All are held back where they were admitted and are not counted yet, until each is there or refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from kachery_lab.core.objects import ObjectPath
from kachery_lab.errors import StorageFull, Unavailable
from kachery_lab.services.logs import LogWriter
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.quotas import Charge, Quotas
from kachery_lab.services.subjects import Subject
from tests.faults.report import wait_for
from tests.http.test_bucket_uploads import Feed
from tests.hubs import Hub, LabNode, path_of
from tests.servers import Answer
from tests.zones import Zone, fresh

COUNT, FIT, SIZE = 12, 4, 1000
KINDS = (b'{"type":"reference', b'{"type":"receive"')


class Gate:
    """Changes of buckets wait before a log until it is open."""

    def __init__(self, log: LogWriter) -> None:
        self.waiting = 0
        self._append, self._open = log.append, asyncio.Event()

    async def append(self, records: list[bytes], *more: Any) -> Any:
        if records[0].startswith(KINDS):
            self.waiting += 1
            await self._open.wait()
        return await self._append(records, *more)

    def open(self, hub: Hub) -> None:
        hub.loop.call_soon_threadsafe(self._open.set)


@contextmanager
def closed(hub: Hub, log: LogWriter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(log)
    with monkeypatch.context() as patch:
        patch.setattr(log, "append", gate.append)
        yield gate
    # Nothing is held any more when nothing is on its way.
    wait_for(lambda: not hub.node.buckets.quotas._holds, "all room was given back")


def together(hub: Hub, gate: Gate, acts: list[Callable[[], Answer]]) -> list[Answer]:
    """What all of these are answered that are under way at the same time."""
    with ThreadPoolExecutor(len(acts)) as pool:
        running = [pool.submit(act) for act in acts]
        wait_for(
            lambda: gate.waiting + sum(one.done() for one in running) == len(acts),
            "each is refused, or waits for its commit",
        )
        gate.open(hub)
        return [one.result() for one in running]


def member(hub: Hub, **limits: Any) -> tuple[LabNode, str]:
    name, node = f"p{time.monotonic_ns():x}", LabNode()
    hub.make_channel(name, **limits)
    hub.register(node)
    hub.join(node, name)
    return node, name


@pytest.fixture(params=[True, False], ids=["guard", "control"])
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Control: the check is outside of what counts, as it is when what it found is not held."""
    if not request.param:
        monkeypatch.setattr(Quotas, "keep", lambda *_: None)
    return bool(request.param)


def told(answers: list[Answer], guard: bool, fit: int = FIT) -> None:
    statuses = sorted(answer.status for answer in answers)
    assert statuses == ([200] * fit + [507] * (COUNT - fit) if guard else [200] * COUNT)
    for answer in answers:
        assert answer.status == 200 or b"not fit" in answer.body


@pytest.mark.parametrize("limit", ["max_bytes", "max_objects", "quota"])
def test_uploads_with_tickets(hub: Hub, guard: bool, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most = SIZE * FIT + SIZE // 2
    node, name = member(hub, **{"max_bytes": {"max_bytes": most}, "max_objects": {"max_objects": FIT}}.get(limit, {}))
    if limit == "quota":
        hub.call(hub.node.quotas.set(OPERATOR, f"node:{node.id}", most, None))
    contents = [os.urandom(SIZE) for _ in range(COUNT)]
    urls = hub.upload_urls(node, name, [path_of(data) for data in contents], [SIZE] * COUNT)
    with closed(hub, hub.node.records_log, monkeypatch) as gate:
        acts = [lambda url=url, data=data: hub.put(url, data) for url, data in zip(urls, contents, strict=True)]
        answers = together(hub, gate, acts)  # type: ignore[arg-type]
    told(answers, guard)
    assert hub.call(hub.node.buckets.used(name)) == SIZE * (FIT if guard else COUNT)


def test_messages_of_many_subfeeds(hub: Hub, guard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bucket shows of feeds counts towards the same limit."""
    node, name = member(hub)
    feeds = [Feed() for _ in range(COUNT + 1)]
    documents = [json.dumps(feed.message(0, None, {"text": "x" * SIZE})).encode() for feed in feeds]
    paths = [f"{feed.folder}/0" for feed in feeds]
    urls = hub.upload_urls(node, name, paths, [len(data) for data in documents])
    assert hub.put(urls.pop(), documents.pop()).status == 200
    each = hub.call(hub.node.buckets.used(name))
    hub.call(hub.node.channels.update(OPERATOR, name, {"max_bytes": each * (FIT + 1) + each // 2}))
    with closed(hub, hub.node.feeds_log, monkeypatch) as gate:
        acts = [lambda url=url, data=data: hub.put(url, data) for url, data in zip(urls, documents, strict=True)]
        answers = together(hub, gate, acts)  # type: ignore[arg-type]
    told(answers, guard)
    assert hub.call(hub.node.buckets.used(name)) == each * ((FIT if guard else COUNT) + 1)


def test_deletions_that_are_undone(hub: Hub, guard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    node, name = member(hub)
    paths = [ObjectPath.parse(hub.upload(node, name, os.urandom(SIZE))) for _ in range(COUNT)]
    admin, buckets = Subject("user", "admin"), hub.node.buckets
    for path in paths:
        hub.call(buckets.forget(name, path, admin))
    hub.call(hub.node.channels.update(OPERATOR, name, {"max_bytes": SIZE * FIT}))

    def restore(path: ObjectPath) -> Answer:
        try:
            hub.call(buckets.restore(name, path, admin))
        except StorageFull as error:
            return Answer(507, {}, error.message.encode())
        return Answer(200, {}, b"")

    with closed(hub, hub.node.records_log, monkeypatch) as gate:
        answers = together(hub, gate, [lambda path=path: restore(path) for path in paths])  # type: ignore[misc]
    told(answers, guard)


def test_an_announcement_sees_what_is_on_its_way(hub: Hub, guard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ticket's upload waits for its commit; kachery 2 announces what would need the same room."""
    zone, node = Zone(hub, max_bytes=SIZE + SIZE // 2), LabNode()
    hub.register(node)
    hub.join(node, zone.name)
    data = os.urandom(SIZE)
    (url,) = hub.upload_urls(node, zone.name, [path_of(data)], [SIZE])
    with closed(hub, hub.node.records_log, monkeypatch) as gate, ThreadPoolExecutor(1) as pool:
        running = pool.submit(hub.put, url, data)
        wait_for(lambda: gate.waiting == 1, "the upload waits for its commit")
        announced = zone.initiate(zone.writer, fresh(SIZE)).status
        gate.open(hub)
        assert running.result().status == 200
    assert announced == (507 if guard else 200)


def test_one_file_from_many_needs_its_room_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    node, name = member(hub, max_bytes=SIZE)
    data = os.urandom(SIZE)
    urls = hub.upload_urls(node, name, [path_of(data)] * COUNT, [SIZE] * COUNT)
    with closed(hub, hub.node.records_log, monkeypatch) as gate:
        answers = together(hub, gate, [lambda url=url: hub.put(url, data) for url in urls])  # type: ignore[misc]
    assert [answer.status for answer in answers] == [200] * COUNT
    assert hub.call(hub.node.buckets.used(name)) == SIZE


def test_what_is_put_in_place_of_another_needs_the_difference(hub: Hub) -> None:
    """A task's result is one object, whatever it was before."""
    _, name = member(hub, max_bytes=SIZE, max_objects=1)
    path, owner = ObjectPath.parse("task_results" + path_of(b"task").removeprefix("sha1")), Subject("user", "boss")

    async def put(size: int) -> bool:
        stored = await hub.node.blobs.store_bytes(os.urandom(size), OPERATOR)
        return await hub.node.buckets.refer(name, path, stored.sha1, size, owner)

    for size in (SIZE - 300, SIZE):
        assert hub.call(put(size)) is True
    with pytest.raises(StorageFull):
        hub.call(put(SIZE + 1))
    assert hub.call(hub.node.buckets.used(name)) == SIZE


def test_no_room_is_taken_for_who_gave_up_before(hub: Hub) -> None:
    """The check of a caller that is gone may still be on its way to the writer."""
    _, name = member(hub, max_bytes=SIZE)
    hold = hub.node.buckets.quotas.hold()
    hold.release()
    hub.call(hub.node.database.write(lambda conn: hold.take(conn, Charge(name, "path", "user:boss", SIZE))))
    assert not hub.node.buckets.quotas._holds


@pytest.mark.parametrize("how", ["fails", "given up"])
def test_room_of_what_came_to_nothing(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is free again when that is certain, and not before."""
    node, name = member(hub, max_bytes=SIZE)
    first, second = os.urandom(SIZE), os.urandom(SIZE)
    urls = hub.upload_urls(node, name, [path_of(first), path_of(second)], [SIZE, SIZE])
    log, blocked, go_on = hub.node.records_log, asyncio.Event(), asyncio.Event()
    commit = log._commit

    async def fail(group: Any, *more: Any) -> Any:
        if not any(one.startswith(KINDS) for entry in group for one in entry.records):
            return await commit(group, *more)
        blocked.set()
        await go_on.wait()
        raise Unavailable("the volume is gone")

    async def give_up() -> None:
        stored = await hub.node.blobs.store_bytes(first, OPERATOR)
        path, owner = ObjectPath.parse(path_of(first)), Subject("node", node.id)
        task = asyncio.create_task(hub.node.buckets.refer(name, path, stored.sha1, SIZE, owner))
        await blocked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patch:
        patch.setattr(log, "_commit", fail)
        if how == "fails":
            hub.loop.call_soon_threadsafe(go_on.set)
            assert hub.put(urls[0], first).status == 503
        else:
            hub.call(give_up())
            assert hub.put(urls[1], second).status == 507
            hub.loop.call_soon_threadsafe(go_on.set)
        wait_for(lambda: not hub.node.buckets.quotas._holds, "the room is free again")
    assert hub.put(urls[1], second).status == 200
    assert hub.call(hub.node.buckets.used(name)) == SIZE
