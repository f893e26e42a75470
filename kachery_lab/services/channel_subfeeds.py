"""A subfeed in a channel: what following it and providing it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from kachery_lab.core.feeds import Checkpoint, ReceivedMessage
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.core.roles import Role
from kachery_lab.errors import KacheryLabError
from kachery_lab.services.bands import BandMessage
from kachery_lab.services.feed_channels import FeedChannels


@dataclass(frozen=True, slots=True)
class ChannelSubfeed:
    """A subfeed in one channel of one hub. Equal ones are the same subfeed in the same channel."""

    side: FeedChannels
    channel: str
    feed_id: FeedId
    subfeed_hash: SubfeedHash

    @classmethod
    def of(cls, side: FeedChannels, message: BandMessage) -> Self:
        """The one that a message on a band of feeds is about."""
        return cls(side, message.channel, FeedId(message.body["feedId"]), SubfeedHash(message.body["subfeedHash"]))

    @property
    def name(self) -> tuple[FeedId, SubfeedHash]:
        """What it is called in every channel."""
        return self.feed_id, self.subfeed_hash

    # -- the channel's bucket, and this node's part in the channel --------------------------------------------------

    async def origin(self) -> str:
        """As `FeedChannels.origin`."""
        return await self.side.origin(self.channel)

    def may(self, role: Role) -> bool:
        """As `FeedChannels.may`."""
        return self.side.may(self.channel, role)

    async def state(self) -> tuple[int, Checkpoint | None]:
        """As `FeedChannels.state`."""
        return await self.side.state(self.channel, *self.name)

    async def messages(self, start: int, end: int) -> Sequence[ReceivedMessage]:
        """As `FeedChannels.messages`."""
        return await self.side.messages(self.channel, *self.name, start, end)

    async def provide(self, count: int, checkpoint: Checkpoint | None) -> int:
        """As `FeedChannels.provide`."""
        return await self.side.provide(self.channel, *self.name, count, checkpoint)

    # -- messages on bands, lines in the log ------------------------------------------------------------------------

    def body(self, kind: str, **fields: Any) -> dict[str, Any]:
        """A message of a type of the bands of feeds, about this subfeed."""
        return {"type": kind, "feedId": self.feed_id, "subfeedHash": self.subfeed_hash, **fields}

    async def publish(self, body: dict[str, Any]) -> None:
        """Send a message on its band. Raises what `ChannelBands.publish` raises."""
        await self.side.bands.publish(self.channel, body)

    def failure(self, error: KacheryLabError) -> dict[str, str]:
        """What a line in the log says of it when something failed."""
        return {**self.log_fields, "code": error.code, "reason": error.message}

    @property
    def log_fields(self) -> dict[str, str]:
        """What names it in the log."""
        return {"channel": self.channel, "feed_id": self.feed_id, "subfeed_hash": self.subfeed_hash}
