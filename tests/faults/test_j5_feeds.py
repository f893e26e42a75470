"""J4, J5: a member, or the hub itself, edits, truncates, forks or forges a feed on its way."""

from __future__ import annotations

import copy
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.feeds import Checkpoint, SubfeedHead, accept_chain, parse_signed_message
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.core.keys import PrivateKey, derive_key, unseal
from kachery_lab.core.signatures import sign_2021
from tests.faults.hostile import HostileMember
from tests.faults.lying_hub import Edit, LyingHub
from tests.faults.report import messages_of, report, without
from tests.federations import CHANNEL, Federation, federate, node_id
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
SUBFEED, OTHER = "5" * 40, "6" * 40


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"message {number}"} for number in range(start, start + count)]


@dataclass
class Place:
    """`alpha` writes the feeds; `beta` reads them through a hub that lies."""

    lab: Federation
    alpha: RunningNode
    beta: RunningNode
    lying: LyingHub

    def create(self) -> str:
        return str(self.alpha.post("/feed/createFeed", {}).json()["feedId"])

    def append(self, feed: str, messages: list[Any], subfeed: str = SUBFEED) -> None:
        body = {"feedId": feed, "subfeedHash": subfeed, "messages": messages}
        assert self.alpha.post("/feed/appendMessages", body).status == 200

    def key(self, feed: str) -> PrivateKey:
        """The feed's own key, as somebody who stole the server would have it."""
        (database,) = self.alpha.metadata.glob("*.db")
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            (sealed,) = connection.execute("SELECT sealed_key FROM feeds WHERE feed_id = ?", (feed,)).fetchone()
        secret = PrivateKey.from_pem((self.alpha.storage / "private.pem").read_text())
        return PrivateKey.from_seed(unseal(derive_key(secret, "kachery-lab/feed-keys/1"), sealed, feed.encode()).hex())

    def signed(self, feed: str, subfeed: str = SUBFEED) -> list[Any]:
        return messages_of(self.alpha, feed, subfeed, signed=True)


@pytest.fixture
def make_place(make_node: Make) -> Iterator[Callable[..., Place]]:
    opened: list[LyingHub] = []

    def make(prefix: Any = ()) -> Place:
        lab = federate(make_node, "alpha")
        lying = LyingHub(lab.hub).__enter__()
        opened.append(lying)
        beta = make_node("beta", env={"KACHERY_LAB_HUB_URL": lying.url}, prefix=prefix).start()
        lab.approve(node_id(beta))
        lab.join(beta)
        lab.settle(beta)
        return Place(lab, lab.members["alpha"], beta, lying)

    yield make
    for one in opened:
        one.__exit__()


# -- what the hub makes of it -----------------------------------------------------------------------------------------


def chain(key: PrivateKey, before: list[Any], messages: list[Any]) -> list[Any]:
    """Messages that the feed's key signs behind others."""
    found: list[Any] = []
    for number, message in enumerate(messages, start=len(before)):
        last = (before + found)[-1:]
        body = {"message": message, "messageNumber": number, "timestamp": 1_700_000_000_000}
        if last:
            body["previousSignature"] = last[0]["signature"]
        found.append({"body": body, "signature": sign_2021(key, canonical_2021(body))})
    return found


def checkpoint(key: PrivateKey, subfeed: str, envelopes: list[Any]) -> dict[str, object]:
    parsed = [parse_signed_message(envelope) for envelope in envelopes]
    head = SubfeedHead().extended(accept_chain(FeedId(key.public_hex), 0, None, parsed))
    return Checkpoint.sign(key, SubfeedHash(subfeed), head).to_json()


def serving(envelopes: list[Any], vouched: Any = None) -> Edit:
    """A bucket with these messages."""

    def edit(name: str, _document: Any) -> Any:
        if name == "subfeed.json":
            return {"messageCount": len(envelopes)} | ({"checkpoint": vouched} if vouched else {})
        start, _, end = name.partition("-")
        return {"messages": envelopes[int(start) : int(end or int(start) + 1)]}

    return edit


def change(messages: Callable[[list[Any]], None]) -> Edit:
    """The bucket as it is, but for its messages."""

    def edit(name: str, document: Any) -> Any:
        if document is not None and "messages" in document:
            document = copy.deepcopy(document)
            messages(document["messages"])
        return document

    return edit


def truncated(*, keep_checkpoint: bool) -> Edit:
    def edit(name: str, document: Any) -> Any:
        if name == "subfeed.json" and document is not None:
            kept = {"checkpoint": document["checkpoint"]} if keep_checkpoint else {}
            return {"messageCount": 4, **kept}
        return document

    return edit


