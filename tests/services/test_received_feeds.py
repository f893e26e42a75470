"""Messages from elsewhere: what is taken in, what is refused, and what stays after a restart and a rebuild."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021, loads_2021
from kachery_lab.core.feeds import (
    ChainRefused,
    Checkpoint,
    ReceivedMessage,
    SignedMessage,
    SubfeedHead,
    parse_signed_message,
    sign_messages,
)
from kachery_lab.core.ids import ChannelName, FeedId, SubfeedHash
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.objects import ObjectPath, subfeed_folder
from kachery_lab.core.signatures import sign_2021
from kachery_lab.errors import Conflict, ContentMismatch, FeedFork, InvalidInput, StorageFull
from kachery_lab.node import Node
from kachery_lab.services.bucket_feeds import BucketFeeds
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.watches import Span, Watch
from tests.services.opened import run_on

SUBFEED = SubfeedHash("ab" * 20)
HERE, THERE = "1" * 64 + "/here", "1" * 64 + "/there"


class Owner:
    """Somebody who writes a feed elsewhere."""

    def __init__(self, *texts: str, seed: bytes | None = None) -> None:
        self.key = PrivateKey(seed) if seed is not None else PrivateKey.generate()
        self.feed_id = FeedId(self.key.public_hex)
        self.signed: list[SignedMessage] = []
        self.heads = [SubfeedHead()]
        for text in texts:
            added, head = sign_messages(self.key, self.heads[-1], [canonical_2021({"text": text})], 1_700_000_000_000)
            self.signed += added
            self.heads.append(head)

    def envelope(self, number: int) -> dict[str, Any]:
        text = self.signed[number].envelope_text(self.heads[number].signature)
        return dict(loads_2021(text.encode()))

    def messages(self, start: int = 0, end: int | None = None) -> list[ReceivedMessage]:
        numbers = range(start, len(self.signed) if end is None else end)
        return [parse_signed_message(self.envelope(number)) for number in numbers]

    def checkpoint(self, count: int) -> Checkpoint:
        return Checkpoint.sign(self.key, SUBFEED, self.heads[count])

    def fork(self, at: int, *texts: str) -> Owner:
        """The same feed, written differently from message `at` on."""
        other = Owner(seed=bytes.fromhex(self.key.seed_hex()))
        other.signed, other.heads = self.signed[:at], self.heads[: at + 1]
        for text in texts:
            added, head = sign_messages(self.key, other.heads[-1], [canonical_2021({"text": text})], 1_700_000_000_001)
            other.signed = [*other.signed, *added]
            other.heads = [*other.heads, head]
        return other


async def texts(node: Node, owner: Owner) -> list[str]:
    count = await node.watches.num_messages(owner.feed_id, SUBFEED)
    span = Span(Watch(owner.feed_id, SUBFEED, 0), 0, count)
    return [json.loads(text)["text"] async for page in node.watches.read(span, signed=False) for text in page]


async def take(node: Node, owner: Owner, messages: Sequence[ReceivedMessage], **more: Any) -> int:
    origin = more.pop("origin", HERE)
    return await node.received_feeds.take(owner.feed_id, SUBFEED, origin, messages, **more)


def test_messages_come_in_any_portions(tmp_path: Path) -> None:
    owner = Owner(*"abcdefg")

    async def work(node: Node) -> None:
        assert await take(node, owner, owner.messages(0, 3)) == 3
        assert await take(node, owner, owner.messages(0, 3)) == 3
        assert await take(node, owner, owner.messages(1, 5)) == 5
        assert await take(node, owner, ()) == 5
        with pytest.raises(ChainRefused) as gap:
            await take(node, owner, owner.messages(6, 7))
        assert gap.value.reason == "gap"
        assert await take(node, owner, owner.messages(5, 7)) == 7
        assert await texts(node, owner) == list("abcdefg")
        assert not await node.feeds.is_writeable(owner.feed_id)

    run_on(tmp_path, work)
    run_on(tmp_path, lambda node: texts(node, owner))


def altered(owner: Owner) -> list[tuple[str, Any]]:
    """Messages 2 to 4, with something wrong in the middle one."""
    envelopes = [owner.envelope(number) for number in (2, 3, 4)]
    stranger = Owner(*"abcde")

    def middle(**changes: Any) -> list[dict[str, Any]]:
        body = {**envelopes[1]["body"], **changes}
        return [envelopes[0], {"body": body, "signature": envelopes[1]["signature"]}, envelopes[2]]

    def signed_anew(**changes: Any) -> list[dict[str, Any]]:
        body = {**envelopes[1]["body"], **changes}
        return [envelopes[0], {"body": body, "signature": sign_2021(owner.key, canonical_2021(body))}, envelopes[2]]

    return [
        ("bad-signature", middle(message={"text": "forged"})),
        ("bad-signature", middle(timestamp=1)),
        ("bad-signature", middle(metaData={})),
        ("bad-signature", [envelopes[0], {**envelopes[1], "signature": "0" * 128}, envelopes[2]]),
        ("bad-signature", [envelopes[0], stranger.envelope(3), envelopes[2]]),
        ("wrong-previous-signature", signed_anew(previousSignature="0" * 128)),
        ("wrong-message-number", [envelopes[0], envelopes[2], envelopes[1]]),
        ("wrong-message-number", [envelopes[0], envelopes[2]]),
        ("wrong-message-number", [envelopes[0], envelopes[0], envelopes[1]]),
    ]


def test_nothing_of_a_bad_batch_is_kept(tmp_path: Path) -> None:
    owner = Owner(*"abcde")

    async def work(node: Node) -> None:
        await take(node, owner, owner.messages(0, 2))
        for reason, envelopes in altered(owner):
            with pytest.raises(ChainRefused) as refused:
                await take(node, owner, [parse_signed_message(envelope) for envelope in envelopes])
            assert refused.value.reason == reason
            assert await texts(node, owner) == list("ab")
        assert await take(node, owner, owner.messages(2)) == 5

    run_on(tmp_path, work)


def test_the_first_history_stays(tmp_path: Path) -> None:
    """A fork that the feed's own key signed: at a known place, behind the end, or told by a checkpoint alone."""
    owner = Owner(*"abcde")
    forked = owner.fork(2, "X", "Y", "Z")

    async def work(node: Node) -> None:
        await take(node, owner, owner.messages(0, 4))
        with pytest.raises(FeedFork):
            await take(node, owner, forked.messages(2, 5))
        with pytest.raises(FeedFork):
            await take(node, owner, forked.messages(0, 3))
        with pytest.raises(ChainRefused):
            await take(node, owner, forked.messages(4, 5))
        for count in (3, 4):
            with pytest.raises(FeedFork):
                await take(node, owner, (), checkpoint=forked.checkpoint(count))
        assert await texts(node, owner) == list("abcd")
        # What both share contradicts nothing.
        assert await take(node, owner, (), checkpoint=forked.checkpoint(2)) == 4
        assert await take(node, owner, owner.messages(), checkpoint=owner.checkpoint(5)) == 5

    run_on(tmp_path, work)


