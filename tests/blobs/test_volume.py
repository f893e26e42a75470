"""Guards of the storage directory: which volume it is, who writes to it, whether it can be written at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kachery_lab.blobs import volume
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.blobs.volume import (
    Process,
    ProcessLock,
    VolumeOwner,
    ensure_directory,
    group_id,
    read_volume_id,
    require_writable,
    write_volume_id,
)
from kachery_lab.errors import StartRefused


@pytest.fixture
def layout(tmp_path: Path) -> StorageLayout:
    return StorageLayout(tmp_path)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(volume, "HEARTBEAT", 0.05)
    monkeypatch.setattr(volume, "STALE", 0.4)


def written(layout: StorageLayout) -> dict[str, object]:
    return json.loads(layout.owner_process.read_text())


def of_another_machine(layout: StorageLayout, **more: object) -> dict[str, object]:
    text = {"host": "other", "pid": 7, "boot": "another-boot", "beat": 3, "at": time.time(), "released": False, **more}
    layout.owner_process.write_text(json.dumps(text).ljust(512))
    return text


def test_the_id_is_made_once_and_read_back(layout):
    assert read_volume_id(layout) is None
    made = write_volume_id(layout)
    assert len(made) == 32
    assert read_volume_id(layout) == made
    assert layout.volume_id.stat().st_mode & 0o777 == 0o644
    assert write_volume_id(StorageLayout(layout.root)) != made


def test_an_unreadable_id_is_not_an_absent_one(layout):
    layout.volume_id.mkdir()
    with pytest.raises(OSError):
        read_volume_id(layout)


def test_the_owner_is_written_down_and_released(layout):
    owner = VolumeOwner(layout)
    owner.acquire()
    me = Process.current()
    first = written(layout)
    assert (first["host"], first["pid"], first["boot"], first["released"]) == (me.host, me.pid, me.boot, False)
    owner.beat()
    assert written(layout)["beat"] == first["beat"] + 1
    owner.release()
    assert written(layout)["released"] is True
    owner.release()
    again = VolumeOwner(layout)
    again.acquire()
    again.release()


def test_another_process_of_this_machine_is_refused(layout):
    code = (
        "import sys, pathlib\n"
        "from kachery_lab.blobs.layout import StorageLayout\n"
        "from kachery_lab.blobs.volume import VolumeOwner\n"
        "VolumeOwner(StorageLayout(pathlib.Path(sys.argv[1]))).acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(layout.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StartRefused, match=f"process {process.pid} on"):
            VolumeOwner(layout).acquire()
        process.kill()
        process.wait(10)
        # A killed one holds nothing, and on the same boot nobody needs to be waited for.
        started = time.monotonic()
        owner = VolumeOwner(layout)
        owner.acquire()
        assert time.monotonic() - started < 1
        owner.release()
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def test_a_living_process_elsewhere_is_refused(layout, impatient):
    """Locks need not cross a network file system; a heartbeat that moves does."""
    text = of_another_machine(layout)
    stop = threading.Event()

    def live() -> None:
        beat = 3
        while not stop.wait(0.05):
            beat += 1
            layout.owner_process.write_text(json.dumps({**text, "beat": beat}).ljust(512))

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(StartRefused, match="process 7 on other"):
            VolumeOwner(layout).acquire()
    finally:
        stop.set()
        living.join()
    assert written(layout)["host"] == "other"


def test_a_dead_process_elsewhere_is_waited_for_once(layout, impatient):
    of_another_machine(layout)
    started = time.monotonic()
    owner = VolumeOwner(layout)
    owner.acquire()
    assert 0.4 <= time.monotonic() - started < 30
    assert written(layout)["pid"] == os.getpid()
    owner.release()


@pytest.mark.parametrize("more", [{"released": True}, {"at": time.time() - 100_000}])
def test_who_said_goodbye_or_is_long_gone_is_not_waited_for(layout, more):
    of_another_machine(layout, **more)
    started = time.monotonic()
    owner = VolumeOwner(layout)
    owner.acquire()
    assert time.monotonic() - started < 1
    owner.release()


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"boot": 3}', '{"boot": "b", "at": "never"}'])
def test_an_owner_file_that_says_nothing_stops_nobody(layout, impatient, text):
    layout.owner_process.write_text(text)
    owner = VolumeOwner(layout)
    owner.acquire()
    assert written(layout)["pid"] == os.getpid()
    owner.release()


def test_the_lock_names_its_holder(tmp_path):
    lock = ProcessLock(tmp_path / "lock")
    lock.acquire()
    with pytest.raises(StartRefused, match=f"process {os.getpid()} on"):
        ProcessLock(tmp_path / "lock").acquire()
    lock.release()
    again = ProcessLock(tmp_path / "lock")
    again.acquire()
    again.release()
    again.release()


def test_absent_directories(tmp_path, monkeypatch):
    made = tmp_path / "made"
    ensure_directory(made, mode=0o700)
    assert made.stat().st_mode & 0o777 == 0o700
    ensure_directory(made)
    with pytest.raises(StartRefused) as caught:
        ensure_directory(tmp_path / "a" / "b")
    assert "mkdir -p" in str(caught.value.hint)
    # A mount that is missing must not be written under.
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(StartRefused, match="mount point"):
        ensure_directory(tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StartRefused, match="cannot be written by user") as caught:
        require_writable(tmp_path)
    assert f"chown -R {os.getuid()}:{os.getgid()} {tmp_path}" in str(caught.value.hint)


def test_groups():
    assert group_id("1234") == 1234
    assert group_id("root") == 0
    with pytest.raises(StartRefused, match="no-such-group"):
        group_id("no-such-group")
