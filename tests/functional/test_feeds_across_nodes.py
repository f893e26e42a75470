"""Feeds between nodes: a hub and two joined nodes as real servers, and the published client against each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.core.objects import subfeed_folder
from tests.clients.daemon_client import Client
from tests.clients.person import finish
from tests.faults.report import wait_for
from tests.federations import CHANNEL, SECONDS, Federation, federation, node_id
from tests.servers import RunningNode

NAMES = ("hub", "one", "two")
SUBFEED = "5" * 40


class Lab(Federation):
    """A hub and two joined nodes."""

    @property
    def one(self) -> RunningNode:
        return self.members["one"]

    @property
    def two(self) -> RunningNode:
        return self.members["two"]


def opened(root: Path) -> Iterator[Lab]:
    with federation(root, "one", "two") as found:
        yield Lab(found.hub, found.members)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The same three servers for all tests that leave them as they were."""
    yield from opened(tmp_path_factory.mktemp("feeds"))


@pytest.fixture
def own_lab(tmp_path: Path) -> Iterator[Lab]:
    """Three servers that a test may stop."""
    yield from opened(tmp_path)


def create(node: RunningNode) -> str:
    return str(node.post("/feed/createFeed", {}).json()["feedId"])


def append(node: RunningNode, feed: str, *messages: Any) -> None:
    body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": list(messages)}
    answer = node.post("/feed/appendMessages", body)
    assert answer.status == 200, answer.body


def watch(node: RunningNode, feed: str, position: int = 0, wait: float = 0, channel: str = CHANNEL, **more: Any) -> Any:
    """The answer of one watch; its messages are those of `w`."""
    watches = {"w": {"feedId": feed, "subfeedHash": SUBFEED, "position": position, "channelName": channel}}
    return node.post("/feed/watchForNewMessages", {"subfeedWatches": watches, "waitMsec": wait * 1000, **more})


def follow(
    node: RunningNode,
    feed: str,
    count: int,
    seconds: float = SECONDS,
    channel: str = CHANNEL,
    found: list[Any] | None = None,
) -> list[Any]:
    """Messages from 0 until there are `count`, by repeated long polls; in `found` as they come."""
    found = [] if found is None else found
    until = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        answer = watch(node, feed, len(found), wait=2, channel=channel)
        assert answer.status == 200, answer.body
        found += answer.json()["messages"].get("w", [])
    return found


def local(node: RunningNode, feed: str) -> int:
    answer = node.post("/feed/getNumLocalMessages", {"feedId": feed, "subfeedHash": SUBFEED})
    return int(answer.json()["numMessages"])


def test_the_published_client_follows_a_feed(lab: Lab, tmp_path: Path) -> None:
    """Created and appended to on one node; followed on the two others, live, in order, each message once."""
    clients = {
        name: Client(node.storage, node.port, tmp_path / name)
        for name, node in zip(NAMES, (lab.hub, lab.one, lab.two), strict=True)
    }
    uri = clients["one"].run("answer(kc.create_feed('shared').uri)")
    clients["one"].run(f"kc.load_feed({uri!r}).load_subfeed('s').append_messages([dict(n=n) for n in range(3)])")
    script = f"""
        subfeed = kc.load_feed({uri!r}).load_subfeed('s', channel={CHANNEL!r})
        got = []
        while len(got) < 8:
            got += [m['n'] for m in subfeed.get_next_messages(wait_msec=5000)]
            if len(got) == 3:
                print('THREE', flush=True)
        answer([got, kc.load_feed({uri!r}).is_writeable])
    """
    watchers = [clients[name].start(script) for name in ("hub", "two")]
    time.sleep(3)
    for number in range(3, 8):
        clients["one"].run(f"kc.load_feed({uri!r}).load_subfeed('s').append_message(dict(n={number}))")
    for watcher in watchers:
        assert finish(watcher) == [list(range(8)), False]
    # Without a channel the other node has it now, too.
    assert clients["two"].run(f"answer(kc.load_feed({uri!r}).load_subfeed('s').get_num_local_messages())") == 8


