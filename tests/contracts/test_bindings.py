"""The behaviour suite on every blob store, and what the remote one promises beyond it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import http.client
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar

import httpx2
import pytest

from kachery_lab.blobs import durable
from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.blobs.memory import MemoryBlobStore
from kachery_lab.client.remote import RemoteBlobStore
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import (
    ContentMismatch,
    Forbidden,
    Gone,
    KacheryLabError,
    NotFound,
    Quarantined,
    StorageFull,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from kachery_lab.http.errors import problem
from tests import servers
from tests.contracts.blob_store import BlobStoreContract, content, put, sha1_of, stream
from tests.servers import RunningNode, blob_path

HELLO = sha1_of(b"hello")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class TestMemory(BlobStoreContract):
    memory_limit: ClassVar[int | None] = None

    @pytest.fixture
    async def store(self) -> AsyncIterator[MemoryBlobStore]:
        made = MemoryBlobStore()
        yield made
        await made.close()


class TestLocal(BlobStoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[LocalBlobStore]:
        self.root = tmp_path
        (tmp_path / "tmp").mkdir()
        disk = Disk()
        yield LocalBlobStore(StorageLayout(tmp_path), disk)
        disk.close()

    def drafts(self) -> list[Path]:
        return servers.drafts(self.root)


class TestLocalWithoutFlags(TestLocal):
    """As on NFS, where a rename cannot be told not to replace: the final name is given by a hard link."""

    @pytest.fixture(autouse=True)
    def no_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.linked: list[str] = []

        def link(source: str, target: str) -> None:
            real(source, target)
            self.linked.append(target)

        real = os.link
        monkeypatch.setattr(os, "link", link)
        monkeypatch.setattr(durable, "_renameat2", _no_flags)

    async def test_the_fallback_ran(self, store: LocalBlobStore) -> None:
        await put(store, b"by link")
        assert len(self.linked) == 1


class TestLocalWithoutHardLinks(TestLocal):
    """As on a file system that has neither: the final name is given by a look and a rename."""

    @pytest.fixture(autouse=True)
    def no_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: list[str] = []

        def link(source: str, target: str) -> None:
            self.refused.append(target)
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        def rename(source: str, target: str) -> None:
            # Long enough for a second thread to look at the name in between.
            time.sleep(0.02)
            real(source, target)

        real = os.rename
        monkeypatch.setattr(os, "link", link)
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(durable, "_renameat2", _no_flags)

    async def test_the_fallback_ran(self, store: LocalBlobStore) -> None:
        await put(store, b"by rename")
        assert len(self.refused) == 1


def _no_flags(*_: object) -> int:
    ctypes.set_errno(errno.EINVAL)
    return -1


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """One server for all tests here; each leaves it empty."""
    root = tmp_path_factory.mktemp("remote")
    for name in ("storage", "metadata"):
        (root / name).mkdir()
    running = RunningNode(root / "storage", root / "metadata").start()
    yield running
    running.kill()


class TestRemote(BlobStoreContract):
    @pytest.fixture
    async def store(self, node: RunningNode) -> AsyncIterator[RemoteBlobStore]:
        self.node = node
        made = RemoteBlobStore(f"http://127.0.0.1:{node.port}", token=node.admin_token)
        yield made
        await made.close()
        cleaner = RemoteBlobStore(f"http://127.0.0.1:{node.port}", token=node.admin_token)
        for stat in await cleaner.list():
            await cleaner.delete(stat.sha1)
        await cleaner.close()

    def drafts(self) -> list[Path]:
        return servers.drafts(self.node.storage)

    def other_memory(self) -> int:
        assert self.node.process is not None
        status = Path(f"/proc/{self.node.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        return int(match[1]) * 1024

    async def test_a_client_code_is_enough_but_not_to_delete(self, store: RemoteBlobStore, node: RunningNode) -> None:
        by_code = RemoteBlobStore(f"http://127.0.0.1:{node.port}", code=node.code)
        await put(by_code, b"hello")
        assert await content(by_code, HELLO) == b"hello"
        with pytest.raises(Forbidden) as caught:
            await by_code.delete(HELLO)
        assert "admin" in str(caught.value)
        assert await by_code.stat(HELLO) is not None
        await by_code.close()

    async def test_a_wrong_credential(self, store: RemoteBlobStore, node: RunningNode) -> None:
        for wrong in (
            RemoteBlobStore(f"http://127.0.0.1:{node.port}", token="klk_wrong"),
            RemoteBlobStore(f"http://127.0.0.1:{node.port}"),
        ):
            for attempt in (wrong.list(), put(wrong, b"hello"), content(wrong, HELLO), wrong.stat(HELLO)):
                with pytest.raises((Unauthenticated, TooManyRequests)):
                    await attempt
            await wrong.close()
        assert await store.list() == []

    @pytest.mark.parametrize("cut", range(6))
    async def test_an_early_refusal_leaves_the_connection_in_order(
        self, store: RemoteBlobStore, node: RunningNode, cut: int
    ) -> None:
        """Who is refused before its chunked body ended sends the rest, and its next request right behind it."""
        end = b"0\r\n\r\n"
        head = f"PUT /api/v1/blobs/{HELLO} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        following = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", node.port), timeout=20) as raw:
            for _ in range(3):
                raw.sendall(head.encode() + b"9\r\n\r\n\r\n\r\n\r\nx\r\n")
                assert _status(raw) == 401
                raw.sendall(end[:cut])
                time.sleep(0.05)
                raw.sendall(end[cut:] + following)
                assert _status(raw) == 200

    async def test_wrong_bytes_are_refused_by_the_node(self, store: RemoteBlobStore) -> None:
        with pytest.raises(ContentMismatch):
            await store.put(HELLO, stream(b"other"))
        assert await store.stat(HELLO) is None

    async def test_rotten_bytes(self, store: RemoteBlobStore, node: RunningNode) -> None:
        await put(store, b"hello")
        path = blob_path(node.storage, HELLO)
        path.write_bytes(b"hellO")
        with pytest.raises(Quarantined):
            await content(store, HELLO)
        assert await store.stat(HELLO) is None
        assert await store.put(HELLO, stream(b"hello")) is True
        assert await content(store, HELLO) == b"hello"

    async def test_a_listing_of_several_pages(
        self, store: RemoteBlobStore, node: RunningNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = sorted([await put(store, b"page %d" % number) for number in range(25)])
        monkeypatch.setattr("kachery_lab.client.remote.PAGE", 10)
        assert [stat.sha1 for stat in await store.list()] == names
        assert [stat.sha1 for stat in await store.list(limit=23)] == names[:23]
        assert [stat.sha1 for stat in await store.list(names[2], 12)] == names[3:15]

    async def test_the_node_goes_away(self, store: RemoteBlobStore) -> None:
        gone = RemoteBlobStore(f"http://127.0.0.1:{servers.free_port()}", token="klk_x")
        for attempt in (gone.list(), put(gone, b"x"), content(gone, HELLO), gone.stat(HELLO), gone.delete(HELLO)):
            with pytest.raises(Unavailable):
                await attempt
        await gone.close()


def _status(raw: socket.socket) -> int:
    """The status of the next answer on a connection that stays."""
    response = http.client.HTTPResponse(raw)
    response.begin()
    response.read()
    return response.status


# -- against answers that a node of ours would not give ----------------------------------------------------------------


class _Pieces(httpx2.AsyncByteStream):
    def __init__(self, pieces: list[bytes], error: Exception | None = None) -> None:
        self._pieces = pieces
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._error is not None:
            raise self._error


def reply(status: int, body: object = b"", **headers: str) -> httpx2.Response:
    """An answer whose body is still to be read, as the network gives it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, headers=named, stream=_Pieces([data]))


