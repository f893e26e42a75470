"""What the tests of kills, power cuts and failing system calls share: strace on a running server, loop mounts that can
lose power, and a ledger of everything that was acknowledged."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kachery_lab.blobs.layout import is_blob_name
from tests.faults.report import messages_of, missing, need_root, wait_for
from tests.servers import RunningNode, blob_path, drafts, files_below

UNDURABLE = Path(__file__).with_name("undurable.py")
SUBFEED = "5" * 40
SYSTEM_CALLS = "openat,write,pwrite64,fchmod,fsync,fdatasync,ftruncate,mkdir,link,rename,renameat2,unlink"


def without(guard: str) -> list[str]:
    """A command prefix that runs the server with one guard switched off, for positive controls."""
    return [sys.executable, str(UNDURABLE), guard]


# -- prerequisites -----------------------------------------------------------------------------------------------


def need_strace() -> None:
    """strace must be there and may attach to processes."""
    if shutil.which("strace") is None:
        missing("needs strace")
    need_root()


def need_loop(file_system: str) -> None:
    """Loop devices, the file system's maker, and `xfs_io`, which cuts the power of ext4 as well as of xfs."""
    need_root()
    for command in ("losetup", "xfs_io", f"mkfs.{file_system}"):
        if shutil.which(command) is None:
            missing(f"needs {command}")
    if not Path("/dev/loop-control").exists():
        missing("needs loop devices")


# -- failing system calls ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def strace(node: RunningNode, log: Path, *options: str) -> Iterator[None]:
    """strace on every thread of a running server. Ends when the block ends, or when the server was killed by it."""
    assert node.process is not None
    pid = node.process.pid
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-o", str(log), *options, "-p", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _traced(pid) or tracer.poll() is not None, "strace attached")
        if tracer.poll() is not None:
            missing("strace may not attach to a process here")
        yield
    finally:
        # A process that is being killed is gone only when strace has reaped all its threads: strace must not be told
        # to detach while it does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            tracer.wait(10 if _dying(pid) else 0)
        if tracer.poll() is None:
            tracer.terminate()
        try:
            tracer.wait(10)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait(10)


def _dying(pid: int) -> bool:
    """Whether any thread of a process has ended or the process is gone."""
    try:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in _tasks(pid)]
    except OSError:
        return True
    return not states or bool({"Z", "X"} & set(states))


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


@contextlib.contextmanager
def killed_at(node: RunningNode, log: Path, point: Point, path: str) -> Iterator[None]:
    """The block sends a request; the server is killed when it gets to `point`, and gone when the block has ended with a
    broken connection. Other errors pass; a block that ends normally means that the point was not reached."""
    assert node.process is not None
    with strace(node, log, *point.options(path, "signal=KILL")):
        try:
            yield
        except (OSError, http.client.HTTPException):
            assert node.process.wait(20) == -9


def _traced(pid: int) -> bool:
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            if "TracerPid:\t0\n" in (task / "status").read_text():
                return False
    return True


@dataclass(frozen=True, order=True)
class Point:
    """The `number`th use of a system call on a path by one thread. `path` may be a symbol that a request resolves."""

    call: str
    path: str
    number: int = 1

    def options(self, path: str, effect: str) -> list[str]:
        """strace's options that let `effect` (`signal=KILL`, `error=EIO`) happen at this point."""
        return ["-P", path, "-e", f"trace={self.call}", "-e", f"inject={self.call}:{effect}:when={self.number}"]


_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
_QUOTED = re.compile(r'"([^"]*)"')


