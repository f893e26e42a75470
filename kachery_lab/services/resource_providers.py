"""Providers: programs that connect, and upload a file of their machine into a zone when somebody asks for it.

    room -> ResourceProviders.enter    who it is; counted before anything is said
    room -> ResourceProviders.serve    for which zone; from now on it is asked
    ResourceProviders.ask -> Provider.take -> room -> provider
    provider -> room -> Provider.reply -> the caller of `ask`

What a provider says is passed on as its word and proves nothing: a file is in a zone when the zone has it. A zone has
one provider at a time. Rights are looked at again whenever the access data changes, and when a token expires.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from typing import Literal

import structlog

from kachery_lab.core.ids import Sha1
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, Forbidden, TooManyRequests, Unavailable
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.subjects import RoleService, Subject

MAX_PROVIDERS = 200
MAX_PER_SUBJECT = 20
MAX_WAITING = 100
"""Files that one provider is asked for at the same time."""
ANSWER_SECONDS = 1800.0
"""How long a provider may take to answer. It is told, and uploads meanwhile: asked again, it would begin again. Whoever
asks is told every few seconds that it is at work; one that hangs is noticed by the pings of its connection."""
GRACE_SECONDS = 10.0
"""How much later its answer is still waited for."""
REFRESH_SECONDS = 0.25
"""Rights of connected providers follow a change of the access data within this time."""
_LONGEST_SLEEP = 60.0
"""A clock that is set forward ends an expired token at most so much later."""

State = Literal["not-found", "queued", "running", "completed", "error"]
EndCode = Literal["forbidden", "conflict", "bad_message", "stopping", "closed"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that a provider is asked for, and how many seconds it has to answer."""

    request_id: str
    sha1: Sha1
    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a provider says of a file."""

    state: State
    error: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Why a provider's connection ends: a code for programs, a text for people."""

    code: EndCode
    reason: str


class Provider:
    """One connection. `zone` is None until it is served; `expires_at`: of its token, in ms since 1970."""

    def __init__(self, subject: Subject, peer: str | None, expires_at: int | None) -> None:
        self.subject = subject
        self.peer = peer
        self.expires_at = expires_at
        self.zone: str | None = None
        self.end: End | None = None
        self._queue: asyncio.Queue[Wanted] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._ended = asyncio.Event()

    def __str__(self) -> str:
        return f"{self.subject} at {self.peer}"

    async def take(self) -> Wanted:
        """The next file to ask for; waits for one."""
        return await self._queue.get()

    def reply(self, request_id: str, reply: Reply) -> None:
        """What the provider said. No error for an id that nobody waits for: they may have given up."""
        waiting = self._waiting.get(request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    async def ask(self, sha1: Sha1) -> Reply:
        """Ask for a file. `queued` at once when MAX_WAITING others are asked for. Raises Unavailable when the provider
        is silent for too long or goes."""
        if self.end is not None:
            raise self._gone()
        if len(self._waiting) >= MAX_WAITING:
            return Reply("queued")
        wanted = Wanted(secrets.token_hex(8), sha1, ANSWER_SECONDS)
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[wanted.request_id] = waiting
        self._queue.put_nowait(wanted)
        try:
            async with asyncio.timeout(wanted.seconds + GRACE_SECONDS):
                return await waiting
        except TimeoutError:
            raise Unavailable(f"the provider of {self.zone} did not answer within {wanted.seconds:.0f} s") from None
        finally:
            del self._waiting[wanted.request_id]

    def finish(self, end: End) -> None:
        """End it, for the first reason that is given; whoever waits for an answer is told."""
        if self.end is not None:
            return
        self.end = end
        self._ended.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._gone())

    def _gone(self) -> Unavailable:
        return Unavailable(f"the provider of {self.zone} disconnected before it answered")

    async def wait_end(self) -> End:
        """Waits until it is ended, and says why."""
        await self._ended.wait()
        assert self.end is not None
        return self.end


class ResourceProviders:
    """All providers that are connected to this server."""

    def __init__(self, data: AccessData, roles: RoleService) -> None:
        self._roles = roles
        self._open: list[Provider] = []
        self._serving: dict[str, Provider] = {}
        self._timer: asyncio.TimerHandle | None = None
        data.listeners.append(self._changed)

    # -- connections ---------------------------------------------------------------------------------------------

    def enter(self, subject: Subject, peer: str | None, expires_at: int | None) -> Provider:
        """A connection of somebody whose credential was looked at; it serves no zone yet. Raises TooManyRequests."""
        mine = sum(str(one.subject) == str(subject) for one in self._open)
        if mine >= MAX_PER_SUBJECT or len(self._open) >= MAX_PROVIDERS:
            whose = str(subject) if mine >= MAX_PER_SUBJECT else "this server"
            raise TooManyRequests(f"{whose} has as many providers as it may have", retry_after=30)
        provider = Provider(subject, peer, expires_at)
        self._open.append(provider)
        return provider

    def serve(self, provider: Provider, zone: str) -> None:
        """From now on it is asked for files of the zone. Raises Forbidden that names role and zone, Conflict while
        another one serves it, Unavailable when it was ended."""
        if provider.end is not None:
            raise Unavailable(provider.end.reason)
        self._roles.require(provider.subject, zone, Role.PROVIDE_FILES)
        if zone in self._serving:
            raise Conflict(f"the zone {zone} has a provider already", hint="It frees the name when it disconnects")
        provider.zone = zone
        self._serving[zone] = provider
        self._look_later(_LONGEST_SLEEP)
        log.info("a resource provider is connected", zone=zone, who=str(provider.subject), peer=provider.peer)

    def leave(self, provider: Provider, end: End | None = None) -> None:
        """End and forget a connection, for a reason that its room is told. Again is no error."""
        if provider in self._open:
            self._open.remove(provider)
            if provider.zone is not None:
                del self._serving[provider.zone]
                reason = None if end is None else end.reason
                log.info("a resource provider is gone", zone=provider.zone, who=str(provider.subject), reason=reason)
        provider.finish(end or End("closed", "the connection was closed"))

    def close_all(self) -> None:
        """End every connection: the server stops."""
        for provider in list(self._open):
            self.leave(provider, End("stopping", "the server stops"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- rights --------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        if self._serving:
            self._look_later(REFRESH_SECONDS)

    def _look_later(self, most: float) -> None:
        """Look at the rights again within `most` seconds, or when the first token expires."""
        ends = [one.expires_at / 1000 - time.time() for one in self._serving.values() if one.expires_at is not None]
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, min([most, *ends]))
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer = None
        for zone, provider in list(self._serving.items()):
            try:
                self._roles.require(provider.subject, zone, Role.PROVIDE_FILES)
            except Forbidden as error:
                self.leave(provider, End("forbidden", error.message))
        if self._serving:
            self._look_later(_LONGEST_SLEEP)

    # -- asking --------------------------------------------------------------------------------------------------

    def of(self, zone: str) -> Provider | None:
        """Who serves a zone now."""
        return self._serving.get(zone)

    async def ask(self, zone: str, sha1: Sha1) -> Reply:
        """What the provider of a zone says of a file; `not-found` when there is none. Raises Unavailable."""
        provider = self._serving.get(zone)
        return Reply("not-found") if provider is None else await provider.ask(sha1)
