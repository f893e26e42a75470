"""F1: SIGKILL before each system call of a request. What was acknowledged stays, nothing wrong gets a name."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.hashing import CHUNK_SIZE
from kachery_lab.core.manifests import manifest_bytes
from tests.faults.report import report, wait_for
from tests.faults.tools import (
    SUBFEED,
    SYSTEM_CALLS,
    Ledger,
    Point,
    append,
    blob_symbols,
    create_feed,
    killed_at,
    leftovers,
    link_body,
    need_strace,
    next_draft,
    points,
    restart,
    sha1_of,
    strace,
    without,
    wrong_bytes,
)
from tests.servers import Answer, RunningNode, blob_path

SMALL = 4096
LARGE = 45_000_000
WORKERS = 2
ONCE = ("{storage}", "{storage}/sha1", "{storage}/sha1-trash", "{metadata}")
"""Directories that a server looks after once: the repeated request of the trial before did it."""


@dataclass
class Attempt:
    """One request: the symbols of the paths it touches, how to send it, and what its acknowledgement means."""

    symbols: dict[str, str]
    send: Callable[[], Answer]
    acked: Callable[[Answer], None]
    undo: Callable[[], None] = lambda: None


@dataclass
class Bench:
    """A server that is killed again and again, and what it acknowledged."""

    node: RunningNode
    directory: Path
    ledger: Ledger = field(default_factory=Ledger)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    feed_id: str = ""


Make = Callable[[Bench], Attempt]
_LARGE_BYTES = os.urandom(LARGE)


def store(size: int) -> Make:
    def make(bench: Bench) -> Attempt:
        node = bench.node
        data = os.urandom(32) + _LARGE_BYTES[32:size]
        sha1 = sha1_of(data)
        symbols = blob_symbols(node.storage, sha1)
        manifest = None
        if size > CHUNK_SIZE:
            chunks = [
                (start, min(start + CHUNK_SIZE, size), sha1_of(data[start : start + CHUNK_SIZE]))
                for start in range(0, size, CHUNK_SIZE)
            ]
            text = manifest_bytes(size, sha1, chunks)
            manifest = sha1_of(text)
            symbols |= blob_symbols(node.storage, manifest, "m.")

        def acked(answer: Answer) -> None:
            found = answer.json()
            assert (found["sha1"], found["manifestSha1"]) == (sha1, manifest), found
            bench.ledger.store(sha1, size)
            if manifest is not None:
                bench.ledger.store(manifest, len(text))

        def undo() -> None:
            """Many large blobs would fill the disk and be hashed at every check."""
            if size > SMALL:
                gone = node.request("DELETE", f"/api/v1/blobs/{sha1}", auth=node.admin_token)
                if gone.status == 204:
                    bench.ledger.delete(sha1)
                    shutil.rmtree(node.storage / "sha1-trash", ignore_errors=True)

        return Attempt(symbols, lambda: node.store(data), acked, undo)

    return make


def append_message(bench: Bench) -> Attempt:
    message = {"n": next(bench.numbers)}
    bench.ledger.unknown_messages.append(message)

    def acked(answer: Answer) -> None:
        bench.ledger.append(bench.feed_id, SUBFEED, answer.json()["position"], [message])

    body = {"requestId": f"append-{message['n']}"}
    return Attempt({}, lambda: append(bench.node, bench.feed_id, [message], **body), acked)


def set_mutable(bench: Bench) -> Attempt:
    value = {"n": next(bench.numbers)}
    bench.ledger.unknown_mutables["key"] = value
    return Attempt(
        {},
        lambda: bench.node.post("/mutable/set", {"key": "key", "value": value}),
        lambda _: bench.ledger.set("key", value),
    )


def link_file(bench: Bench) -> Attempt:
    path = bench.directory / f"linked-{next(bench.numbers)}"
    data = os.urandom(SMALL)
    path.write_bytes(data)
    # Whether its bytes are stored is looked up before.
    symbols = {str(blob_path(bench.node.storage, sha1_of(data))): "{blob}"}
    return Attempt(
        symbols | blob_symbols(bench.node.storage, sha1_of(data), suffix=".link"),
        lambda: bench.node.post("/linkFile", link_body(path)),
        lambda _: bench.ledger.link(sha1_of(data), path),
    )


def delete_blob(bench: Bench) -> Attempt:
    data = os.urandom(SMALL)
    sha1 = sha1_of(data)
    assert bench.node.store(data).status == 200
    assert bench.node.request("GET", f"/api/v1/blobs/{sha1}", auth=bench.node.admin_token).status == 200

    def send() -> Answer:
        answer = bench.node.request("DELETE", f"/api/v1/blobs/{sha1}", auth=bench.node.admin_token)
        # Said again after a kill, the deletion may have been complete.
        return Answer(204, {}, b"") if answer.status == 404 else answer

    symbols = blob_symbols(bench.node.storage, sha1)
    symbols |= blob_symbols(bench.node.storage, sha1, "t.", below="sha1-trash")
    symbols[f"{blob_path(bench.node.storage, sha1)}.link"] = "{link}"
    return Attempt(symbols, send, lambda _: bench.ledger.delete(sha1))


REQUESTS: dict[str, Make] = {
    "store 4 KiB": store(SMALL),
    "store 45 MB": store(LARGE),
    "append": append_message,
    "mutable set": set_mutable,
    "linkFile": link_file,
    "delete blob": delete_blob,
}


def traced_points(bench: Bench, make: Make) -> list[Point]:
    """The points of a request to a server that was started a moment ago, as the killed ones are."""
    attempt = make(bench)
    attempt.symbols |= draft_symbols(bench.node)
    log = bench.directory / "trace"
    with strace(bench.node, log, "-e", f"trace={SYSTEM_CALLS}"):
        answer = attempt.send()
    assert answer.status in (200, 204), answer.body
    attempt.acked(answer)
    attempt.undo()
    return points(log, attempt.symbols, [bench.node.storage, bench.node.metadata])


def draft_symbols(node: RunningNode) -> dict[str, str]:
    first = next_draft(node)
    stem, number, _ = first.rsplit(".", 2)
    return {first: "{draft}", f"{stem}.{int(number) + 1}.tmp": "{m.draft}"}


def kill_at(bench: Bench, make: Make, point: Point, *, again: bool) -> bool:
    """One trial: killed at the point, started again, everything compared. False when the point was not reached, which
    only a repeated call may be: how many pages a commit has, and which thread takes a piece or flushes a directory,
    varies, and calls are counted in each thread by itself."""
    node, ledger = bench.node, bench.ledger
    if point.path in ONCE:
        node.kill()
        restart(node)
    attempt = make(bench)
    if point.path.endswith("draft}"):
        attempt.symbols |= draft_symbols(node)
    place = {symbol: path for path, symbol in attempt.symbols.items()}.get(point.path, point.path)
    place = place.replace("{storage}", str(node.storage)).replace("{metadata}", str(node.metadata))
    answer = None
    with killed_at(node, bench.directory / "kill", point, place):
        answer = attempt.send()
    if answer is not None:
        assert point.number > 1, f"{point} was not reached"
        assert answer.status in (200, 204), (point, answer.body)
        attempt.acked(answer)
        attempt.undo()
        return False
    restart(node)
    assert leftovers(node.storage) == [], point
    found = ledger.check(node)
    assert not found, (point, found)
    if again:
        # The same request before was not answered; now it is.
        answer = attempt.send()
        assert answer.status in (200, 204), (point, answer.body)
        attempt.acked(answer)
        found = ledger.check(node)
        assert not found, (point, found)
        attempt.undo()
    elif attempt.undo is not None:
        attempt.undo()
    return True


def relative(point: Point, node: RunningNode) -> Point:
    """The point with symbols for the directories of one server, so that another one can be killed there."""
    path = point.path.replace(str(node.storage), "{storage}", 1).replace(str(node.metadata), "{metadata}", 1)
    return Point(point.call, path, point.number)


def run_row(
    make_node: Callable[..., RunningNode], tmp_path: Path, name: str, choose: Callable[[list[Point]], list[Point]]
) -> None:
    """Trace once, then kill at each chosen point, on two servers side by side."""
    need_strace()
    make = REQUESTS[name]

    def bench(number: int) -> Bench:
        directory = tmp_path / f"bench-{number}"
        directory.mkdir()
        made = Bench(make_node(f"bench-{number}/node").start(), directory)
        made.feed_id = create_feed(made.node)
        # As in the trials: a server that was killed and started again.
        made.node.kill()
        restart(made.node)
        return made

    benches = [bench(number) for number in range(WORKERS)]
    found = [relative(point, benches[0].node) for point in traced_points(benches[0], make)]
    chosen = choose(found)
    for point in chosen:
        print(point)

    def work(number: int) -> int:
        mine = list(enumerate(chosen))[number::WORKERS]
        return sum(
            kill_at(benches[number], make, point, again=name != "store 45 MB" or index % 4 == 0)
            for index, point in mine
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        hits = sum(pool.map(work, range(WORKERS)))
    report(
        f"F1 {name}",
        len(chosen),
        killed=hits,
        points_seen=len(found),
        acked=sum(bench.ledger.acked for bench in benches),
        lost=0,
        wrong=0,
        temporary_files_left=0,
    )
    assert hits > len(chosen) * 0.8
    for made in benches:
        shutil.rmtree(made.node.storage / "sha1-trash", ignore_errors=True)


def one_of_many(found: list[Point]) -> list[Point]:
    """Every call that changes something, on every path; of calls that a thread repeats on a path, the first, a middle
    and the last. Opening a directory changes nothing: a kill there is the kill at the flush that follows. How a blob
    that is in memory, as the manifest is, gets its directories is the 4 KiB store's to show."""
    last = {(point.call, point.path): point.number for point in sorted(found)}
    kept = []
    for point in found:
        directory = point.call == "openat" and not point.path.endswith("draft}")
        if directory or (point.path.startswith("{m.") and point.call in ("mkdir", "openat", "fchmod")):
            continue
        count = last[point.call, point.path]
        if point.path.endswith("draft}") and point.call == "write":
            # Two threads share the pieces, not always evenly.
            if point.number in (1, 5, max(1, count // 2)):
                kept.append(point)
        elif point.number in (1, (count + 1) // 2, count):
            kept.append(point)
    return kept


def thinned(found: list[Point]) -> list[Point]:
    """What differs from a store: the calls on logs, links and the trash, and the commit. How directories are made is
    the store's to show."""
    parents = ("aa}", "bb}", "{storage}", "{storage}/sha1", "{storage}/sha1-trash", "{metadata}")
    return [
        point
        for point in one_of_many(found)
        if point.call not in ("openat", "fchmod", "mkdir") and not point.path.endswith(parents)
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("store 4 KiB", list),
        ("store 45 MB", one_of_many),
        pytest.param("append", thinned, marks=pytest.mark.slow),
        pytest.param("mutable set", thinned, marks=pytest.mark.slow),
        pytest.param("linkFile", thinned, marks=pytest.mark.slow),
        pytest.param("delete blob", thinned, marks=pytest.mark.slow),
    ],
)
def test_kill_at_system_calls(make_node: Any, tmp_path: Path, name: str, choose: Any) -> None:
    run_row(make_node, tmp_path, name, choose)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", REQUESTS)
def test_kill_at_every_system_call(make_node: Any, tmp_path: Path, name: str) -> None:
    run_row(make_node, tmp_path, name, list)


def test_control_final_name_first(make_node: Any, tmp_path: Path) -> None:
    """Without the order, a kill leaves wrong bytes under a final name: the row can fail."""
    need_strace()
    node = make_node(prefix=without("final_name_first")).start()
    data = os.urandom(SMALL)
    assert node.store(os.urandom(SMALL)).status == 200
    point = Point("write", str(blob_path(node.storage, sha1_of(data))), 2)
    with killed_at(node, tmp_path / "kill", point, point.path):
        node.store(data)
        pytest.fail("the server was not killed")
    wrong = wrong_bytes(node.storage)
    report("F1 control: final name first", 1, wrong=len(wrong))
    assert [path.name for path in wrong] == [sha1_of(data)]


def test_control_no_sweep(make_node: Any, tmp_path: Path) -> None:
    """Without the sweep a killed store leaves its draft for ever; with it the next start removes it."""
    need_strace()
    node = make_node(prefix=without("no_sweep")).start()
    point = Point("fsync", next_draft(node))
    with killed_at(node, tmp_path / "kill", point, point.path):
        node.store(os.urandom(SMALL))
        pytest.fail("the server was not killed")
    restart(node)
    left = leftovers(node.storage)
    report("F1 control: no sweep", 1, temporary_files_left=len(left))
    assert len(left) == 1
    node.kill()
    node.prefix = ()
    restart(node)
    assert leftovers(node.storage) == []


def first_start_survives(make_node: Callable[..., RunningNode], call: str, number: int) -> bool:
    """A first start that is killed at a system call, then a start that has to work. False when the call was not
    reached."""
    node = make_node(f"{call}-{number}")
    inject = f"inject={call}:signal=KILL:when={number}"
    # Byte code is not compiled anew: the calls are the server's own.
    node.env = {"PYTHONDONTWRITEBYTECODE": "1"}
    node.prefix = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    try:
        node.start()
    except AssertionError:
        assert node.process is not None
        assert node.process.poll() is not None, "the start hangs"
        reached = True
    else:
        reached = False
    node.kill()
    node.prefix = ()
    restart(node)
    identity = node.request("GET", "/probe", auth=False).json()["nodeId"]
    # The server that runs now may be writing a snapshot itself.
    left = f"nothing is left of {call} {number}"
    wait_for(lambda: leftovers(node.storage) + leftovers(node.metadata) == [], left)
    assert node.store(b"first").status == 200
    node.kill()
    restart(node)
    assert node.request("GET", "/probe", auth=False).json()["nodeId"] == identity
    found = Ledger(blobs={sha1_of(b"first"): 5}).check(node)
    assert not found, found
    node.kill()
    return reached


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("call", "numbers"), [("rename", (1,)), ("mkdir", (4,)), ("fdatasync", (4,))])
def test_kill_in_the_first_start(make_node: Any, call: str, numbers: tuple[int, ...]) -> None:
    need_strace()
    reached = [first_start_survives(make_node, call, number) for number in numbers]
    report(f"F1 first start, {call}", len(numbers), killed=sum(reached), temporary_files_left=0)
    assert all(reached)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", ["rename", "mkdir", "fsync", "fdatasync", "fchmod", "ftruncate", "unlink"])
def test_kill_at_every_call_of_the_first_start(make_node: Any, call: str) -> None:
    need_strace()
    number = 1
    while first_start_survives(make_node, call, number):
        number += 1
    report(f"F1 first start, every {call}", number, killed=number - 1, temporary_files_left=0)
    assert number > 1