def test_a_checkpoint_binds_what_comes_later(tmp_path: Path) -> None:
    """Also after a restart. Two checkpoints of one count that differ are a fork; an older one is no news."""
    owner = Owner(*"abcdef")
    forked = owner.fork(3, "X", "Y", "Z")

    async def first(node: Node) -> None:
        await take(node, owner, owner.messages(0, 2), checkpoint=owner.checkpoint(5))

    async def second(node: Node) -> None:
        with pytest.raises(FeedFork):
            await take(node, owner, forked.messages(2, 6))
        with pytest.raises(FeedFork):
            await take(node, owner, (), checkpoint=forked.checkpoint(5))
        for wrong in (
            replace(owner.checkpoint(5), count=6),
            replace(owner.checkpoint(5), subfeed_hash=SubfeedHash("0" * 40)),
            Owner(*"abcdef").checkpoint(5),
        ):
            with pytest.raises(InvalidInput):
                await take(node, owner, (), checkpoint=wrong)
        place = await node.received_feeds.place(owner.feed_id, SUBFEED, HERE)
        assert place.checkpoint == owner.checkpoint(5)
        assert await take(node, owner, owner.messages(0, 6), checkpoint=owner.checkpoint(1)) == 6
        assert await take(node, owner, (), checkpoint=owner.checkpoint(6)) == 6
        place = await node.received_feeds.place(owner.feed_id, SUBFEED, HERE)
        assert place.checkpoint == owner.checkpoint(6)

    run_on(tmp_path, first)
    run_on(tmp_path, second)


def test_each_channel_has_what_came_through_it(tmp_path: Path) -> None:
    owner = Owner(*"abcdef")

    async def counts(node: Node) -> tuple[int, int]:
        here, there = [await node.received_feeds.place(owner.feed_id, SUBFEED, one) for one in (HERE, THERE)]
        return here.received, there.received

    async def work(node: Node) -> None:
        await take(node, owner, owner.messages(0, 4))
        assert await counts(node) == (4, 0)
        await take(node, owner, owner.messages(2, 6), origin=THERE)
        assert await counts(node) == (4, 0)
        await take(node, owner, owner.messages(0, 6), origin=THERE)
        assert await counts(node) == (4, 6)

    run_on(tmp_path, work)
    for path in (tmp_path / "metadata").glob("*.db*"):
        path.unlink()

    async def again(node: Node) -> tuple[tuple[int, int], list[str]]:
        return await counts(node), await texts(node, owner)

    assert run_on(tmp_path, again, start=False, rebuild=True) == ((4, 6), list("abcdef"))


