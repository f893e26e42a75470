"""What every blob store must do, whatever it is made of. A binding subclasses `BlobStoreContract` and gives `store`."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import ClassVar

import pytest

from kachery_lab.blobs.base import PIECE, BlobStat, BlobStore
from kachery_lab.blobs.receive import put_verified
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Collision, ContentMismatch, NotFound
from tests.third_party import shared_vectors

MIB = 1 << 20
LARGE = 64 * MIB
EMPTY = Sha1("da39a3ee5e6b4b0d3255bfef95601890afd80709")


def sha1_of(data: bytes) -> Sha1:
    return Sha1(hashlib.sha1(data).hexdigest())


async def stream(data: bytes, step: int = 70_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), step):
        yield data[start : start + step]


async def put(store: BlobStore, data: bytes) -> Sha1:
    sha1 = sha1_of(data)
    await store.put(sha1, stream(data))
    return sha1


async def content(store: BlobStore, sha1: Sha1, offset: int = 0, length: int | None = None) -> bytes:
    return b"".join([piece async for piece in store.read(sha1, offset, length)])


def large_pieces() -> Iterable[bytes]:
    """LARGE bytes, made piece by piece; the same every time."""
    base = random.Random(7).randbytes(PIECE)
    for number in range(LARGE // PIECE):
        yield number.to_bytes(8, "big") + base[8:]


async def large_stream() -> AsyncIterator[bytes]:
    for piece in large_pieces():
        yield piece


class Interrupted(Exception):
    """What breaks a stream in these tests."""


@pytest.mark.anyio
class BlobStoreContract:
    """Run on every implementation. Memory is bounded unless the store is memory itself."""

    memory_limit: ClassVar[int | None] = 12 * MIB

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    def drafts(self) -> list[Path]:
        """Temporary files that exist now."""
        return []

    def other_memory(self) -> int:
        """Bytes of memory that the process behind the store has needed at most, when that is another one."""
        return 0

    async def test_an_empty_store_has_nothing(self, store: BlobStore) -> None:
        absent = sha1_of(b"never stored")
        assert await store.stat(absent) is None
        assert await store.list() == []
        assert await store.delete(absent) is False
        for offset, length in ((0, None), (5, None), (0, 3), (0, 0)):
            with pytest.raises(NotFound):
                await content(store, absent, offset, length)

    async def test_what_was_put_is_there(self, store: BlobStore) -> None:
        data = b"some bytes \x00\xff" * 20_000
        sha1 = sha1_of(data)
        assert await store.put(sha1, stream(data)) is True
        assert await store.stat(sha1) == BlobStat(sha1, len(data))
        assert await content(store, sha1) == data
        assert await store.list() == [BlobStat(sha1, len(data))]
        assert self.drafts() == []

    async def test_ranges(self, store: BlobStore) -> None:
        data = bytes(range(256)) * 5000
        sha1 = await put(store, data)
        size = len(data)
        for offset in (0, 1, 255, 256, MIB - 1, MIB, size - 1, size, size + 1, 10 * size):
            for length in (None, 0, 1, 255, MIB + 1, size, 10 * size):
                expected = data[offset:] if length is None else data[offset : offset + length]
                assert await content(store, sha1, offset, length) == expected, (offset, length)

    async def test_no_piece_is_larger_than_stated(self, store: BlobStore) -> None:
        data = bytes(3 * MIB + 5)
        sha1 = await put(store, data)
        if self.memory_limit is not None:
            assert max([len(piece) async for piece in store.read(sha1)]) <= PIECE

    async def test_a_second_put_changes_nothing(self, store: BlobStore) -> None:
        data = b"twice" * 30_000
        sha1 = sha1_of(data)
        assert await store.put(sha1, stream(data)) is True
        assert await store.put(sha1, stream(data)) is False
        assert await content(store, sha1) == data
        assert len(await store.list()) == 1
        assert self.drafts() == []

    async def test_concurrent_puts_of_one_name(self, store: BlobStore) -> None:
        data = random.Random(3).randbytes(2 * MIB + 11)
        sha1 = sha1_of(data)
        arrived = 0
        gate = asyncio.Event()

        async def together() -> AsyncIterator[bytes]:
            nonlocal arrived
            yield data[:MIB]
            arrived += 1
            if arrived == 8:
                gate.set()
            await gate.wait()
            yield data[MIB:]

        news = await asyncio.gather(*(store.put(sha1, together()) for _ in range(8)))
        assert sorted(news) == [False] * 7 + [True]
        assert await content(store, sha1) == data
        assert self.drafts() == []

    async def test_puts_of_many_names_at_once(self, store: BlobStore) -> None:
        datas = [b"%d" % number * 100 for number in range(50)]
        names = await asyncio.gather(*(put(store, data) for data in datas))
        for sha1, data in zip(names, datas, strict=True):
            assert await content(store, sha1) == data
        assert [stat.sha1 for stat in await store.list()] == sorted(names)

    async def test_other_bytes_than_claimed_leave_nothing(self, store: BlobStore) -> None:
        claimed = sha1_of(b"the right bytes")
        for wrong in (b"other bytes", b"", b"the right bytes and more", b"x" * (3 * MIB)):
            with pytest.raises(ContentMismatch):
                await put_verified(store, claimed, stream(wrong))
        assert await store.stat(claimed) is None
        assert await store.list() == []
        assert self.drafts() == []
        assert await put_verified(store, claimed, stream(b"the right bytes")) is True

    async def test_other_bytes_under_a_stored_name_are_refused(self, store: BlobStore) -> None:
        folder = shared_vectors("sha1-collisions")
        first, second = (folder / f"shattered-{number}.pdf" for number in (1, 2))
        sha1 = await put(store, first.read_bytes())
        assert sha1 == sha1_of(second.read_bytes())
        with pytest.raises(Collision):
            await store.put(sha1, stream(second.read_bytes()))
        assert await content(store, sha1) == first.read_bytes()
        assert self.drafts() == []

    @pytest.mark.parametrize("after", [0, 100, 3 * MIB])
    async def test_an_aborted_stream_leaves_nothing(self, store: BlobStore, after: int) -> None:
        data = random.Random(after).randbytes(4 * MIB)
        sha1 = sha1_of(data)

        async def broken() -> AsyncIterator[bytes]:
            if after:
                yield data[:after]
            raise Interrupted

        with pytest.raises(Interrupted):
            await store.put(sha1, broken())
        for _ in range(100):
            if not self.drafts():
                break
            await asyncio.sleep(0.05)
        assert self.drafts() == []
        assert await store.stat(sha1) is None
        assert await store.list() == []
        assert await store.put(sha1, stream(data)) is True
        assert await content(store, sha1) == data

    async def test_a_cancelled_put_leaves_nothing(self, store: BlobStore) -> None:
        sent = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield bytes(2 * MIB)
            sent.set()
            await asyncio.Event().wait()
            yield b""

        sha1 = sha1_of(bytes(2 * MIB))
        task = asyncio.create_task(store.put(sha1, endless()))
        await sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if not self.drafts():
                break
            await asyncio.sleep(0.05)
        assert self.drafts() == []
        assert await store.stat(sha1) is None

    async def test_listing_is_ordered_and_goes_on_where_it_ended(self, store: BlobStore) -> None:
        names = sorted([await put(store, b"listed %d" % number) for number in range(40)])
        expected = [BlobStat(name, len("listed 0") + (len(content) > 1)) for name, content in _numbers(names)]
        assert await store.list() == expected
        assert await store.list(limit=0) == []
        for size in (1, 7, 39, 40, 41):
            found: list[BlobStat] = []
            while page := await store.list(found[-1].sha1 if found else "", size):
                assert len(page) <= size
                found += page
            assert found == expected
        between = Sha1(f"{int(names[5], 16) + 1:040x}")
        assert (await store.list(between, 2)) == expected[6:8]
        assert await store.list("f" * 40) == []

    async def test_deleting_twice(self, store: BlobStore) -> None:
        sha1 = await put(store, b"to be deleted")
        other = await put(store, b"to stay")
        assert await store.delete(sha1) is True
        assert await store.stat(sha1) is None
        with pytest.raises(NotFound):
            await content(store, sha1)
        assert await store.delete(sha1) is False
        assert [stat.sha1 for stat in await store.list()] == [other]

    async def test_a_deleted_blob_can_be_put_again(self, store: BlobStore) -> None:
        data = b"comes back" * 1000
        sha1 = await put(store, data)
        for _ in range(2):
            assert await store.delete(sha1) is True
            assert await store.put(sha1, stream(data)) is True
            assert await content(store, sha1) == data

    async def test_the_empty_blob(self, store: BlobStore) -> None:
        assert await store.put(EMPTY, stream(b"")) is True
        assert await store.put(EMPTY, stream(b"")) is False
        assert await store.stat(EMPTY) == BlobStat(EMPTY, 0)
        for offset, length in ((0, None), (0, 0), (0, 5), (3, None)):
            assert await content(store, EMPTY, offset, length) == b""
        assert await store.list() == [BlobStat(EMPTY, 0)]
        assert await store.delete(EMPTY) is True

    async def test_empty_pieces_mean_nothing(self, store: BlobStore) -> None:
        async def gaps() -> AsyncIterator[bytes]:
            for piece in (b"", b"a", b"", b"", b"bc", b""):
                yield piece

        assert await store.put(sha1_of(b"abc"), gaps()) is True
        assert await content(store, sha1_of(b"abc")) == b"abc"

    async def test_a_large_blob_in_bounded_memory(self, store: BlobStore) -> None:
        digest = hashlib.sha1()
        for piece in large_pieces():
            digest.update(piece)
        sha1 = Sha1(digest.hexdigest())
        before = self.other_memory()
        tracemalloc.start()
        try:
            assert await store.put(sha1, large_stream()) is True
            found = hashlib.sha1()
            async for piece in store.read(sha1):
                found.update(piece)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert found.hexdigest() == sha1
        assert await store.stat(sha1) == BlobStat(sha1, LARGE)
        assert await content(store, sha1, LARGE - 3) == list(large_pieces())[-1][-3:]
        if self.memory_limit is not None:
            assert peak < self.memory_limit
            assert self.other_memory() - before < LARGE // 2

    async def test_a_reader_may_stop_early(self, store: BlobStore) -> None:
        data = bytes(8 * MIB)
        sha1 = await put(store, data)
        for _ in range(5):
            reader = store.read(sha1)
            assert data.startswith(await anext(reader))
            await reader.aclose()  # type: ignore[attr-defined]
        assert await content(store, sha1, 8 * MIB - 1) == b"\0"

    async def test_closing_twice(self, store: BlobStore) -> None:
        await store.close()
        await store.close()


def _numbers(names: list[Sha1]) -> list[tuple[Sha1, str]]:
    """Which number each name of the listing test stands for."""
    by_name = {sha1_of(b"listed %d" % number): str(number) for number in range(40)}
    return [(name, by_name[name]) for name in names]
