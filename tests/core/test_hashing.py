"""Stream hashes and chunk lists, and the hashes of JSON values."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_lab.core import hashing
from kachery_lab.core.hashing import Chunk, StreamHasher

VECTORS = Path(__file__).parents[1] / "vectors"
TASKS = json.loads((VECTORS / "task_hashes.json").read_text("utf-8"))["cases"]
CLIENT_TASKS = json.loads((VECTORS / "task_hashes_python_client.json").read_text("utf-8"))["cases"]


def expected_chunks(data: bytes, size: int) -> list[Chunk]:
    return [
        Chunk(start, min(start + size, len(data)), hashlib.sha1(data[start : start + size]).hexdigest())
        for start in range(0, len(data), size)
    ]


@settings(deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, 25), max_size=8), st.booleans())
def test_any_split_gives_the_same(data, cuts, as_views):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "CHUNK_SIZE", 10)
        hasher = StreamHasher(want_sha256=True, want_chunks=True)
        view, position = memoryview(data), 0
        for cut in [*cuts, len(data)]:
            piece = view[position : position + cut]
            hasher.update(piece if as_views else bytes(piece))
            position += len(piece)
        assert hasher.size == len(data)
        assert hasher.sha1() == hashlib.sha1(data).hexdigest()
        assert hasher.sha256() == hashlib.sha256(data).hexdigest()
        assert hasher.chunks() == hasher.chunks() == expected_chunks(data, 10)


@pytest.mark.parametrize("size", [0, 1, 2046, 2047, 2048, 4094, 4095, 4096, 8187, 8188, 8189, 20_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_pieces_of_every_size(size: int, kind: type) -> None:
    data = bytes(number % 251 for number in range(size))
    hasher = StreamHasher(want_sha256=True, want_chunks=False)
    hasher.update(kind(data))
    assert (hasher.sha1(), hasher.sha256()) == (hashlib.sha1(data).hexdigest(), hashlib.sha256(data).hexdigest())
    assert hashing.sha1_of(data) == hasher.sha1()


def test_two_threads_can_share_the_work(monkeypatch):
    monkeypatch.setattr(hashing, "CHUNK_SIZE", 3000)
    data = bytes(range(256)) * 64
    hasher = StreamHasher(want_sha256=False, want_chunks=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda half: half.update(data), [hasher.whole, hasher.later]))
    assert hasher.sha1() == hashlib.sha1(data).hexdigest()
    assert hasher.chunks() == expected_chunks(data, 3000)


def test_what_is_not_wanted_is_absent():
    hasher = StreamHasher(want_sha256=False, want_chunks=False)
    hasher.update(b"x")
    assert hasher.sha256() is None
    assert hasher.chunks() == []


@pytest.mark.parametrize("case", TASKS, ids=lambda case: case["kwargsJson"])
def test_task_hashes(case):
    assert hashing.task_hash(case["taskFunctionId"], json.loads(case["kwargsJson"])) == case["taskHash"]


@pytest.mark.parametrize("case", CLIENT_TASKS, ids=lambda case: case["kwargsJson"])
def test_task_hashes_for_the_python_client(case):
    computed = hashing.task_hash(case["taskFunctionId"], json.loads(case["kwargsJson"]))
    assert computed == case["daemonHash"]
    assert (computed == case["clientHash"]) is case["same"]
