"""C3: several processes append to one subfeed while the server is killed under them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kachery_lab.core.feeds import SubfeedHead, accept_chain, parse_signed_message
from kachery_lab.core.ids import FeedId
from tests.faults.report import histogram, messages_of, report, without
from tests.servers import RunningNode

Make = Callable[..., RunningNode]
SUBFEED = "c" * 40
WRITERS = 8

# A writer with nothing but the standard library: `expectedPosition` says what it believes, a 409 what is true. An
# answer that never came is settled by looking at the message that lies where its own would be.
WRITER = r"""
import http.client, json, sys, time
port, token, feed, subfeed, me, total = sys.argv[1:7]
total = int(total)
connection = None

def call(path, body):
    global connection
    if connection is None:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
    try:
        connection.request("POST", path, json.dumps(body),
                           {"Content-Type": "application/json", "Authorization": "Bearer " + token})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        connection.close()
        connection = None
        return None

def message_at(position):
    watch = {"w": {"feedId": feed, "subfeedHash": subfeed, "position": position, "channelName": "chan"}}
    while True:
        found = call("/feed/watchForNewMessages", {"subfeedWatches": watch, "waitMsec": 0, "maxNumMessages": 1})
        if found is not None and found[0] == 200:
            return (found[1]["messages"].get("w") or [None])[0]
        time.sleep(0.05)

position, done, unsure = 0, 0, False
while position < total:
    mine = {"writer": me, "number": done, "at": position}
    found = call("/feed/appendMessages",
                 {"feedId": feed, "subfeedHash": subfeed, "messages": [mine], "expectedPosition": position})
    if found is None:
        print(json.dumps(["lost", position]), flush=True)
        unsure = True
        time.sleep(0.05)
        continue
    status, answer = found
    if status == 200:
        print(json.dumps(["ack", answer["position"], mine]), flush=True)
        position, done = answer["position"] + 1, done + 1
    elif status == 409:
        print(json.dumps(["conflict", position, answer["code"], answer["numMessages"], answer["headSignature"]]),
              flush=True)
        if unsure and message_at(position) == mine:
            print(json.dumps(["ack", position, mine]), flush=True)
            done += 1
        position = answer["numMessages"]
    else:
        print(json.dumps(["other", status, str(answer)]), flush=True)
        sys.exit(1)
    unsure = False
"""


def kill_three_times(node: RunningNode, total: int, feed: str, ended: threading.Event) -> list[int]:
    """Kill and start the server whenever another quarter of the messages is there; how many were there each time."""
    killed = []
    for share in (1, 2, 3):
        while not ended.is_set():
            found = node.post(
                "/feed/getNumLocalMessages", {"feedId": feed, "subfeedHash": SUBFEED}, auth=node.admin_token
            )
            if found.json()["numMessages"] >= total * share // 4:
                killed.append(found.json()["numMessages"])
                node.kill()
                node.start()
                break
            time.sleep(0.02)
    return killed


def race(node: RunningNode, total: int) -> tuple[str, list[list[Any]], list[int]]:
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(node.port), node.admin_token, feed, SUBFEED, str(number), str(total)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(WRITERS)
    ]
    lines: list[str] = []

    def read(writer: subprocess.Popen[str]) -> None:
        assert writer.stdout is not None
        with writer.stdout:
            lines.extend(writer.stdout)

    threads = [threading.Thread(target=read, args=(writer,)) for writer in writers]
    ended = threading.Event()
    for thread in threads:
        thread.start()
    try:
        killed = kill_three_times(node, total, feed, ended)
        for thread in threads:
            thread.join(100)
    finally:
        ended.set()
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0] * WRITERS, lines[-5:]
    return feed, [json.loads(line) for line in lines], killed


def check(node: RunningNode, total: int) -> None:
    feed, events, killed = race(node, total)
    stored = messages_of(node, feed, SUBFEED, signed=True)
    bodies = [message["body"]["message"] for message in stored]
    acked = {event[1]: event[2] for event in events if event[0] == "ack"}
    kinds = Counter(event[0] for event in events)

    assert kinds["other"] == 0
    assert kinds["ack"] == len(acked), "one position was given to two writers"
    lost = [position for position, body in acked.items() if bodies[position : position + 1] != [body]]
    assert lost == []
    texts = Counter(json.dumps(body, sort_keys=True) for body in bodies)
    assert max(texts.values()) == 1, "a message was stored twice"
    assert len(stored) >= total and len(killed) == 3
    # Each message was made for the place where it lies, so nothing was appended behind a neighbour that its writer
    # had not seen.
    assert [body["at"] for body in bodies] == list(range(len(stored)))

    chain = accept_chain(FeedId.parse(feed), 0, None, [parse_signed_message(message) for message in stored])
    assert [message.position for message in chain] == list(range(len(stored)))
    assert SubfeedHead().extended(chain).num_messages == len(stored)
    conflicts = [event for event in events if event[0] == "conflict"]
    assert conflicts
    signatures = [message["signature"] for message in stored]
    for _, expected, code, number, head in conflicts:
        assert code == "feed_position" and number > expected
        assert head == signatures[number - 1]

    node.kill()
    node.start()
    assert messages_of(node, feed, SUBFEED, signed=True) == stored
    report(
        "C3",
        len(acked),
        acked=len(acked),
        stored=len(stored),
        lost=len(lost),
        duplicates=0,
        forks=0,
        conflicts=len(conflicts),
        answers_lost=kinds["lost"],
        kills=len(killed),
    )


def test_one_writer_wins_each_place(make_node: Make) -> None:
    check(make_node().start(), 400)


@pytest.mark.slow
def test_one_writer_wins_each_of_2000_places(make_node: Make) -> None:
    check(make_node().start(), 2000)


def two_writers_of_one_mind(node: RunningNode) -> tuple[list[int], list[Any]]:
    """Statuses of two appends that expect the same position, and what is stored then."""
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    statuses = []
    for number in (0, 1):
        body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"n": number}], "expectedPosition": 0}
        statuses.append(node.post("/feed/appendMessages", body).status)
    return statuses, messages_of(node, feed, SUBFEED)


def test_control_without_the_position_both_win(make_node: Make) -> None:
    assert two_writers_of_one_mind(make_node("guarded").start()) == ([200, 409], [{"n": 0}])
    statuses, stored = two_writers_of_one_mind(make_node(prefix=without("no_position")).start())
    assert (statuses, stored) == ([200, 200], [{"n": 0}, {"n": 1}])
    report("C3 control no_position", 2, wrong=1, status_histogram=histogram(statuses))