def calls(log: Path) -> list[tuple[str, str, str, str]]:
    """(thread, system call, path, the rest of the line) of a trace made with `-y`, in order."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, call, rest = match.groups()
        if call == "link":
            path = _QUOTED.findall(rest)[1]
        elif call in ("openat", "mkdir", "unlink", "rename", "renameat2"):
            # Of a rename strace's own path filter sees the first name only.
            path = _QUOTED.findall(rest)[0]
        else:
            descriptor = re.match(r"\d+<(.*?)>", rest)
            path = descriptor.group(1) if descriptor else ""
        found.append((thread, call, path, rest))
    return found


def points(log: Path, symbols: dict[str, str], roots: list[Path]) -> list[Point]:
    """The points of a traced request, in order, below `roots`; paths that `symbols` names become symbols. The
    heartbeat, which comes by the clock, is left out."""
    counted: Counter[tuple[str, str, str]] = Counter()
    found: list[Point] = []
    for thread, call, path, _ in calls(log):
        if path.endswith("/.kachery-owner") or not any(
            path == str(root) or path.startswith(f"{root}/") for root in roots
        ):
            continue
        name = symbols.get(path, path)
        counted[thread, call, name] += 1
        point = Point(call, name, counted[thread, call, name])
        if point not in found:
            found.append(point)
    return found


def blob_symbols(storage: Path, sha1: str, prefix: str = "", suffix: str = "", below: str = "sha1") -> dict[str, str]:
    """Symbol by path for a blob's file and the directories that belong to it alone."""
    final = blob_path(storage, sha1)
    if below != "sha1":
        final = storage / below / final.relative_to(storage / "sha1")
    names = ("final", "cc", "bb", "aa")
    places = (Path(f"{final}{suffix}"), *final.parents[:3])
    return {str(place): f"{{{prefix}{name}}}" for name, place in zip(names, places, strict=True)}


def next_draft(node: RunningNode) -> str:
    """Path of the temporary file that the server makes next, learned from an upload that is given up."""
    # Elsewhere on the volume other files are on their way, such as the copy of the access data right after a start.
    place = node.storage / "tmp"
    before = set(place.iterdir())
    with socket.create_connection(("127.0.0.1", node.port)) as connection:
        head = f"POST /store HTTP/1.1\r\nHost: localhost\r\nKACHERY-CLIENT-AUTH-CODE: {node.code}\r\n"
        connection.sendall(f"{head}Content-Length: 9000000\r\n\r\n".encode() + bytes(3_000_000))
        wait_for(lambda: bool(set(place.iterdir()) - before), "a draft of the upload")
        (draft,) = set(place.iterdir()) - before
    wait_for(lambda: not draft.exists(), "the draft of the given up upload is removed")
    stem, number, _ = str(draft).rsplit(".", 2)
    return f"{stem}.{int(number) + 1}.tmp"


# -- loop mounts -------------------------------------------------------------------------------------------------


@dataclass
class LoopDisk:
    """A file system in an image file. `cut` is what a power cut is to it: everything not flushed is gone."""

    image: Path
    place: Path

    def mount(self, *options: str) -> None:
        """Mount; the journal is replayed."""
        _run("mount", "-o", ",".join(("loop", *options)), str(self.image), str(self.place))

    def cut(self) -> None:
        """From now on every access fails, and nothing more reaches the image."""
        _run("xfs_io", "-x", "-c", "shutdown", str(self.place))

    def remount(self, mode: str) -> None:
        """`ro` or `rw`."""
        _run("mount", "-o", f"remount,{mode}", str(self.place))

    @property
    def mounted(self) -> bool:
        """As the kernel says; after a cut the place itself cannot be asked."""
        places = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        return str(self.place.parent.resolve() / self.place.name) in places

    def umount(self) -> None:
        """Unmount, and wait until the loop device is free: a process that was just killed may hold the file system
        for a moment, and a mount of the same device would find it as it was, shut down."""
        wait_for(self._umounted, f"{self.place} is unmounted", 30)
        wait_for(self._detached, f"the loop device of {self.image} is free", 30)

    def _umounted(self) -> bool:
        return not self.mounted or subprocess.run(["umount", str(self.place)], capture_output=True).returncode == 0

    def _detached(self) -> bool:
        found = subprocess.run(["losetup", "-j", str(self.image)], capture_output=True, text=True)
        return found.stdout.strip() == ""


