"""Directories of older kachery clients, read-only: where one of them would have a file with a given SHA-1.

Three layouts are known: `sha1/aa/bb/cc/<sha1>` with link records beside (`<sha1>.link`, kachery-client), the same with
`linked_files/sha1/aa/bb/cc/<sha1>` (kachery-cloud), and the flat `sha1/<sha1>` of KACHERY_STORE_FILE_DIR. A file found
there is nothing but a candidate until it is hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from kachery_lab.blobs.base import PIECE
from kachery_lab.blobs.files import OpenFile
from kachery_lab.blobs.layout import shard
from kachery_lab.blobs.links import LinkPolicy, LinkRecord, open_named
from kachery_lab.core import strict_json
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Forbidden, InvalidInput

MAX_RECORD = 64 * 1024

Candidate = tuple[str, OpenFile]
"""The path, and the file open for reading, which whoever takes it closes."""


def candidates(policy: LinkPolicy, roots: list[Path], sha1: Sha1) -> Iterator[Candidate]:
    """Blocking: the files that one of the directories has under this name, one after the other. A record
    that names what may not be opened is passed over; an OSError other than absence ends the search, for an unreachable
    directory is not an empty one."""
    for root in roots:
        places: list[Callable[[Path, Sha1], Candidate]] = [
            lambda root, sha1: _plain(policy, root, f"sha1/{shard(sha1)}/{sha1}"),
            lambda root, sha1: _plain(policy, root, f"sha1/{sha1}"),
            lambda root, sha1: _linked(policy, root, f"linked_files/sha1/{shard(sha1)}/{sha1}", _cloud_record),
            lambda root, sha1: _linked(policy, root, f"sha1/{shard(sha1)}/{sha1}.link", _link_record),
        ]
        for place in places:
            try:
                found = place(root, sha1)
            except (FileNotFoundError, NotADirectoryError, InvalidInput, Forbidden):
                continue
            yield found


def _plain(policy: LinkPolicy, root: Path, relative: str) -> Candidate:
    return f"{root}/{relative}", policy.open_below(root, relative)


def _linked(policy: LinkPolicy, root: Path, relative: str, parse: Callable[[bytes], tuple[str, int]]) -> Candidate:
    """The file that a link record names, by the rules for links; it must have the recorded size."""
    record = policy.open_below(root, relative)
    try:
        path, size = parse(record.read(0, min(record.fingerprint.size, MAX_RECORD)))
    finally:
        record.close()
    file = open_named(policy, path)
    if file.fingerprint.size != size:
        file.close()
        raise InvalidInput("the linked file has another size now")
    return path, file


def _cloud_record(data: bytes) -> tuple[str, int]:
    found = strict_json.loads(data)
    path, size = (found.get("path"), found.get("size")) if isinstance(found, dict) else (None, None)
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool):
        raise InvalidInput("a link record needs a text `path` and a number `size`")
    return path, size


def _link_record(data: bytes) -> tuple[str, int]:
    record = LinkRecord.from_bytes(data)
    return record.path, record.size


def hash_counting(file: OpenFile, count: Callable[[int], None]) -> tuple[Sha1, str]:
    """Blocking: SHA-1 and SHA-256 of a whole file; `count` is told the bytes of each piece. Raises OSError."""
    sha1, sha256 = hashlib.sha1(usedforsecurity=False), hashlib.sha256()
    for offset in range(0, file.fingerprint.size, PIECE):
        piece = file.read(offset, min(PIECE, file.fingerprint.size - offset))
        sha1.update(piece)
        sha256.update(piece)
        count(len(piece))
    return Sha1(sha1.hexdigest()), sha256.hexdigest()
