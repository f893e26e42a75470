"""Asking the nodes of a channel for a file that its bucket lacks (spec/pubsub-bands.md section 4).

A provider puts the file into the bucket and says so. Whoever says so without having done it is not believed again for
this request, and others are waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kachery_lab.core.ids import FileKey, NodeId
from kachery_lab.errors import Forbidden, InvalidInput, NotFound, Unavailable
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands

SILENCE_SECONDS = 3.0
STARTED_SECONDS = 30.0
MISS_SECONDS = 10.0
MAX_REQUESTS = 5_000
"""Different files asked for at the same time."""
MAX_SENDERS = 1_000
"""Nodes whose answers to one request are told apart."""
_MISSES = 10_000

Look = Callable[[], Awaitable[int | None]]
"""Looks in the bucket: the size of the file, None when it is not there."""
_Place = tuple[ChannelBands, str, str]


@dataclass(slots=True)
class _Request:
    """One file that is being asked for. Statuses move forward only: a `started` after `finished` changes nothing."""

    started: dict[NodeId, float] = field(default_factory=dict)
    finished: set[NodeId] = field(default_factory=set)
    disbelieved: set[NodeId] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, sender: NodeId, status: str) -> None:
        known = sender in self.started
        if sender in self.disbelieved or (not known and len(self.started) >= MAX_SENDERS):
            return
        if not known:
            self.started[sender] = time.monotonic()
        if status == "finished":
            self.finished.add(sender)
        self.changed.set()

    def disbelieve(self, senders: set[NodeId]) -> None:
        for sender in senders:
            self.disbelieved.add(sender)
            self.finished.discard(sender)
            self.started.pop(sender, None)


class _GaveUp(Exception):
    """Waiting came to nothing, for this `reason`; the bucket was looked at once more."""

    def __init__(self, reason: NotFound | Unavailable) -> None:
        super().__init__(reason.message)
        self.reason = reason


class FileRequests:
    """One request for however many ask at the same time; who got none is told so again for a while, unasked.

    Times in seconds: `silence` is how long no node may answer, `started` how long a provider may take, `miss` how long
    a request that came to nothing is remembered.
    """

    def __init__(
        self,
        handlers: BandHandlers,
        *,
        silence: float = SILENCE_SECONDS,
        started: float = STARTED_SECONDS,
        miss: float = MISS_SECONDS,
    ) -> None:
        self._silence = silence
        self._started = started
        self._miss = miss
        self._open: dict[_Place, tuple[_Request, asyncio.Task[int]]] = {}
        self._misses: OrderedDict[_Place, tuple[float, str]] = OrderedDict()
        self._notes = RateLimited()
        handlers.on("uploadFileStatus", self._heard)

    async def ask(self, bands: ChannelBands, channel: str, key: FileKey, look: Look) -> int:
        """Have a file put into the bucket; its size there. For a file that `look` did not find a moment ago.

        Raises NotFound (nobody provided it), Unavailable (a provider did not finish; no connection; too many requests),
        Forbidden (this node may not ask), and what `look` raises. Each text says which step failed.
        """
        place = (bands, channel, key.hash())
        running = self._open.get(place)
        if running is None:
            self._refuse_missed(place)
            if len(self._open) >= MAX_REQUESTS:
                raise Unavailable(f"{MAX_REQUESTS} files are being asked for already", hint="Try again later")
            request = _Request()
            task = asyncio.create_task(self._run(request, place, key, look))
            running = self._open[place] = (request, task)
        # Each asker may go away; the request goes on for the others.
        return await asyncio.shield(running[1])

    async def close(self) -> None:
        """End all requests."""
        tasks = [task for _, task in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse_missed(self, place: _Place) -> None:
        missed = self._misses.get(place)
        if missed is None:
            return
        at, text = missed
        ago = time.monotonic() - at
        if ago < self._miss:
            raise NotFound(
                f"{text} (asked {ago:.1f} s ago)", hint=f"The channel is asked again in {self._miss - ago:.0f} s"
            )
        del self._misses[place]

    async def _run(self, request: _Request, place: _Place, key: FileKey, look: Look) -> int:
        try:
            await self._publish(place[0], place[1], key)
            try:
                return await self._wait(request, place[1], key, look)
            except _GaveUp as error:
                self._remember(place, error.reason.message)
                raise error.reason from None
        finally:
            del self._open[place]
            # When every asker has gone, nobody else takes the error.
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _publish(self, bands: ChannelBands, channel: str, key: FileKey) -> None:
        try:
            await bands.publish(channel, {"type": "requestFile", "fileKey": key.to_json()})
        except Forbidden as error:
            raise Forbidden(
                f"{_absent(key, channel)}, and this node may not ask for it: {error.message}", hint=error.hint
            ) from error
        except Unavailable as error:
            raise Unavailable(
                f"{_absent(key, channel)}, and the channel's nodes cannot be asked: {error.message}", hint=error.hint
            ) from error

    async def _wait(self, request: _Request, channel: str, key: FileKey, look: Look) -> int:
        begun = time.monotonic()
        while True:
            request.changed.clear()
            if request.finished:
                said = set(request.finished)
                size = await look()
                if size is not None:
                    return size
                self._notes.note("file_status_untrue", channel=channel, sha1=key.sha1, nodes=sorted(said))
                request.disbelieve(said)
            until = min(request.started.values()) + self._started if request.started else begun + self._silence
            try:
                async with asyncio.timeout(max(until - time.monotonic(), 0)):
                    await request.changed.wait()
            except TimeoutError:
                # What was said may have been lost with a connection; the bucket is what counts.
                size = await look()
                if size is not None:
                    return size
                raise _GaveUp(self._gave_up(request, channel, key)) from None

    def _gave_up(self, request: _Request, channel: str, key: FileKey) -> NotFound | Unavailable:
        if request.started:
            return Unavailable(
                f"{_absent(key, channel)}; a node began to provide it and did not finish within {self._started:g} s",
                hint="It may still arrive: try again. Else look at the log of that node",
            )
        if request.disbelieved:
            return NotFound(
                f"{_absent(key, channel)}; a node said that it had put it there, which is not so",
                hint="Look at the log for that node's id",
            )
        return NotFound(
            f"{_absent(key, channel)}, and no node of the channel answered within {self._silence:g} s",
            hint="Does a node that has it run, with provideFiles there, and offer it?",
        )

    def _remember(self, place: _Place, text: str) -> None:
        self._misses[place] = (time.monotonic(), text)
        self._misses.move_to_end(place)
        if len(self._misses) > _MISSES:
            self._misses.popitem(last=False)

    async def _heard(self, message: BandMessage, bands: ChannelBands) -> None:
        """`uploadFileStatus`: compared by the hash of its file key, and by channel."""
        try:
            key = FileKey.parse(message.body["fileKey"])
        except InvalidInput as error:
            self._notes.note(
                "file_status_malformed", channel=message.channel, node=message.sender, reason=error.message
            )
            return
        place = (bands, message.channel, key.hash())
        if place in self._open:
            self._open[place][0].hear(message.sender, message.body["status"])
        elif message.body["status"] == "finished":
            # Somebody provided it meanwhile: the next who asks need not wait.
            self._misses.pop(place, None)


def _absent(key: FileKey, channel: str) -> str:
    return f"{key.sha1} is not in the bucket of {channel}"
