"""Our end of another hub's bands: one WebSocket that is kept open, opened anew when it is lost, and never trusted with
more than a bounded amount of anything.

    opening   the upgrade request carries the node's signature (as every request to /api/v1); redirects are not followed
    frames    JSON arrays of objects with a `type`; docs/api.md, "Bands"
    losing    a ping every PING_SECONDS; a hub that is silent for PING_SECONDS + PONG_SECONDS is gone
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from kachery_lab.client.hub import HubClient
from kachery_lab.client.problems import error_from_problem
from kachery_lab.core.band_messages import SignedBody
from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import InvalidInput, KacheryLabError, Unavailable

TARGET = "/api/v1/bands"
MAX_FRAME = 1 << 20
"""Bytes of a frame from the hub."""
MAX_PENDING = 1000
"""Requests that may wait at once: MAX_SENT of them for the hub's answer, the others for their turn."""
MAX_SENT = 100
OPEN_SECONDS = 10.0
PING_SECONDS = 4.0
PONG_SECONDS = 5.0
ANSWER_SECONDS = 10.0
FIRST_WAIT = 0.5
LONGEST_WAIT = 8.0
STABLE_SECONDS = 20.0
"""A connection that lasted so long was a good one: the next attempt after it waits FIRST_WAIT again."""

_BROKEN = 1006

Item = dict[str, Any]

log = structlog.get_logger(__name__)


class _Connect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        # The signature, and the messages after it, are for the configured hub only.
        return exc


class BandsClient:
    """`receive` is called for each object of the hub that is no answer, `opened` when the hub has let us in and
    `lost` when the connection has ended."""

    def __init__(
        self,
        hub: HubClient,
        *,
        receive: Callable[[Item], None],
        opened: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._receive = receive
        self._opened = opened
        self._lost = lost
        self._socket: ClientConnection | None = None
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._waiting = 0
        # A hub that reads slowly must still find our pings in time.
        self._window = asyncio.Semaphore(MAX_SENT)
        self._numbers = itertools.count(1)
        self._said: str | None = None

    @property
    def connected(self) -> bool:
        """Whether the hub has let us in, and the connection is not known to be gone."""
        return self._socket is not None

    async def run(self) -> None:
        """Keep the connection, for ever. Waits between attempts grow to LONGEST_WAIT and are jittered."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                reason = await self._once()
            except KacheryLabError as error:
                reason = error.text
            except Exception:
                log.exception("bands_failed")
                reason = "what the hub sent could not be handled"
            if time.monotonic() - began > STABLE_SECONDS:
                failures = 0
            if reason != self._said:
                log.warning("the hub's bands are not connected", reason=reason)
                self._said = reason
            await asyncio.sleep(backoff(failures))
            failures += 1

    async def _once(self) -> str:
        """One connection until its end; why it ended. Raises KacheryLabError when there was none."""
        header = await self._hub.signature("GET", TARGET, b"")
        url = "ws" + self._hub.url.removeprefix("http") + TARGET
        try:
            async with _Connect(
                url,
                sock=await self._hub.dial(),
                additional_headers={"Kachery-Node": header},
                compression=None,
                proxy=None,
                user_agent_header="kachery-lab",
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=2,
                max_size=MAX_FRAME,
                max_queue=16,
            ) as socket:
                await self._serve(socket)
                if socket.close_code == _BROKEN:
                    return f"the connection broke, or was silent for {PING_SECONDS + PONG_SECONDS:g} s"
                return f"the hub ended the connection ({socket.close_code} {shorten(socket.close_reason or '', 200)})"
        except InvalidStatus as refused:
            raise _refusal(refused) from refused
        except (OSError, WebSocketException, TimeoutError) as error:
            raise Unavailable(f"the bands of the hub cannot be reached ({type(error).__name__})") from error
        finally:
            self._end()

    async def _serve(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            async for data in socket:
                for item in _items(data):
                    self._take(socket, item)

    def _take(self, socket: ClientConnection, item: Item) -> None:
        kind = item.get("type")
        if kind in ("done", "error"):
            future = self._pending.get(item["id"]) if isinstance(item.get("id"), int) else None
            if future is not None and not future.done():
                if kind == "done":
                    future.set_result(None)
                else:
                    future.set_exception(error_from_problem(0, item))
        elif kind == "hello":
            self._socket = socket
            self._said = None
            log.info("the hub's bands are connected", hub=shorten(item.get("hubId")))
            self._opened()
        else:
            self._receive(item)

    def _end(self) -> None:
        self._socket = None
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable("the connection to the hub's bands was lost before the hub answered"))
        self._lost()

    async def request(self, kind: str, fields: Item, messages: Sequence[SignedBody] = ()) -> None:
        """Send one request and wait until the hub has done it. Raises what the hub answers, or Unavailable; after
        Unavailable it may have been done."""
        if self._waiting >= MAX_PENDING:
            raise Unavailable(f"{MAX_PENDING} requests wait for the hub already")
        self._waiting += 1
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._window:
                await self._send(kind, fields, messages)
        except TimeoutError:
            raise Unavailable(f"the hub did not answer within {ANSWER_SECONDS:g} s") from None
        finally:
            self._waiting -= 1

    async def _send(self, kind: str, fields: Item, messages: Sequence[SignedBody]) -> None:
        socket = self._socket
        if socket is None:
            raise Unavailable("this node has no connection to the hub's bands at the moment")
        number = next(self._numbers)
        text = json.dumps({"type": kind, "id": number, **fields}, separators=(",", ":"))
        if messages:
            text = f'{text[:-1]},"messages":[{",".join(message.text for message in messages)}]}}'
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await socket.send(f"[{text}]")
            await future
        except ConnectionClosed:
            raise Unavailable("the connection to the hub's bands is lost") from None
        finally:
            del self._pending[number]


def backoff(failures: int) -> float:
    """Seconds to wait after so many failed attempts in a row. Jittered: nodes that lost their hub together come back
    one after the other."""
    longest = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(failures, 10))
    return random.uniform(longest / 2, longest)  # noqa: S311 - no secret


def _items(data: str | bytes) -> list[Item]:
    """The objects of a frame; none, with a line in the log, when it is not one."""
    try:
        if isinstance(data, bytes):
            raise InvalidInput("a binary frame")
        found = loads_2021(data)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise InvalidInput("no array of objects")
    except InvalidInput as error:
        log.warning("the hub sent a frame that cannot be read", reason=error.message)
        return []
    return found  # type: ignore[return-value]


def _refusal(refused: InvalidStatus) -> KacheryLabError:
    try:
        body = json.loads(refused.response.body or b"")
    except ValueError:
        body = None
    return error_from_problem(refused.response.status_code, body)
