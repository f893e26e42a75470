"""A subfeed that this node follows through a channel: how far it is, and what is wrong with it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from kachery_lab.services.channel_subfeeds import ChannelSubfeed

PROBLEM_SECONDS = 600.0
"""What was wrong is told to watches for so long."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a feed, for whoever watches it. `held_back`: only that messages have not come, so it is over
    when they have; anything else that was refused stays refused."""

    text: str
    at: float
    held_back: bool


@dataclass(slots=True)
class FollowedSubfeed:
    """The state of one subfeed in one channel. Times are of the monotonic clock."""

    subfeed: ChannelSubfeed
    origin: str
    used: float
    waiting: int = 0
    subscribed: float = -1e9
    fetched: float = -1e9
    fetch: asyncio.Task[None] | None = None
    again: bool = False
    renewal: asyncio.Task[None] | None = None
    vouched: int = 0
    vouched_at: float = 0.0
    problem: Problem | None = None
    tried: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def idle(self) -> bool:
        """Nobody waits for it, and nothing of it is going on."""
        return not self.waiting and self.fetch is None and self.renewal is None

    def note_vouched(self, count: int, have: int) -> None:
        """The feed's key vouches for `count` messages; `have` of them are here."""
        if count > max(have, self.vouched):
            self.vouched, self.vouched_at = count, time.monotonic()

    def held_back(self, have: int, unmet: float) -> str | None:
        """What is wrong when messages that the feed's key vouches for have not come within `unmet` seconds."""
        if self.vouched <= have or time.monotonic() - self.vouched_at <= unmet:
            return None
        return (
            f"the feed's key vouches for {self.vouched} messages, the channel gives {have}: "
            "the rest is held back, or late"
        )

    def settle(self, have: int) -> None:
        """When all that the feed's key vouches for is here, nothing is held back any more."""
        if self.vouched <= have:
            self.vouched = 0
            if self.problem is not None and self.problem.held_back:
                self.problem = None

    def report(self, text: str, *, held_back: bool) -> None:
        """From now on this is what is wrong."""
        self.problem = Problem(text, time.monotonic(), held_back)

    @property
    def told(self) -> str | None:
        """What watches are told is wrong; None when nothing is, or nothing has been for a while."""
        if self.problem is None or time.monotonic() - self.problem.at >= PROBLEM_SECONDS:
            return None
        return self.problem.text