def test_deleted_and_received_again(tmp_path: Path) -> None:
    owner = Owner(*"abc")

    async def work(node: Node) -> None:
        await take(node, owner, owner.messages())
        await node.feeds.delete(owner.feed_id)
        assert await texts(node, owner) == []
        with pytest.raises(ChainRefused):
            await take(node, owner, owner.messages(1))
        assert await take(node, owner, owner.messages()) == 3

    run_on(tmp_path, work)
    assert run_on(tmp_path, lambda node: texts(node, owner)) == list("abc")


def test_a_feed_that_is_written_here_takes_nothing_new(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        feed_id = await node.feeds.create()
        await node.feeds.append(feed_id, SUBFEED, [{"text": "a"}])
        place = await node.received_feeds.place(feed_id, SUBFEED, HERE)
        assert place.writeable and place.checkpoint is not None and place.checkpoint.verify()
        owner = Owner(*"ab")
        foreign = [parse_signed_message(owner.envelope(1))]
        with pytest.raises(FeedFork, match="written here"):
            await node.received_feeds.take(feed_id, SUBFEED, HERE, foreign)

    run_on(tmp_path, work)


def bucket(node: Node) -> BucketFeeds:
    return node.buckets._feeds


def test_a_bucket_is_a_view(tmp_path: Path) -> None:
    """The layout that older nodes read, out of the one store; its limit, its end, and what only reindex knows."""
    owner = Owner(*"abcd")
    folder = subfeed_folder(owner.feed_id, SUBFEED)
    feed = owner.feed_id
    assert folder == f"feeds/{feed[:2]}/{feed[2:4]}/{feed[4:6]}/{feed}/subfeeds/ab/ab/ab/{SUBFEED}"

    async def document(node: Node, name: str) -> Any:
        found = await bucket(node).document("rig-data", ObjectPath.parse(f"{folder}/{name}"))
        return None if found is None else json.loads(found)

    async def work(node: Node) -> None:
        await node.channels.create(OPERATOR, ChannelName("rig-data"), max_bytes=3 * 1000)
        feeds = bucket(node)
        await take(node, owner, owner.messages(), origin=feeds.origin("rig-data"), checkpoint=owner.checkpoint(4))
        assert await document(node, "subfeed.json") is None and await document(node, "0") is None
        await feeds.show("rig-data", owner.feed_id, SUBFEED, 3)
        assert await document(node, "subfeed.json") == {
            "messageCount": 3,
            "checkpoint": owner.checkpoint(4).to_json(),
        }
        assert [await document(node, str(n)) for n in range(5)] == [*map(owner.envelope, range(3)), None, None]
        assert await document(node, "1-9") == {"messages": [owner.envelope(1), owner.envelope(2)]}
        used = await node.buckets.used("rig-data")
        assert 1200 < used < 1300
        large = Owner("x" * 3000)
        path = ObjectPath.parse(f"{subfeed_folder(large.feed_id, SUBFEED)}/0-1")
        with pytest.raises(StorageFull):
            await feeds.put("rig-data", path, {"messages": [large.envelope(0)]})
        assert await texts(node, large) == []
        with pytest.raises(ContentMismatch):
            await feeds.put("rig-data", ObjectPath.parse(f"{folder}/3"), owner.envelope(2))
        with pytest.raises(Conflict):
            await feeds.put("rig-data", ObjectPath.parse(f"{folder}/subfeed.json"), {"messageCount": 4})
        await feeds.put("rig-data", ObjectPath.parse(f"{folder}/3"), owner.envelope(3))
        assert (await document(node, "subfeed.json"))["messageCount"] == 4

    run_on(tmp_path, work)

    async def after(node: Node) -> None:
        assert (await document(node, "subfeed.json"))["messageCount"] == 4
        await node.channels.update(OPERATOR, "rig-data", {"public": True})
        assert await document(node, "subfeed.json") is None
        assert await texts(node, owner) == list("abcd")
        place = await bucket(node).place("rig-data", owner.feed_id, SUBFEED)
        assert (place.received, place.shown) == (4, 0)
        await node.channels.remove(OPERATOR, "rig-data")
        place = await bucket(node).place("rig-data", owner.feed_id, SUBFEED)
        assert (place.received, place.shown) == (0, 0)

    run_on(tmp_path, after)


def test_the_log_holds_what_was_received(tmp_path: Path) -> None:
    owner = Owner(*"ab")
    run_on(tmp_path, lambda node: take(node, owner, owner.messages(), checkpoint=owner.checkpoint(2)))
    (log,) = [p for p in (tmp_path / "storage" / "feeds-log").iterdir() if p.stat().st_size]
    assert owner.signed[1].signature in log.read_text("utf-8")
    (database,) = (tmp_path / "metadata").glob("*.db")
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT origin, num_received, num_shown FROM feed_channels").fetchall() == [
            (HERE, 2, 0)
        ]
