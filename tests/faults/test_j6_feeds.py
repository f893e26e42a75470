"""J6, C3, C5, S6, S7 of feeds between nodes: long ones, many who follow, lost answers, tickets that are used twice."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signatures import sign_2021
from tests.faults.feeds import SUBFEED, append, count, create, follow_until, memory, watch_body
from tests.faults.hostile import HostileMember
from tests.faults.lying_hub import LyingHub
from tests.faults.report import Client, histogram, messages_of, report, wait_for, without
from tests.federations import CHANNEL, Federation, SignedRequests, federate, node_id
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]


# -- J6: long feeds, large messages, many who subscribe ----------------------------------------------------------------


def median_append(client: Client, feed: str) -> float:
    """Milliseconds of one append with one message."""
    found = []
    for number in range(40):
        begun = time.perf_counter()
        body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"n": number}]}
        assert client.post("/feed/appendMessages", body).status == 200
        found.append((time.perf_counter() - begun) * 1000)
    return statistics.median(found)


def long_feed(make_node: Make, total: int) -> None:
    lab = federate(make_node, "alpha", "beta")
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    feed, client = create(alpha), Client(alpha)
    append(alpha, feed, [{"n": n} for n in range(10)])
    short = median_append(client, feed)
    for start in range(0, total, 10_000):
        texts = [{"n": n, "text": "x" * 60} for n in range(start, min(start + 10_000, total))]
        assert append(alpha, feed, texts).status == 200
    before = memory(beta)
    size = count(alpha, feed)
    seconds = follow_until(beta, feed, size, 300)
    added = (memory(beta) - before) / (1 << 20)
    ends = [messages_of(node, feed, SUBFEED, signed=True, position=size - 3) for node in (alpha, beta, lab.hub)]
    assert ends[0] == ends[1] == ends[2]
    puts = lab.puts()
    # When nobody is catching up any more.
    long = median_append(client, feed)
    report(
        "J6 long",
        size,
        append_p50_ms_at_10=round(short, 2),
        append_p50_ms_at_the_end=round(long, 2),
        caught_up_seconds=round(seconds, 1),
        uploads=puts,
        memory_added_mib=round(added),
    )
    assert long < 3 * short + 2
    assert puts <= size / 500
    assert added < 100


def test_a_feed_of_10_000(make_node: Make) -> None:
    long_feed(make_node, 10_000)


def test_a_feed_of_100_000(make_node: Make) -> None:
    long_feed(make_node, 100_000)


def test_a_message_of_1_mib_travels_and_the_cap_is_413(make_node: Make) -> None:
    lab = federate(make_node, "alpha", "beta", KACHERY_LAB_MAX_JSON="2MB")
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    feed = create(alpha)
    statuses = [append(alpha, feed, [{"text": "x" * size}]).status for size in (1 << 20, 2_100_000, 1 << 20)]
    assert statuses == [200, 413, 200]
    follow_until(beta, feed, 2, 30)
    assert messages_of(beta, feed, SUBFEED, signed=True) == messages_of(alpha, feed, SUBFEED, signed=True)
    report("J6 1 MiB", len(statuses), status_histogram=histogram(statuses))


def uploads_for(lab: Federation, subscribers: int) -> tuple[int, int]:
    """(Uploads, answers on the band) when so many subscribe to one feed at once."""
    alpha = lab.members["alpha"]
    feed = create(alpha)
    assert append(alpha, feed, [{"n": n} for n in range(50)]).status == 200
    before = lab.puts()
    body = {"type": "subscribeToSubfeed", "feedId": feed, "subfeedHash": SUBFEED, "position": 0}
    with HostileMember(lab.stranger()) as member:
        member.subscribe("provideFeeds")
        member.publish([body] * subscribers, "requestFeeds")
        told = [found for found in member.listen(6) if found["type"] == "numSubfeedMessagesUploaded"]
    assert told and all(found["numMessages"] == 50 for found in told)
    return lab.puts() - before, len(told)


def test_uploaded_once_however_many_subscribe(make_node: Make) -> None:
    lab = federate(make_node, "alpha")
    uploads, answers = uploads_for(lab, 100)
    assert uploads == 1 and answers <= 5
    alpha = lab.members["alpha"]
    assert alpha.terminate() == 0
    alpha.prefix = without("provide_each_time")
    alpha.log_path.unlink()
    alpha.start()
    lab.settle(alpha)
    unguarded, _ = uploads_for(lab, 100)
    report("J6 uploads", 100, uploads=uploads, answers=answers, control_provide_each_time=unguarded)
    assert unguarded > 1


# -- C3: several who append, several who follow, with kills ------------------------------------------------------------


def test_everybody_has_every_message_once(make_node: Make) -> None:
    lab = federate(make_node, "alpha", "beta", "gamma")
    alpha, beta, gamma = (lab.members[name] for name in ("alpha", "beta", "gamma"))
    feed, total, writers = create(alpha), 400, 4
    acked: list[int] = []

    def write(number: int) -> None:
        client = Client(alpha)
        for own in range(total // writers):
            text = {"writer": number, "own": own}
            body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [text], "requestId": f"{number}-{own}"}
            assert client.post("/feed/appendMessages", body).status == 200
            acked.append(number)
            time.sleep(0.06)

    ended = threading.Event()

    def follow(node: RunningNode) -> None:
        while not ended.is_set():
            try:
                node.post("/feed/watchForNewMessages", watch_body(feed, count(node, feed), 1000))
            except (OSError, ValueError, FileNotFoundError):
                time.sleep(0.2)

    followers = [threading.Thread(target=follow, args=(node,)) for node in (lab.hub, beta, gamma)]
    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in (*followers, *threads):
        thread.start()
    try:
        for node in (beta, lab.hub):
            time.sleep(1)
            node.kill()
            node.start()
        for thread in threads:
            thread.join()
        healed = time.monotonic()
        for node in (beta, gamma, lab.hub):
            wait_for(lambda node=node: count(node, feed) == total, "every message is there", 40)  # type: ignore[misc]
        seconds = time.monotonic() - healed
    finally:
        ended.set()
        for thread in followers:
            thread.join()
    true = messages_of(alpha, feed, SUBFEED, signed=True)
    copies = [messages_of(node, feed, SUBFEED, signed=True) for node in (beta, gamma, lab.hub)]
    texts = {json.dumps(message["body"]["message"], sort_keys=True) for message in true}
    report(
        "C3 across nodes",
        total,
        acked=len(acked),
        stored=len(true),
        duplicates=len(true) - len(texts),
        forks=sum(copy != true for copy in copies),
        kills=2,
        seconds_after=round(seconds, 1),
    )
    assert len(acked) == len(true) == len(texts) == total
    assert copies == [true] * 3
    assert seconds < 30


# -- C5: the answer to an upload is lost -------------------------------------------------------------------------------


def lost_answers(make_node: Make, prefix: Any = ()) -> tuple[int, int]:
    """(Messages at the hub, lost answers): each upload's first answer is lost."""
    hub = make_node("hub", prefix=prefix).start()
    lab = Federation(hub, {})
    lab.make_channel(CHANNEL)
    with LyingHub(hub) as lying:
        lying.lose = {"PUT"}
        alpha = make_node("alpha", env={"KACHERY_LAB_HUB_URL": lying.url}).start()
        beta = make_node("beta", env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{hub.port}"}).start()
        for node in (alpha, beta):
            lab.approve(node_id(node))
            lab.join(node)
        lab.settle(alpha, beta)
        feed = create(alpha)
        for start in range(0, 9, 3):
            assert append(alpha, feed, [{"n": n} for n in range(start, start + 3)]).status == 200
            beta.post("/feed/watchForNewMessages", watch_body(feed, count(beta, feed), 1000))
            wait_for(lambda start=start: count(hub, feed) >= start + 3, "uploaded", 30)  # type: ignore[misc]
        time.sleep(4)
        return count(hub, feed), lying.lost


def test_a_lost_answer_doubles_nothing(make_node: Make) -> None:
    stored, lost = lost_answers(make_node)
    report("C5 feeds", lost, stored=stored, duplicates=stored - 9)
    assert stored == 9 and lost > 0


# -- S6, S7: tickets ---------------------------------------------------------------------------------------------------


def envelopes(key: PrivateKey, texts: list[str]) -> list[Any]:
    found: list[Any] = []
    for number, text in enumerate(texts):
        body = {"message": {"text": text}, "messageNumber": number, "timestamp": 1_700_000_000_000}
        if found:
            body["previousSignature"] = found[-1]["signature"]
        found.append({"body": body, "signature": sign_2021(key, canonical_2021(body))})
    return found


def ticket(member: SignedRequests, feed: str, end: int, size: int) -> Any:
    body = {"feedId": feed, "subfeedHash": SUBFEED, "start": 0, "end": end, "size": size}
    return member.request("POST", f"/api/v1/channels/{CHANNEL}/feeds", body)


def put(hub: RunningNode, url: str, data: bytes) -> int:
    path = "/" + url.split("/", 3)[3]
    return hub.request("PUT", path, data, {"Content-Type": "application/octet-stream"}, auth=False).status


def test_a_ticket_twice_changes_nothing(make_node: Make) -> None:
    lab = federate(make_node)
    member, key = lab.stranger(), PrivateKey.generate()
    data = json.dumps({"messages": envelopes(key, ["a", "b"])}).encode()
    other = json.dumps({"messages": envelopes(key, ["a", "c"])}).encode()
    answer = ticket(member, key.public_hex, 2, len(data))
    assert answer.status == 200
    url = answer.json()["url"]
    statuses = [put(lab.hub, url, data) for _ in range(3)]
    lab.hub.kill()
    lab.hub.start()
    statuses.append(put(lab.hub, url, data))
    assert statuses == [200] * 4
    refused = [put(lab.hub, url, other), put(lab.hub, url, data[:-1]), put(lab.hub, url, b"{" + b" " * (len(data) - 1))]
    assert refused == [409, 422, 422]
    assert [m["text"] for m in messages_of(lab.hub, key.public_hex, SUBFEED)] == ["a", "b"]
    report("S6 feeds", len(statuses) + len(refused), replays_with_effect=0, status_histogram=histogram(refused))


def revoked_on_the_way(lab: Federation) -> tuple[int, int]:
    """(Status of an upload whose right is taken away when half of it is sent, messages stored)."""
    member, key = lab.stranger(f"odd{time.monotonic_ns() % 10_000}"), PrivateKey.generate()
    data = json.dumps({"messages": envelopes(key, ["a" * 200_000])}).encode()
    url = ticket(member, key.public_hex, 1, len(data)).json()["url"]

    def halves() -> Any:
        yield data[: len(data) // 2]
        lab.grant(member.id)
        yield data[len(data) // 2 :]

    path = "/" + url.split("/", 3)[3]
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(data))}
    status = lab.hub.request("PUT", path, halves(), headers, auth=False).status
    return status, count(lab.hub, key.public_hex)


def test_control_without_comparing_a_repeat_doubles(make_node: Make) -> None:
    """C5: the same upload twice."""
    lab = Federation(make_node("bare", prefix=without("take_again")).start(), {})
    lab.make_channel(CHANNEL)
    member, key = lab.stranger(), PrivateKey.generate()
    data = json.dumps({"messages": envelopes(key, ["a", "b"])}).encode()
    url = ticket(member, key.public_hex, 2, len(data)).json()["url"]
    statuses = [put(lab.hub, url, data) for _ in range(2)]
    stored = count(lab.hub, key.public_hex)
    report("C5 feeds control take_again", 2, stored=stored, duplicates=stored - 2)
    assert statuses == [200, 200] and stored == 4


def test_a_right_that_goes_during_an_upload(make_node: Make) -> None:
    guarded = revoked_on_the_way(federate(make_node))
    assert guarded == (403, 0)
    lab = Federation(make_node("bare", prefix=without("no_feed_recheck")).start(), {})
    lab.make_channel(CHANNEL)
    control = revoked_on_the_way(lab)
    report("S7 feeds", 2, bypass=guarded[1], control_no_feed_recheck=control[1])
    assert control == (200, 1)
    # Without the role there is no ticket at all, and the refusal names it.
    member = lab.stranger("other", "requestFeeds")
    refused = ticket(member, PrivateKey.generate().public_hex, 1, 100)
    assert refused.status == 403 and "provideFeeds" in refused.json()["detail"] and CHANNEL in refused.json()["detail"]
