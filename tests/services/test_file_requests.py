"""Asking a channel's nodes for a file: who waits how long, and what each outcome says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import pytest

from kachery_lab.core.ids import ChunkOf, FileKey, NodeId, Sha1
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, NotFound, Unavailable
from kachery_lab.services import file_requests
from kachery_lab.services.bands import BandHandlers, BandMessage
from kachery_lab.services.file_requests import FileRequests
from tests.services.opened import NODE, OTHER
from tests.services.virtual_time import VirtualLoop

T = TypeVar("T")

KEY = FileKey(Sha1("ab" * 20))
CHUNK = FileKey(Sha1("ab" * 20), None, ChunkOf(FileKey(Sha1("cd" * 20)), 0, 10))
SILENCE, STARTED, MISS = 0.2, 0.6, 0.5


class Bands:
    """Keeps what is published; `fails` is raised instead."""

    def __init__(self) -> None:
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.fails: Exception | None = None

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        if self.fails is not None:
            raise self.fails
        self.published.append((channel, body))

    def channels(self) -> Mapping[str, Role]:
        return {}


class World:
    """One asker, its bands, and a bucket that is a dictionary."""

    def __init__(self) -> None:
        self.handlers = BandHandlers()
        self.requests = FileRequests(self.handlers, silence=SILENCE, started=STARTED, miss=MISS)
        self.bands = Bands()
        self.bucket: dict[str, int] = {}
        self.looks = 0

    async def look(self) -> int | None:
        self.looks += 1
        return self.bucket.get(KEY.sha1)

    def ask(self, key: FileKey = KEY, channel: str = "chan") -> asyncio.Task[int]:
        return asyncio.create_task(self.requests.ask(self.bands, channel, key, self.look))

    async def say(self, status: str, sender: NodeId = NODE, key: FileKey = KEY, channel: str = "chan") -> None:
        body = {"type": "uploadFileStatus", "fileKey": key.to_json(), "status": status}
        for handler in self.handlers.of("uploadFileStatus"):
            await handler(BandMessage(channel, "provideFiles", sender, body), self.bands)


def in_world(work: Callable[[World], Awaitable[T]]) -> T:
    async def run() -> T:
        clock = SimpleNamespace(monotonic=asyncio.get_running_loop().time)
        world = World()
        try:
            with mock.patch.object(file_requests, "time", clock):
                return await work(world)
        finally:
            await world.requests.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run())


async def seconds(task: asyncio.Task[Any]) -> float:
    """How long it takes to end, however it ends."""
    begun = asyncio.get_running_loop().time()
    await asyncio.wait({task})
    return asyncio.get_running_loop().time() - begun


def test_a_file_that_is_provided_is_found() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        await asyncio.sleep(0.05)
        assert world.bands.published == [("chan", {"type": "requestFile", "fileKey": KEY.to_json()})]
        await world.say("started")
        world.bucket[KEY.sha1] = 7
        await world.say("finished")
        assert await task == 7

    in_world(work)


def test_one_request_for_all_who_ask_and_those_who_leave_do_not_end_it() -> None:
    async def work(world: World) -> None:
        tasks = [world.ask() for _ in range(20)]
        await asyncio.sleep(0.05)
        assert len(world.bands.published) == 1
        tasks[0].cancel()
        world.bucket[KEY.sha1] = 7
        await world.say("finished")
        assert await asyncio.gather(*tasks[1:]) == [7] * 19
        # Another file, and the same in another channel, are other requests.
        others = [world.ask(CHUNK), world.ask(channel="more")]
        await asyncio.sleep(0.05)
        assert len(world.bands.published) == 3
        await asyncio.gather(*others, return_exceptions=True)

    in_world(work)


def test_silence_ends_it_and_is_remembered() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        assert SILENCE * 0.9 < await seconds(task) < SILENCE + 0.2
        with pytest.raises(
            NotFound, match=r"not in the bucket of chan, and no node of the channel answered within 0.2"
        ):
            task.result()
        again = world.ask()
        assert await seconds(again) < 0.05
        with pytest.raises(NotFound, match=r"asked 0\.0 s ago"):
            again.result()
        assert len(world.bands.published) == 1
        # Elsewhere, and after a while, it is asked again.
        await asyncio.wait({world.ask(channel="more")})
        assert len(world.bands.published) == 2
        await asyncio.sleep(MISS)
        await asyncio.wait({world.ask()})
        assert len(world.bands.published) == 3

    in_world(work)


def test_a_miss_ends_when_somebody_provides_the_file() -> None:
    async def work(world: World) -> None:
        await asyncio.wait({world.ask()})
        await world.say("started")
        with pytest.raises(NotFound, match="ago"):
            await world.ask()
        await world.say("finished")
        task = world.ask()
        await asyncio.sleep(0.05)
        assert len(world.bands.published) == 2
        await asyncio.wait({task})

    in_world(work)


def test_who_started_has_longer_and_no_status_goes_back() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        await asyncio.sleep(0.1)
        await world.say("started")
        await asyncio.sleep(0.3)
        # A second `started` gives no second term.
        await world.say("started")
        await world.say("started", OTHER)
        assert await seconds(task) < STARTED - 0.3 + 0.1
        with pytest.raises(Unavailable, match=r"began to provide it and did not finish within 0.6 s"):
            task.result()

    in_world(work)


def test_a_lost_finished_is_made_up_by_the_bucket() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        await asyncio.sleep(0.05)
        world.bucket[KEY.sha1] = 7
        assert await task == 7

    in_world(work)


def test_who_says_finished_without_doing_it_ends_nobody_elses_offer() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        await asyncio.sleep(0.05)
        for _ in range(50):
            await world.say("finished")
            await asyncio.sleep(0)
        await world.say("started", OTHER)
        await asyncio.sleep(SILENCE)
        assert not task.done()
        assert world.looks <= 2
        world.bucket[KEY.sha1] = 7
        await world.say("finished", OTHER)
        assert await task == 7

        other = world.ask(channel="more")
        await asyncio.sleep(0.01)
        world.bucket.clear()
        await world.say("finished", channel="more")
        with pytest.raises(NotFound, match="said that it had put it there, which is not so"):
            await other

    in_world(work)


def test_statuses_of_other_keys_and_channels_count_for_nothing() -> None:
    async def work(world: World) -> None:
        task = world.ask()
        await asyncio.sleep(0.05)
        await world.say("started", key=CHUNK)
        await world.say("started", channel="more")
        assert await seconds(task) < SILENCE
        with pytest.raises(NotFound, match="no node"):
            task.result()

    in_world(work)


@pytest.mark.parametrize(
    ("fails", "kind", "text"),
    [
        (Forbidden("node n lacks requestFiles in the channel chan"), Forbidden, "may not ask for it: node n lacks"),
        (Unavailable("no connection"), Unavailable, "nodes cannot be asked: no connection"),
    ],
)
def test_a_request_that_cannot_be_sent_says_why_and_is_not_remembered(
    fails: Exception, kind: type[Exception], text: str
) -> None:
    async def work(world: World) -> None:
        world.bands.fails = fails
        with pytest.raises(kind, match=text):
            await world.ask()
        world.bands.fails = None
        task = world.ask()
        await asyncio.sleep(0.05)
        assert len(world.bands.published) == 1
        world.bucket[KEY.sha1] = 7
        await world.say("finished")
        assert await task == 7

    in_world(work)


def test_what_is_asked_for_and_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from kachery_lab.services import file_requests

    monkeypatch.setattr(file_requests, "MAX_REQUESTS", 5)
    monkeypatch.setattr(file_requests, "_MISSES", 3)

    async def work(world: World) -> None:
        keys = [FileKey(Sha1(f"{number:040x}")) for number in range(6)]
        tasks = [world.ask(key) for key in keys]
        await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [NotFound] * 5 + [Unavailable]
        assert len(world.requests._misses) == 3
        assert not world.requests._open

    in_world(work)
