"""Manifests: the list of chunks of a blob of more than 20,000,000 bytes, itself a blob (spec/storage-layout.md
section 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from kachery_lab.core import strict_json
from kachery_lab.core.hashing import Chunk
from kachery_lab.core.ids import Sha1, parse_fields, parse_whole_number
from kachery_lab.errors import InvalidInput

MAX_CHUNKS = 1_000_000
MAX_CHUNK_BYTES = 1_000_000_000
MAX_MANIFEST_BYTES = 160 * MAX_CHUNKS

_MANIFEST_FIELDS = frozenset({"size", "sha1", "chunks"})
_CHUNK_FIELDS = frozenset({"start", "end", "sha1"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """A file of `size` bytes with SHA-1 `sha1`, and its chunks in order without gap or overlap."""

    size: int
    sha1: Sha1
    chunks: tuple[Chunk, ...]


def manifest_bytes(size: int, sha1: str, chunks: Iterable[tuple[int, int, str]]) -> bytes:
    """The exact bytes whose SHA-1 is the `manifestSha1` of every client. The keys are in wire order, not sorted."""
    value = {
        "size": size,
        "sha1": sha1,
        "chunks": [{"start": start, "end": end, "sha1": chunk_sha1} for start, end, chunk_sha1 in chunks],
    }
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest; raises InvalidInput unless it is one that can be followed.

    Exactly the known fields; chunks start at 0, follow one another and end at `size`; at most 1,000,000 chunks of 1
    to 1,000,000,000 bytes. White space and key order do not matter. That `sha1` is the wanted file is the caller's
    check.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"manifest: {len(data)} bytes; the most is {MAX_MANIFEST_BYTES}")
    fields = parse_fields(strict_json.loads(data), "manifest", _MANIFEST_FIELDS, frozenset())
    size = parse_whole_number(fields["size"], "manifest.size")
    sha1 = Sha1.parse(fields["sha1"], "manifest.sha1")
    items = fields["chunks"]
    if not isinstance(items, list):
        raise InvalidInput("manifest.chunks: expected an array")
    if len(items) > MAX_CHUNKS:
        raise InvalidInput(f"manifest.chunks: {len(items)} chunks; the most is {MAX_CHUNKS}")
    chunks = []
    position = 0
    for index, item in enumerate(items):
        where = f"manifest.chunks[{index}]"
        chunk = parse_fields(item, where, _CHUNK_FIELDS, frozenset())
        start = parse_whole_number(chunk["start"], f"{where}.start")
        end = parse_whole_number(chunk["end"], f"{where}.end")
        if start != position:
            raise InvalidInput(f"{where}: starts at {start}, but the chunks before it end at {position}")
        if not 0 < end - start <= MAX_CHUNK_BYTES:
            raise InvalidInput(f"{where}: expected 1 to {MAX_CHUNK_BYTES} bytes, got {end - start}")
        chunks.append(Chunk(start, end, Sha1.parse(chunk["sha1"], f"{where}.sha1")))
        position = end
    if position != size:
        raise InvalidInput(f"manifest: the chunks end at {position}, but the size is {size}")
    return Manifest(size, sha1, tuple(chunks))
