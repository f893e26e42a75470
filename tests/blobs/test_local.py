"""Directories of the volume that somebody removes while the server runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.blobs.receive import store_bytes
from kachery_lab.core.hashing import sha1_of
from kachery_lab.core.ids import Sha1
from tests.servers import RunningNode

BLOBS = [bytes([number]) * 100 for number in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalBlobStore]:
    (tmp_path / "tmp").mkdir()
    disk = Disk()
    made = LocalBlobStore(StorageLayout(tmp_path), disk)
    for data in BLOBS:
        store_bytes(made, data)
    yield made
    disk.close()


def test_a_trash_that_was_emptied_takes_the_next_blob(store: LocalBlobStore) -> None:
    for data in BLOBS:
        sha1 = sha1_of(data)
        assert store.throw_away(sha1)
        assert not os.path.exists(store.layout.blob(sha1))
        assert [path.name for path in store.layout.trash.rglob("*") if path.is_file()] == [sha1]
        shutil.rmtree(store.layout.trash)
    assert not store.throw_away(sha1_of(BLOBS[0]))


def test_a_quarantine_that_was_emptied_takes_the_next_blob(store: LocalBlobStore) -> None:
    for data in BLOBS:
        store.set_aside(sha1_of(data))
        assert store.quarantined(sha1_of(data))
        shutil.rmtree(store.layout.quarantine)
    with pytest.raises(FileNotFoundError):
        store.set_aside(sha1_of(BLOBS[0]))


@pytest.mark.parametrize("gone", ["sha1", "tmp"])
def test_links_and_blobs_find_their_way_again(store: LocalBlobStore, gone: str) -> None:
    sha1 = Sha1("ab" * 20)
    store.write_link(sha1, b"first")
    shutil.rmtree(store.layout.root / gone)
    store.write_link(sha1, b"second")
    assert Path(store.layout.link(sha1)).read_bytes() == b"second"
    shutil.rmtree(store.layout.root / gone)
    assert store_bytes(store, b"after").new


def test_a_deletion_holds_when_the_trash_was_removed(node: RunningNode) -> None:
    for data in BLOBS:
        sha1 = node.store(data).json()["sha1"]
        address = f"/api/v1/blobs/{sha1}"
        assert node.request("GET", address, auth=node.admin_token).status == 200
        assert node.request("DELETE", address, auth=node.admin_token).status == 204
        shutil.rmtree(node.storage / "sha1-trash")
        assert node.request("GET", address, auth=node.admin_token).status == 404
