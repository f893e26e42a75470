"""Where the measuring happens: a directory on a real disk, server processes in it, and their memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kachery_lab.db.filesystem import file_system_of
from tests.servers import RunningNode

GIB = 1 << 30
MIB = 1 << 20
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Place:
    """The work directory of one run. `rounds`: how often each figure is measured; the best counts."""

    work: Path
    rounds: int
    quick: bool
    _names: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    def directory(self) -> Path:
        """A path that nothing has used yet."""
        return self.work / f"{next(self._names)}"

    def count(self, full: int) -> int:
        """How many of something small to do in one round."""
        return full // 4 if self.quick else full

    @contextmanager
    def node(self, **env: str) -> Iterator[RunningNode]:
        """A running server with a volume and a database of its own.

        Its files stay until the end of the run: ext4 without a journal makes files slowly for minutes after many were
        deleted nearby, and the next line would be measured against that.
        """
        root = self.directory()
        node = RunningNode(root / "data", root / "meta", env, fresh=True)
        try:
            yield node.start()
        finally:
            if node.process is not None:
                node.kill()
            for large in (path for path in root.rglob("*") if path.is_file() and path.stat().st_size >= GIB):
                large.unlink()

    def file(self, size: int) -> Path:
        """A file of random bytes, in the page cache. Made once."""
        path = self.work / f"file-{size}"
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
        return path


def open_place(quick: bool) -> Place:
    """Below `KACHERY_LAB_BENCH_DIR`, else below the repository's `.cache`. What a run that was cut short left is
    removed first. Memory is no disk: a tmpfs is refused."""
    given = os.environ.get("KACHERY_LAB_BENCH_DIR")
    root = Path(given) if given else REPOSITORY / ".cache" / "bench"
    root.mkdir(parents=True, exist_ok=True)
    if file_system_of(root)[0] in ("tmpfs", "ramfs"):
        raise SystemExit(f"{root} lies in memory; name a directory on a disk in KACHERY_LAB_BENCH_DIR")
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return Place(work, 2 if quick else 5, quick)


def head(node: RunningNode, method: str, path: str, length: int | None = None, kind: str | None = None) -> str:
    """The head of a request with the local client's code."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{node.port}", f"KACHERY-CLIENT-AUTH-CODE: {node.code}"]
    if kind is not None:
        lines.append(f"Content-Type: {kind}")
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join(lines) + "\r\n\r\n"


def best(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """The greatest value of each measure; they take turns, so that all meet the same machine."""
    found = [[measure() for measure in measures] for _ in range(rounds)]
    return [max(column) for column in zip(*found, strict=True)]


class Memory:
    """Memory that a process needs while something happens, beyond what it held before."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        # 5 resets the peak (proc(5)).
        (self._proc / "clear_refs").write_text("5")
        self._before = self._kib("VmRSS")

    def _kib(self, name: str) -> int:
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise RuntimeError(f"no {name}")

    def added(self) -> int:
        """Bytes: the peak since this object was made, less what was held then."""
        return (self._kib("VmHWM") - self._before) * 1024