@pytest.mark.parametrize("owner", NAMES)
def test_live_and_from_the_bucket(lab: Lab, owner: str) -> None:
    """The owner is the hub's own node, or a joined one; the others get what was there, then what comes."""
    nodes = {"hub": lab.hub, "one": lab.one, "two": lab.two}
    writer = nodes.pop(owner)
    feed = create(writer)
    append(writer, feed, *({"n": n} for n in range(5)))
    for node in nodes.values():
        # Nobody asked before: nothing was uploaded by the appends alone.
        assert local(node, feed) == 0
    found: dict[str, list[Any]] = {name: [] for name in nodes}
    threads = [
        threading.Thread(target=follow, args=(node, feed, 25), kwargs={"found": found[name]})
        for name, node in nodes.items()
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: all(len(came) >= 5 for came in found.values()), "what was there arrived", SECONDS)
    for number in range(5, 25):
        append(writer, feed, {"n": number})
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    for name in nodes:
        assert [message["n"] for message in found[name]] == list(range(25)), name
    for node in nodes.values():
        refused = node.post("/feed/appendMessages", {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{}]})
        assert refused.status == 403


def test_large_appends_arrive_whole(lab: Lab) -> None:
    """More than a band message may have: in parts; a message that fits into none: by the bucket."""
    feed = create(lab.one)
    append(lab.one, feed, {"n": 0})
    assert len(follow(lab.two, feed, 1)) == 1
    append(lab.one, feed, *({"n": n, "text": "x" * 4000} for n in range(1, 41)))
    append(lab.one, feed, {"n": 41, "text": "y" * 1_000_000})
    append(lab.one, feed, *({"n": n, "text": "z" * 1000} for n in range(42, 1042)))
    found = follow(lab.two, feed, 1042)
    assert [message["n"] for message in found] == list(range(1042))
    assert [len(message.get("text", "")) for message in found[40:43]] == [4000, 1_000_000, 1000]


@pytest.mark.slow
@pytest.mark.parametrize("restarted", ["owner", "hub", "hub killed"])
def test_a_restart_in_between_loses_nothing(own_lab: Lab, restarted: str) -> None:
    lab = own_lab
    found: list[Any] = []
    feed = create(lab.one)
    append(lab.one, feed, {"n": 0})
    watcher = threading.Thread(target=lambda: follow(lab.two, feed, 7, found=found))
    watcher.start()
    wait_for(lambda: len(found) == 1, "the first message arrived", SECONDS)
    append(lab.one, feed, {"n": 1})
    if restarted == "owner":
        assert lab.one.terminate() == 0
        lab.one.start()
        append(lab.one, feed, {"n": 2}, {"n": 3}, {"n": 4})
        append(lab.one, feed, {"n": 5}, {"n": 6})
        begun = time.monotonic()
    else:
        lab.hub.kill() if restarted == "hub killed" else lab.hub.terminate()
        append(lab.one, feed, {"n": 2}, {"n": 3})
        append(lab.one, feed, {"n": 4})
        lab.hub.start()
        begun = time.monotonic()
        append(lab.one, feed, {"n": 5}, {"n": 6})
    watcher.join()
    assert [message["n"] for message in found] == list(range(7))
    assert time.monotonic() - begun < 30


