"""Manifests against the recorded golden files, and the checks that the recorded program lacks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kachery_lab.core.hashing import CHUNK_SIZE, StreamHasher
from kachery_lab.core.manifests import MAX_CHUNKS, manifest_bytes, parse_manifest
from kachery_lab.errors import InvalidInput

VECTORS = Path(__file__).parents[1] / "vectors"
FILES = json.loads((VECTORS / "manifests.json").read_text("utf-8"))["files"]
A, B, C = "a" * 40, "b" * 40, "c" * 40


def generated(size: int) -> bytes:
    period = bytes((i * 7 + i // 256) % 256 for i in range(65536))
    return (period * (size // 65536 + 1))[:size]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file["size"]))
def test_recorded(file):
    data = generated(file["size"])
    assert data[:16].hex() == file["first16BytesHex"]
    hasher = StreamHasher(want_sha256=False, want_chunks=True)
    for start in range(0, len(data), 1 << 20):
        hasher.update(memoryview(data)[start : start + (1 << 20)])
    assert hasher.sha1() == file["sha1"]
    chunks = hasher.chunks()
    assert (len(chunks) > 1) is (file["manifestSha1"] is not None)
    if file["manifestSha1"] is not None:
        text = manifest_bytes(hasher.size, hasher.sha1(), chunks)
        assert text == file["manifestText"].encode()
        assert len(text) == file["manifestLength"]
        assert hashlib.sha1(text).hexdigest() == file["manifestSha1"]
        manifest = parse_manifest(text)
        assert (manifest.size, manifest.sha1, list(manifest.chunks)) == (hasher.size, hasher.sha1(), chunks)


def manifest(**changes):
    chunks = [{"start": 0, "end": CHUNK_SIZE, "sha1": B}, {"start": CHUNK_SIZE, "end": CHUNK_SIZE + 1, "sha1": C}]
    return {"size": CHUNK_SIZE + 1, "sha1": A, "chunks": chunks} | changes


def test_accepts():
    assert parse_manifest(json.dumps(manifest(), indent=1).encode()).size == CHUNK_SIZE + 1
    assert parse_manifest(manifest_bytes(0, A, [])).chunks == ()


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        manifest(extra=1),
        manifest(size=CHUNK_SIZE),
        manifest(size=-1),
        manifest(size="1"),
        manifest(sha1=A.upper()),
        manifest(chunks={}),
        manifest(chunks=[]),
        manifest(chunks=[1]),
        manifest(chunks=[{"start": 1, "end": CHUNK_SIZE + 1, "sha1": B}]),
        manifest(chunks=[{"start": 0, "end": CHUNK_SIZE, "sha1": B}, {"start": 5, "end": CHUNK_SIZE + 1, "sha1": C}]),
        manifest(chunks=[{"start": 0, "end": CHUNK_SIZE + 1, "sha1": B, "x": 1}]),
        manifest(chunks=[{"start": 0, "end": CHUNK_SIZE + 1}]),
        manifest(size=0, chunks=[{"start": 0, "end": 0, "sha1": B}]),
        manifest(size=5, chunks=[{"start": 0, "end": 9, "sha1": B}, {"start": 9, "end": 5, "sha1": B}]),
        manifest(size=2 * 10**9, chunks=[{"start": 0, "end": 2 * 10**9, "sha1": B}]),
    ],
    ids=lambda value: json.dumps(value)[-60:],
)
def test_refuses(value):
    with pytest.raises(InvalidInput):
        parse_manifest(json.dumps(value).encode())


def test_refuses_absurdly_many_chunks(monkeypatch):
    monkeypatch.setattr("kachery_lab.core.manifests.MAX_CHUNKS", 1)
    with pytest.raises(InvalidInput, match="the most is 1"):
        parse_manifest(json.dumps(manifest()).encode())
    assert MAX_CHUNKS == 1_000_000