@contextlib.contextmanager
def loop_disk(file_system: str, directory: Path, name: str = "disk", megabytes: int = 320) -> Iterator[LoopDisk]:
    """A fresh file system, mounted; always unmounted at the end."""
    need_loop(file_system)
    disk = LoopDisk(directory / f"{name}.img", directory / name)
    disk.place.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(megabytes << 20)
    make = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
        "xfs": ["mkfs.xfs", "-q", "-f"],
    }
    _run(*make[file_system], str(disk.image))
    try:
        mounted = subprocess.run(["mount", "-o", "loop", str(disk.image), str(disk.place)], capture_output=True)
        if mounted.returncode:
            missing(f"cannot mount a loop device with {file_system}: {mounted.stderr.decode(errors='replace')}")
        yield disk
    finally:
        try:
            disk.umount()
        finally:
            if disk.mounted:
                _run("umount", "-l", str(disk.place))
            disk.image.unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@dataclass
class LoggedNode(RunningNode):
    """A server whose log lies outside its metadata directory's file system, which may be cut."""

    log_file: Path = Path("/dev/null")

    @property
    def log_path(self) -> Path:
        return self.log_file


# -- what was acknowledged ---------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What did not hold. Each entry names what it is about."""

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.lost or self.wrong)


@dataclass
class Ledger:
    """Everything that was acknowledged, and what may or may not have happened. Thread-safe by its lock."""

    blobs: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    links: dict[str, Path] = field(default_factory=dict)
    messages: dict[tuple[str, str], dict[int, Any]] = field(default_factory=dict)
    mutables: dict[str, Any] = field(default_factory=dict)
    deleted_feeds: set[str] = field(default_factory=set)
    unknown_messages: list[Any] = field(default_factory=list)
    unknown_mutables: dict[str, Any] = field(default_factory=dict)
    acked: int = 0
    seen: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def store(self, sha1: str, size: int) -> None:
        with self.lock:
            self.acked += 1
            self.blobs[sha1] = size

    def delete(self, sha1: str) -> None:
        with self.lock:
            self.acked += 1
            self.gone.add(sha1)

    def link(self, sha1: str, path: Path) -> None:
        with self.lock:
            self.acked += 1
            self.links[sha1] = path

    def append(self, feed_id: str, subfeed: str, position: int, messages: list[Any]) -> None:
        with self.lock:
            self.acked += 1
            known = self.messages.setdefault((feed_id, subfeed), {})
            for number, message in enumerate(messages, start=position):
                assert number not in known, f"two messages were acknowledged at {number}"
                known[number] = message

    def set(self, key: str, value: Any) -> None:
        with self.lock:
            self.acked += 1
            self.mutables[key] = value
            self.unknown_mutables.pop(key, None)

    def delete_feed(self, feed_id: str) -> None:
        with self.lock:
            self.acked += 1
            self.deleted_feeds.add(feed_id)

    def check(self, node: RunningNode) -> Findings:
        """Compare with a running server and its disk."""
        found = Findings(wrong=[f"wrong bytes at {path}" for path in wrong_bytes(node.storage)])
        self._check_blobs(node, found)
        for (feed_id, subfeed), known in self.messages.items():
            self._check_messages(node, feed_id, subfeed, known, found)
        for key, value in self.mutables.items():
            got = node.post("/mutable/get", {"key": key}).json()
            unknown = self.unknown_mutables.get(key)
            if not got["found"]:
                found.lost.append(f"mutable {key}")
            elif got["value"] not in (value, unknown):
                found.wrong.append(f"mutable {key} is {got['value']}, not {value} or {unknown}")
            else:
                self.mutables[key] = got["value"]
        for feed_id in self.deleted_feeds:
            if node.post("/feed/getFeedInfo", {"feedId": feed_id}).json()["isWriteable"]:
                found.lost.append(f"deletion of feed {feed_id}")
            if messages_of(node, feed_id, SUBFEED):
                found.lost.append(f"deletion of the messages of {feed_id}")
        return found

    def _check_blobs(self, node: RunningNode, found: Findings) -> None:
        blobs, links = rows(node)
        for sha1, size in self.blobs.items():
            if sha1 in self.gone:
                continue
            path = blob_path(node.storage, sha1)
            # Wrong bytes were looked for above; here only absence and size are left.
            if not path.is_file() or path.stat().st_size != size:
                found.lost.append(f"blob {sha1}")
            elif sha1 not in blobs:
                found.lost.append(f"row of blob {sha1}")
        for sha1 in self.gone:
            if blob_path(node.storage, sha1).exists() or sha1 in blobs:
                found.lost.append(f"deletion of blob {sha1}")
        for sha1, path in self.links.items():
            record = Path(f"{blob_path(node.storage, sha1)}.link")
            if not record.is_file():
                found.lost.append(f"link {sha1}")
            elif json.loads(record.read_bytes())["path"] != str(path):
                found.wrong.append(f"link {sha1}")
            elif sha1 not in links:
                found.lost.append(f"row of link {sha1}")
        found.wrong += [f"row without its file: {name}" for name in rows_without_file(node, blobs, links)]

    def _check_messages(
        self, node: RunningNode, feed_id: str, subfeed: str, known: dict[int, Any], found: Findings
    ) -> None:
        got = messages_of(node, feed_id, subfeed)
        before = self.seen.get((feed_id, subfeed), [])
        if got[: len(before)] != before:
            found.wrong.append(f"messages of {feed_id} changed")
        self.seen[feed_id, subfeed] = got
        for position, message in known.items():
            if position >= len(got):
                found.lost.append(f"message {position} of {feed_id}")
            elif got[position] != message:
                found.wrong.append(f"message {position} of {feed_id}")
        extra = [json.dumps(message, sort_keys=True) for position, message in enumerate(got) if position not in known]
        unknown = {json.dumps(message, sort_keys=True) for message in self.unknown_messages}
        if len(set(extra)) != len(extra) or not set(extra) <= unknown:
            found.wrong.append(f"messages of {feed_id} that nobody sent, or twice")