def answering(*answers: httpx2.Response | Exception) -> RemoteBlobStore:
    """A store whose node gives these answers, one after another."""
    waiting = list(answers)

    def answer(_: httpx2.Request) -> httpx2.Response:
        found = waiting.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return RemoteBlobStore("http://node.example", token="t", transport=httpx2.MockTransport(answer))


async def collected(store: RemoteBlobStore, *range_: int) -> tuple[bytes, KacheryLabError | None]:
    """What a reader got, and how it ended."""
    got = b""
    try:
        async for piece in store.read(HELLO, *range_):
            got += piece
    except KacheryLabError as error:
        return got, error
    return got, None


@pytest.mark.anyio
@pytest.mark.parametrize("pieces", [[b"hellO"], [b"hell"], [b"hello", b"!"], [], [b"x" * (3 << 20)]])
async def test_a_wrong_body_never_reaches_its_end(pieces):
    got, error = await collected(answering(httpx2.Response(200, stream=_Pieces(pieces))))
    assert isinstance(error, ContentMismatch)
    assert got == b"" or len(got) < sum(map(len, pieces))


@pytest.mark.anyio
async def test_a_whole_blob_asked_for_as_a_range_is_checked_too():
    headers = {"content-range": "bytes 0-4/5"}
    got, error = await collected(answering(httpx2.Response(206, headers=headers, stream=_Pieces([b"hellO"]))), 0, 99)
    assert isinstance(error, ContentMismatch)
    assert got == b""
    got, error = await collected(answering(httpx2.Response(206, headers=headers, stream=_Pieces([b"hello"]))), 0, 99)
    assert (got, error) == (b"hello", None)