def set_text(envelopes: list[Any]) -> None:
    envelopes[5]["body"]["message"] = {"text": "forged"}


def swap(envelopes: list[Any]) -> None:
    envelopes[4], envelopes[5] = envelopes[5], envelopes[4]


def drop(envelopes: list[Any]) -> None:
    del envelopes[5]


def cut_signature(envelopes: list[Any]) -> None:
    envelopes[5]["signature"] = envelopes[5]["signature"][:-2]


def other_signature(envelopes: list[Any]) -> None:
    envelopes[5]["signature"] = envelopes[4]["signature"]


def high_s(envelopes: list[Any]) -> None:
    """S + L, which lenient verifiers take."""
    order = 2**252 + 27742317777372353535851937790883648493
    raw = bytes.fromhex(envelopes[5]["signature"])
    s = int.from_bytes(raw[32:], "little") + order
    envelopes[5]["signature"] = (raw[:32] + s.to_bytes(32, "little")).hex()


@dataclass
class Case:
    """One lie about a feed of ten messages. `edit`: what the bucket says, given the place and the feed. The names of
    guards without which it goes unnoticed."""

    name: str
    edit: Callable[[Place, str], Edit]
    noticed_by: tuple[str, ...]
    feed: str = ""
    problem: str | None = None
    stored: list[Any] = field(default_factory=list)


def forked(place: Place, feed: str, at: int, *, vouched: bool) -> Edit:
    key, true = place.key(feed), place.signed(feed)
    other = true[:at] + chain(key, true[:at], [{"text": f"forged {n}"} for n in range(at, 10)])
    return serving(other, checkpoint(key, SUBFEED, other) if vouched else None)


def other_subfeed(place: Place, feed: str, *, vouched: bool) -> Edit:
    place.append(feed, [{"text": f"forged {n}"} for n in range(10)], OTHER)
    moved = place.signed(feed, OTHER)
    return serving(moved, checkpoint(place.key(feed), OTHER, moved) if vouched else None)


def forged_checkpoint(place: Place, feed: str) -> Edit:
    def edit(name: str, document: Any) -> Any:
        if name == "subfeed.json" and document is not None:
            document = {**document, "checkpoint": {**document["checkpoint"], "count": 11}}
        return document

    return edit


CHAIN, WORD = ("any_message",), ("no_checkpoints",)


def cases() -> list[Case]:
    return [
        Case("a message is edited", lambda *_: change(set_text), CHAIN),
        Case("two messages are swapped", lambda *_: change(swap), CHAIN),
        Case("a message is left out", lambda *_: change(drop), CHAIN),
        Case("a signature is cut", lambda *_: change(cut_signature), ()),
        Case("a signature is another message's", lambda *_: change(other_signature), CHAIN),
        Case("a signature has S + L", lambda *_: change(high_s), CHAIN),
        Case("the end is held back", lambda *_: truncated(keep_checkpoint=True), WORD),
        Case("the end is held back, and the checkpoint", lambda *_: truncated(keep_checkpoint=False), WORD),
        Case("forked, with its checkpoint", lambda place, feed: forked(place, feed, 3, vouched=True), WORD),
        Case("forked, without checkpoint", lambda place, feed: forked(place, feed, 3, vouched=False), WORD),
        Case("forked from the start", lambda place, feed: forked(place, feed, 0, vouched=True), WORD),
        Case("another subfeed's, with checkpoint", lambda place, feed: other_subfeed(place, feed, vouched=True), WORD),
        Case("another subfeed's", lambda place, feed: other_subfeed(place, feed, vouched=False), WORD),
        Case("a checkpoint is forged", forged_checkpoint, WORD),
    ]


def read(place: Place, case: Case, seconds: float) -> None:
    """Follow the feed until something is said to be wrong."""
    until = time.monotonic() + seconds
    while case.problem is None and time.monotonic() < until:
        position = place.beta.post("/feed/getNumLocalMessages", {"feedId": case.feed, "subfeedHash": SUBFEED}).json()[
            "numMessages"
        ]
        watch = {"feedId": case.feed, "subfeedHash": SUBFEED, "position": position, "channelName": CHANNEL}
        answer = place.beta.post("/feed/watchForNewMessages", {"subfeedWatches": {"w": watch}, "waitMsec": 1000})
        assert answer.status == 200, answer.body
        case.problem = answer.json().get("problems", {}).get("w")
    case.stored = messages_of(place.beta, case.feed, SUBFEED, signed=True)


