"""An append-only log on the volume: what is acknowledged can be read back after a power cut.

A record is one line: eight hex digits of CRC-32, a space, compact JSON, a newline. Segments are named by a number;
`Position` (segment, offset) says how far an index has read. Blocking; runs in the disk pool, one writer at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kachery_lab.blobs.durable import fsync_directory, write_all
from kachery_lab.errors import StartRefused

SEGMENT_BYTES = 256 << 20
_NAME = re.compile(r"(\d{8})\.log", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the log; records before it are known."""

    segment: int
    offset: int

    def __str__(self) -> str:
        return f"{self.segment}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Inverse of `str`."""
        segment, _, offset = text.partition(":")
        return cls(int(segment), int(offset))


START = Position(1, 0)


def encode(record: bytes) -> bytes:
    """One line of the log. `record` is JSON text without a newline."""
    return b"%08x %s\n" % (zlib.crc32(record), record)


def decode(line: bytes) -> bytes | None:
    """The record of a line, or None when the line is torn or altered."""
    if len(line) < 10 or not line.endswith(b"\n"):
        return None
    record = line[9:-1]
    try:
        crc = int(line[:8], 16)
    except ValueError:
        return None
    return record if line[8:9] == b" " and crc == zlib.crc32(record) else None


class Journal:
    """The log in one directory. `open` cuts a torn tail, which was never acknowledged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1
        self._segment = START.segment
        self._good = 0
        self._dirty = False

    @property
    def end(self) -> Position:
        """Behind the last durable record."""
        return Position(self._segment, self._good)

    def open(self, known: Position = START) -> None:
        """Make the directory if absent, check the newest segment behind `known` and cut its torn tail. Raises OSError,
        and StartRefused when bytes before the tail are altered: then nothing is cut."""
        if not self._directory.is_dir():
            self._directory.mkdir(mode=0o700)
            fsync_directory(str(self._directory.parent))
        self._segment = max(self.segments(), default=START.segment)
        path = self._path(self._segment)
        fresh = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if fresh:
            fsync_directory(str(self._directory))
        self._good = self._check_tail(path, known.offset if known.segment == self._segment else 0)
        if os.fstat(self._fd).st_size > self._good:
            os.ftruncate(self._fd, self._good)
            os.fsync(self._fd)

    def _check_tail(self, path: Path, known: int) -> int:
        """Offset behind the last whole record."""
        good = min(known, path.stat().st_size)
        torn: int | None = None
        with path.open("rb") as file:
            file.seek(good)
            for line in file:
                if decode(line) is None:
                    torn = good if torn is None else torn
                elif torn is not None:
                    raise StartRefused(
                        f"{path} is damaged at byte {torn}, with whole records behind it",
                        hint="Restore this file from a backup; `kachery-lab reindex` then reads it again",
                    )
                good += len(line)
        return good if torn is None else torn

    def append(self, records: list[bytes]) -> Position:
        """Append records durably; the position behind them. Raises OSError: then none of them is in the log.

        A failed write or flush leaves bytes of unknown state; they are cut before anything else is written.
        """
        self._repair()
        if self._good >= SEGMENT_BYTES:
            self._roll()
        data = b"".join([encode(record) for record in records])
        self._dirty = True
        try:
            write_all(self._fd, data)
            os.fsync(self._fd)
        except OSError:
            # At once: whole lines that were refused would count as records after a restart.
            self._repair_quietly()
            raise
        self._good += len(data)
        self._dirty = False
        return self.end

    def _repair(self) -> None:
        if not self._dirty:
            return
        # A new descriptor: fsync on the failed one might report success for pages that were dropped.
        fd = os.open(self._path(self._segment), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, self._good)
            os.fsync(fd)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd
        self._dirty = False

    def _repair_quietly(self) -> None:
        """Cut what a failed append left, if that works now; else the next append has to."""
        with contextlib.suppress(OSError):
            self._repair()

    def _roll(self) -> None:
        path = self._path(self._segment + 1)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(fd, 0)
        fsync_directory(str(self._directory))
        os.close(self._fd)
        self._fd = fd
        self._segment += 1
        self._good = 0

    def read(self, start: Position = START) -> Iterator[tuple[Position, bytes]]:
        """Each whole record from `start`, with the position behind it. Raises StartRefused for a damaged record or
        when the log ends before `start`: then the volume lost what an index still knows."""
        segments = self.segments()
        if start > START and start > self.end:
            raise StartRefused(
                f"{self._directory} ends at {self.end}, the index knows records up to {start}",
                hint="The volume is older than the database. Restore the newer volume, or move the database away and "
                "run `kachery-lab reindex` to accept what the volume holds",
            )
        for segment in segments:
            if segment < start.segment:
                continue
            offset = start.offset if segment == start.segment else 0
            with self._path(segment).open("rb") as file:
                file.seek(offset)
                for line in file:
                    record = decode(line)
                    if record is None:
                        raise StartRefused(
                            f"{self._path(segment)} is damaged at byte {offset}",
                            hint="Restore this file from a backup, then run `kachery-lab reindex`",
                        )
                    offset += len(line)
                    yield Position(segment, offset), record

    def segments(self) -> list[int]:
        """Numbers of the segments, ascending."""
        if not self._directory.is_dir():
            return []
        matches = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return sorted(int(match.group(1)) for match in matches if match)

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08d}.log"

    def close(self) -> None:
        """Free the descriptor. Everything appended is durable already."""
        if self._fd >= 0:
            self._repair_quietly()
            os.close(self._fd)
            self._fd = -1