@pytest.mark.anyio
async def test_a_node_that_ignores_ranges():
    for offset, length in ((0, 2), (2, 2), (4, 9), (5, 1), (9, 9)):
        got, error = await collected(answering(httpx2.Response(200, stream=_Pieces([b"he", b"llo"]))), offset, length)
        assert (got, error) == (b"hello"[offset : offset + length], None)


@pytest.mark.anyio
@pytest.mark.parametrize("answer", ["bytes 0-1/5", "bytes 3-4/5", "nonsense", ""])
async def test_another_range_than_asked_for(answer):
    headers = {"content-range": answer}
    got, error = await collected(answering(httpx2.Response(206, headers=headers, stream=_Pieces([b"he"]))), 1, 2)
    assert isinstance(error, ContentMismatch)
    assert got == b""


@pytest.mark.anyio
async def test_a_cut_connection():
    cut = httpx2.RemoteProtocolError("peer closed connection")
    got, error = await collected(answering(httpx2.Response(200, stream=_Pieces([b"hel"], cut))))
    assert isinstance(error, Unavailable)
    assert got in (b"", b"hel")
    for failure in (httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow"), httpx2.WriteError("reset")):
        with pytest.raises(Unavailable):
            await answering(failure).stat(HELLO)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [StorageFull("full"), Unavailable("disk", retry_after=9), Forbidden("no"), TooManyRequests("wait")]
)
async def test_errors_come_back_as_their_classes(error):
    answer = problem(error)

    def response() -> httpx2.Response:
        return reply(answer.status_code, answer.body)

    store = answering(*(response() for _ in range(4)))
    for attempt in (put(store, b"hello"), content(store, HELLO), store.list(), store.delete(HELLO)):
        with pytest.raises(type(error)) as caught:
            await attempt
        assert caught.value.message == error.message
        assert getattr(caught.value, "retry_after", None) == getattr(error, "retry_after", None)


@pytest.mark.anyio
async def test_what_is_gone_counts_as_absent():
    assert await answering(reply(410)).stat(HELLO) is None
    with pytest.raises(Gone):
        await content(answering(reply(410)), HELLO)
    with pytest.raises(NotFound):
        await content(answering(reply(404)), HELLO)


@pytest.mark.anyio
async def test_answers_that_are_none():
    for answer in (reply(302, location="http://other.example"), reply(500)):
        with pytest.raises(Unavailable):
            await answering(answer).stat(HELLO)
    with pytest.raises(Unavailable):
        await answering(reply(200, content_length="-1")).stat(HELLO)
    a, b = "a" * 40, "b" * 40
    rows = [{"sha1": b, "size": 1}, {"sha1": a, "size": 1}]
    for body in (
        {},
        [],
        {"blobs": 3},
        {"blobs": rows},
        {"blobs": [{"sha1": "x", "size": 1}]},
        {"blobs": [{"sha1": a}]},
    ):
        with pytest.raises(Unavailable):
            await answering(reply(200, body)).list()
    with pytest.raises(Unavailable):
        await answering(reply(200, b"[" * 100_000)).list()
    with pytest.raises(Unavailable):
        again = {"blobs": [{"sha1": a, "size": 1}], "next": a}
        await answering(reply(200, again), reply(200, again)).list()


def test_the_empty_name_is_what_sha1_says():
    assert Sha1(hashlib.sha1().hexdigest()) == Sha1("da39a3ee5e6b4b0d3255bfef95601890afd80709")