def wrong_bytes(storage: Path) -> list[Path]:
    """Files at final names whose bytes do not have that SHA-1."""
    return [
        path
        for path in files_below(storage / "sha1")
        if is_blob_name(path.name) and sha1_of(path.read_bytes()) != path.name
    ]


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def rows(node: RunningNode) -> tuple[dict[str, int], set[str]]:
    """The index: size by SHA-1 of blobs, and SHA-1s of links."""
    with contextlib.closing(sqlite3.connect(f"file:{node.metadata}/kachery-lab.db?mode=ro", uri=True)) as database:
        blobs = dict(database.execute("SELECT sha1, size FROM blobs").fetchall())
        links = {sha1 for (sha1,) in database.execute("SELECT sha1 FROM links")}
    return blobs, links


def rows_without_file(node: RunningNode, blobs: dict[str, int], links: set[str]) -> list[str]:
    """Index rows that the volume does not bear out."""
    absent = []
    for sha1, size in blobs.items():
        path = blob_path(node.storage, sha1)
        if not path.is_file() or path.stat().st_size != size:
            absent.append(sha1)
    return absent + [sha1 for sha1 in links if not Path(f"{blob_path(node.storage, sha1)}.link").is_file()]


def leftovers(storage: Path) -> list[Path]:
    """Temporary files anywhere on the volume, probes included."""
    return drafts(storage) + [path for path in storage.iterdir() if path.name.startswith(".kachery-probe")]


def restart(node: RunningNode) -> float:
    """Start after a fault; milliseconds until `/readyz` answers 200."""
    began = time.monotonic()
    node.start()
    return (time.monotonic() - began) * 1000


def append(node: RunningNode, feed_id: str, messages: list[Any], **more: Any) -> Any:
    """An append to the one subfeed that these tests use."""
    return node.post("/feed/appendMessages", {"feedId": feed_id, "subfeedHash": SUBFEED, "messages": messages, **more})


def create_feed(node: RunningNode) -> str:
    answer = node.post("/feed/createFeed", {})
    assert answer.status == 200, answer.body
    return str(answer.json()["feedId"])


def link_body(path: Path) -> dict[str, Any]:
    """The body of `/linkFile`."""
    stat = path.stat()
    return {"localFilePath": str(path), "size": stat.st_size, "mtime": stat.st_mtime}
