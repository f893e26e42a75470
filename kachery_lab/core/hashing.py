"""Hashes of byte streams and of JSON values.

hashlib releases the interpreter lock for pieces above 2047 bytes, so the two halves of a StreamHasher can run in two
threads.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import Sha1, Sha256

CHUNK_SIZE = 20_000_000
"""Bytes of every chunk but the last (spec/storage-layout.md section 3)."""
_HELD = 2047
"""Up to so many bytes hashlib keeps the interpreter lock."""
_SMALL = 4 * _HELD


def _feed(hashes: tuple[Any, ...], data: memoryview | bytes | bytearray) -> None:
    """Add bytes to each hash. A small piece is hashed in less time than it takes to get the interpreter lock back."""
    if _HELD < len(data) <= _SMALL:
        for start in range(0, len(data), _HELD):
            piece = data[start : start + _HELD]
            for digest in hashes:
                digest.update(piece)
    else:
        for digest in hashes:
            digest.update(data)


def sha1_of(data: bytes | bytearray) -> Sha1:
    """SHA-1 of bytes in memory."""
    digest = hashlib.sha1(usedforsecurity=False)
    _feed((digest,), data)
    return Sha1(digest.hexdigest())


class Chunk(NamedTuple):
    """Bytes `start` (inclusive) to `end` (exclusive) of a file, and their SHA-1."""

    start: int
    end: int
    sha1: Sha1


class WholeHasher:
    """SHA-1, and on demand SHA-256, of a whole stream; on the way also the SHA-1 of its first chunk, which costs
    nothing.
    """

    __slots__ = ("_first_chunk", "_sha1", "_sha256", "size")

    def __init__(self, want_sha256: bool) -> None:
        self.size = 0
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._sha256 = hashlib.sha256() if want_sha256 else None
        self._first_chunk: Sha1 | None = None

    def update(self, data: memoryview | bytes | bytearray) -> None:
        """Add bytes (a memoryview must have items of one byte)."""
        room = CHUNK_SIZE - self.size
        if self._first_chunk is None and len(data) >= room:
            view = memoryview(data)
            self._sha1.update(view[:room])
            self._first_chunk = Sha1(self._sha1.hexdigest())
            self._sha1.update(view[room:])
            if self._sha256 is not None:
                self._sha256.update(data)
        elif self._sha256 is not None:
            _feed((self._sha1, self._sha256), data)
        else:
            _feed((self._sha1,), data)
        self.size += len(data)

    def drop_sha256(self) -> None:
        """Stop computing SHA-256; `sha256` is None from now on."""
        self._sha256 = None

    def sha1(self) -> Sha1:
        """SHA-1 of everything so far."""
        return Sha1(self._sha1.hexdigest())

    def sha256(self) -> Sha256 | None:
        """SHA-256 of everything so far; None if it was not wanted."""
        return None if self._sha256 is None else Sha256(self._sha256.hexdigest())

    def first_chunk(self) -> Chunk:
        """The first CHUNK_SIZE bytes, or all there are if fewer."""
        return Chunk(0, min(self.size, CHUNK_SIZE), self._first_chunk or self.sha1())


class ChunkHasher:
    """SHA-1 of each chunk of a stream but the first, which a WholeHasher already knows.

    It is given the whole stream.
    """

    __slots__ = ("_current", "_done", "size")

    def __init__(self) -> None:
        self.size = 0
        self._done: list[Chunk] = []
        self._current = hashlib.sha1(usedforsecurity=False)

    def update(self, data: memoryview | bytes | bytearray) -> None:
        """Add bytes (a memoryview must have items of one byte), split at chunk boundaries without copying."""
        view = memoryview(data)
        while len(view):
            piece = view[: CHUNK_SIZE - self.size % CHUNK_SIZE]
            if self.size >= CHUNK_SIZE:
                self._current.update(piece)
            self.size += len(piece)
            if self.size % CHUNK_SIZE == 0 and self.size > CHUNK_SIZE:
                self._done.append(Chunk(self.size - CHUNK_SIZE, self.size, Sha1(self._current.hexdigest())))
                self._current = hashlib.sha1(usedforsecurity=False)
            view = view[len(piece) :]

    def later_chunks(self) -> list[Chunk]:
        """The chunks from the second on; the last may be shorter. Empty for streams of at most CHUNK_SIZE bytes."""
        start = self.size - self.size % CHUNK_SIZE
        if start < CHUNK_SIZE or start == self.size:
            return list(self._done)
        return [*self._done, Chunk(start, self.size, Sha1(self._current.hexdigest()))]


class StreamHasher:
    """Everything that is known of a stream after one pass.

    `update` feeds both halves. Two threads may instead feed `whole` and `later` themselves, the same bytes each;
    `later` is None when no chunks are wanted. Results are right once both have had everything.
    """

    __slots__ = ("later", "whole")

    def __init__(self, want_sha256: bool, want_chunks: bool) -> None:
        self.whole = WholeHasher(want_sha256)
        self.later = ChunkHasher() if want_chunks else None

    def update(self, data: memoryview | bytes | bytearray) -> None:
        """Add bytes (a memoryview must have items of one byte)."""
        self.whole.update(data)
        if self.later is not None:
            self.later.update(data)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.whole.size

    def sha1(self) -> Sha1:
        """SHA-1 of everything so far."""
        return self.whole.sha1()

    def sha256(self) -> Sha256 | None:
        """SHA-256 of everything so far; None if it was not wanted."""
        return self.whole.sha256()

    def chunks(self) -> list[Chunk]:
        """All chunks in order: one for at most CHUNK_SIZE bytes, none for an empty stream or if they were not
        wanted.
        """
        if self.later is None or self.size == 0:
            return []
        return [self.whole.first_chunk(), *self.later.later_chunks()]


def json_sha1(value: object) -> Sha1:
    """SHA-1 of the 2021 canonical JSON: the hash of mutable keys and file keys.

    Raises InvalidInput as `canonical_2021` does.
    """
    return Sha1(hashlib.sha1(canonical_2021(value).encode("utf-8"), usedforsecurity=False).hexdigest())


def task_hash(function_id: str, kwargs: object) -> Sha1:
    """The name of a task's result (spec/signing.md section 4). Raises InvalidInput as `canonical_2021` does."""
    return json_sha1({"functionId": function_id, "kwargs": kwargs})