def test_no_role_no_feed(lab: Lab) -> None:
    """Each role stops its flow, with words; and it flows again when the role is back."""
    channel = lab.open_channel()
    feed = create(lab.one)
    append(lab.one, feed, {"n": 0})
    assert len(follow(lab.two, feed, 1, channel=channel)) == 1

    lab.grant(lab.two, "provideFeeds", channel=channel)
    lab.settle()
    refused = watch(lab.two, feed, 1, wait=0.1, channel=channel)
    assert refused.status == 403
    assert b"requestFeeds" in refused.body and channel.encode() in refused.body
    append(lab.one, feed, {"n": 1})
    # Somebody else hears of it, and what is said on the bands after it is heard by all.
    assert len(follow(lab.hub, feed, 2, channel=channel)) == 2
    lab.settle()
    assert local(lab.two, feed) == 1
    assert [m["n"] for m in watch(lab.two, feed, channel="*local*").json()["messages"]["w"]] == [0]
    lab.grant(lab.two, "requestFeeds", channel=channel)
    lab.settle()
    assert [m["n"] for m in follow(lab.two, feed, 2, channel=channel)] == [0, 1]

    lab.grant(lab.one, "requestFeeds", channel=channel)
    lab.settle()
    append(lab.one, feed, {"n": 2})
    assert watch(lab.two, feed, 2, wait=2, channel=channel).json() == {"success": True, "messages": {"w": []}}
    lab.grant(lab.one, "all", channel=channel)
    assert [m["n"] for m in follow(lab.two, feed, 3, channel=channel)] == [0, 1, 2]


def test_a_wait_ends_when_the_role_goes(lab: Lab) -> None:
    channel = lab.open_channel()
    feed = create(lab.one)
    answers: list[Any] = []
    waiter = threading.Thread(target=lambda: answers.append(watch(lab.two, feed, wait=3, channel=channel)))
    waiter.start()
    time.sleep(1)
    lab.grant(lab.two, "provideFeeds", channel=channel)
    waiter.join()
    assert answers[0].status == 403


def test_feeds_do_not_cross_channels(own_lab: Lab, make_node: Callable[..., RunningNode]) -> None:
    """What came through one channel is provided in that one only, by whoever has it when the owner has gone."""
    lab = own_lab
    other = lab.open_channel()
    feed = create(lab.one)
    append(lab.one, feed, {"n": 0})
    assert len(follow(lab.two, feed, 1)) == 1
    assert lab.one.terminate() == 0
    three = make_node("three", env=lab.two.env).start()
    lab.approve(node_id(three))
    for channel in (CHANNEL, other):
        lab.join(three, channel)
    lab.settle(three)
    # Both the hub's own node and `two` have it; the bucket shows it no more.
    path = f"{subfeed_folder(FeedId(feed), SubfeedHash(SUBFEED))}/subfeed.json"
    lab.admin("DELETE", f"/channels/{CHANNEL}/objects/{path}")
    assert follow(three, feed, 1, seconds=5, channel=other) == []
    assert follow(three, feed, 1, channel=CHANNEL) == [{"n": 0}]


def test_a_received_feed_survives_the_database(own_lab: Lab) -> None:
    """The volume is the truth: after the database is gone and made anew, messages and their channel are there."""
    lab = own_lab
    feed = create(lab.one)
    append(lab.one, feed, *({"n": n} for n in range(4)))
    before = follow(lab.two, feed, 4)
    assert lab.two.terminate() == 0
    for path in lab.two.metadata.glob("*.db*"):
        path.unlink()
    done = lab.two.run_cli("reindex")
    assert done.returncode == 0, done.stderr
    assert lab.one.terminate() == 0
    lab.two.start()
    assert watch(lab.two, feed, channel="*local*").json()["messages"]["w"] == before
    refused = lab.two.post("/feed/appendMessages", {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{}]})
    assert refused.status == 403


def test_an_unknown_channel_is_empty(lab: Lab) -> None:
    feed = create(lab.one)
    append(lab.one, feed, {"n": 0})
    for channel in ("no-such-channel", "x", "*local*", "what ever"):
        assert watch(lab.two, feed, channel=channel).json() == {"success": True, "messages": {}}
        assert watch(lab.two, feed, wait=0.05, channel=channel).json() == {"success": True, "messages": {"w": []}}