def tell(place: Place, told: list[Case], seconds: float) -> None:
    """Every lie at once, each about a feed of its own."""
    for case in told:
        case.feed = place.create()
        place.append(case.feed, texts(10))
    for case in told:
        place.lying.edits[case.feed] = case.edit(place, case.feed)
    readers = [threading.Thread(target=read, args=(place, case, seconds)) for case in told]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def test_every_lie_is_noticed(make_place: Callable[..., Place]) -> None:
    place = make_place()
    honest = place.create()
    place.append(honest, texts(10))
    told = cases()
    tell(place, told, 60)
    missed = [case.name for case in told if case.problem is None]
    assert missed == []
    assert "feed_refused" in place.beta.log
    wrong = 0
    for case in told:
        # Whatever was kept is a history that the feed's key signed, whole up to its end.
        kept = accept_chain(FeedId(case.feed), 0, None, [parse_signed_message(one) for one in case.stored])
        assert len(kept) == len(case.stored)
        if "any_message" in case.noticed_by or not case.noticed_by:
            wrong += case.stored != place.signed(case.feed)[: len(case.stored)]
    assert wrong == 0
    # The same watch of a feed that nobody touched.
    case = Case("none", lambda *_: change(lambda _: None), (), feed=honest)
    reader = threading.Thread(target=read, args=(place, case, 12))
    reader.start()
    reader.join()
    assert case.problem is None and case.stored == place.signed(honest)
    report("J5", len(told), detected=len(told), of=len(told), wrong_stored=wrong, honest_reported=0)


@pytest.mark.parametrize("guard", ["any_message", "no_checkpoints"])
def test_control_without_a_guard_lies_get_in(make_place: Callable[..., Place], guard: str) -> None:
    place = make_place(prefix=without(guard))
    told = [case for case in cases() if guard in case.noticed_by]
    tell(place, told, 14)
    unnoticed = [case.name for case in told if case.problem is None]
    wrong = [case.name for case in told if case.stored != place.signed(case.feed)]
    report(f"J5 control {guard}", len(told), unnoticed=unnoticed, wrong_stored=wrong)
    assert unnoticed and wrong


# -- what a member makes of it ----------------------------------------------------------------------------------------


def test_a_members_forgeries_are_not_kept(make_place: Callable[..., Place]) -> None:
    """J4: messages on the band from a member that may provide feeds and does not have this one's key."""
    place = make_place()
    feed = place.create()
    place.append(feed, texts(3))
    case = Case("none", lambda *_: change(lambda _: None), (), feed=feed)
    watcher = threading.Thread(target=read, args=(place, case, 25))
    watcher.start()
    time.sleep(2)
    true = place.signed(feed)
    mallory = PrivateKey.generate()
    forged: list[Any] = [
        chain(mallory, true, texts(1, 3)),
        chain(mallory, [], texts(1)),
        [{**chain(mallory, true, texts(1, 3))[0], "signature": true[2]["signature"]}],
        [{**chain(mallory, true, texts(1, 3))[0], "signature": "0" * 128}],
        [{**chain(mallory, true, texts(1, 3))[0], "signature": ("01" + "00" * 31) * 2}],
    ]
    wrong_checkpoint = {**checkpoint(mallory, SUBFEED, chain(mallory, [], texts(4))), "feedId": feed}
    subfeed = {"feedId": feed, "subfeedHash": SUBFEED}
    with HostileMember(place.lab.stranger()) as member:
        member.publish(
            [
                *({"type": "newSubfeedMessages", **subfeed, "messages": messages} for messages in forged),
                {"type": "subfeedCheckpoint", **wrong_checkpoint},
                {"type": "numSubfeedMessagesUploaded", **subfeed, "numMessages": 1000},
            ],
            "provideFeeds",
        )
        member.listen(1)
        assert member.refused == []
    watcher.join()
    assert case.problem is not None
    # What is true comes through all the same.
    place.append(feed, texts(1, 3))
    follow = Case("none", lambda *_: change(lambda _: None), (), feed=feed)
    read(place, follow, 3)
    until = time.monotonic() + 20
    while len(messages_of(place.beta, feed, SUBFEED)) < 4 and time.monotonic() < until:
        follow.problem = None
        read(place, follow, 1)
    assert messages_of(place.beta, feed, SUBFEED, signed=True) == place.signed(feed)
    report("J4 on a band", len(forged) + 2, accepted_wrongly=0)
