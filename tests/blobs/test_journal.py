"""The log on the volume: what was acknowledged is read back, what was not never appears, damage stops the start."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.blobs import journal as module
from kachery_lab.blobs.journal import START, Journal, Position, decode, encode
from kachery_lab.errors import StartRefused

RECORDS = [b'{"n":%d,"text":"%s"}' % (number, b"x" * (number * 7)) for number in range(6)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def opened() -> Iterator[Callable[..., Journal]]:
    """Opens journals; they are closed at the end."""
    journals: list[Journal] = []

    def open_(directory: Path, known: Position = START) -> Journal:
        journal = Journal(directory)
        journals.append(journal)
        journal.open(known)
        return journal

    yield open_
    for journal in journals:
        journal.close()


def records(journal: Journal, start: Position = START) -> list[bytes]:
    return [record for _, record in journal.read(start)]


def segment(directory: Path, number: int = 1) -> Path:
    return directory / f"{number:08d}.log"


def test_a_new_log_is_empty_and_private(directory, opened):
    journal = opened(directory)
    assert journal.end == START
    assert records(journal) == []
    assert directory.stat().st_mode & 0o777 == 0o700
    assert segment(directory).stat().st_mode & 0o777 == 0o600


def test_what_was_appended_is_read_back_from_any_position(directory, opened):
    journal = opened(directory)
    ends = [journal.append([record]) for record in RECORDS[:3]]
    ends.append(journal.append(RECORDS[3:]))
    assert ends == sorted(ends)
    assert journal.end == ends[-1]
    for again in (journal, opened(directory), opened(directory, ends[1])):
        assert again.end == ends[-1]
        assert records(again) == RECORDS
        assert [position for position, _ in again.read()][:3] == ends[:3]
        assert records(again, ends[1]) == RECORDS[2:]
        assert records(again, ends[-1]) == []


@given(st.binary().filter(lambda data: b"\n" not in data))
def test_one_line_for_each_record(record):
    line = encode(record)
    assert line.count(b"\n") == 1
    assert decode(line) == record
    assert decode(line[:-1]) is None
    for index in range(len(line)):
        altered = bytearray(line)
        altered[index] ^= 0x01
        # Upper and lower case of a hex digit are the same digit; no other change may pass.
        assert decode(bytes(altered)) in (None, record)
        if index >= 8:
            assert decode(bytes(altered)) is None


def test_positions_are_text_and_ordered():
    assert Position.parse(str(Position(3, 17))) == Position(3, 17)
    assert Position(1, 99) < Position(2, 0) < Position(2, 5)


@pytest.mark.parametrize("cut", range(1, len(encode(RECORDS[5]))))
def test_a_torn_tail_is_cut(directory, opened, cut):
    journal = opened(directory)
    good = journal.append(RECORDS[:5])
    journal.append(RECORDS[5:])
    whole = segment(directory).read_bytes()
    segment(directory).write_bytes(whole[:-cut])
    again = opened(directory, START if cut % 2 else good)
    assert again.end == good
    assert segment(directory).stat().st_size == good.offset
    assert records(again) == RECORDS[:5]
    again.append([b'"next"'])
    assert records(opened(directory)) == [*RECORDS[:5], b'"next"']


def test_a_tail_of_zeros_is_cut(directory, opened):
    """What some file systems leave of a write whose size reached the disk and whose bytes did not."""
    good = opened(directory).append(RECORDS)
    with segment(directory).open("ab") as file:
        file.write(bytes(5000))
    again = opened(directory)
    assert again.end == good
    assert segment(directory).stat().st_size == good.offset


@pytest.mark.parametrize("where", ["first", "middle"])
def test_a_damaged_middle_is_refused_and_nothing_is_cut(directory, opened, where):
    journal = opened(directory)
    ends = [journal.append([record]) for record in RECORDS]
    data = bytearray(segment(directory).read_bytes())
    at = 12 if where == "first" else ends[2].offset + 12
    data[at] ^= 0x20
    segment(directory).write_bytes(data)
    with pytest.raises(StartRefused, match=re.escape(str(segment(directory)))) as caught:
        opened(directory)
    assert "backup" in str(caught.value.hint)
    assert segment(directory).read_bytes() == data
    # Who knows the log up to behind the damage does not look there again, unless it reads it.
    known = opened(directory, ends[3])
    assert known.end == ends[-1]
    assert records(known, ends[3]) == RECORDS[4:]
    with pytest.raises(StartRefused):
        records(known)


def test_a_log_that_is_older_than_its_index_is_refused(directory, opened):
    journal = opened(directory)
    end = journal.append(RECORDS)
    with pytest.raises(StartRefused) as caught:
        list(journal.read(Position(end.segment, end.offset + 10)))
    assert "reindex" in str(caught.value.hint)


def test_the_next_segment(directory, opened, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 100)
    journal = opened(directory)
    ends = [journal.append([record]) for record in RECORDS]
    assert journal.segments() == list(range(1, ends[-1].segment + 1))
    assert ends[-1].segment > 1
    assert ends == sorted(ends)
    for again in (journal, opened(directory), opened(directory, ends[2])):
        assert again.end == ends[-1]
        assert records(again) == RECORDS
        assert records(again, ends[1]) == RECORDS[2:]
    # A torn tail is one of the newest segment only; in an older one it is damage.
    first = segment(directory)
    first.write_bytes(first.read_bytes()[:-3])
    with pytest.raises(StartRefused):
        records(opened(directory))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_nothing(directory, opened, monkeypatch, number):
    journal = opened(directory)
    good = journal.append(RECORDS[:2])
    real, written = os.write, 0

    def half(fd: int, data: bytes) -> int:
        nonlocal written
        written += real(fd, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=os.strerror(number)):
        journal.append(RECORDS[2:4])
    assert journal.end == good
    monkeypatch.setattr(os, "write", real)
    # Cut at once: whole lines that were refused would count as records after a restart.
    assert written > 0
    assert segment(directory).stat().st_size == good.offset
    journal.append(RECORDS[4:])
    assert records(journal) == RECORDS[:2] + RECORDS[4:]
    assert records(opened(directory)) == RECORDS[:2] + RECORDS[4:]


def test_a_failed_flush_leaves_nothing_and_is_not_repeated_on_that_descriptor(directory, opened, monkeypatch):
    journal = opened(directory)
    good = journal.append(RECORDS[:1])
    real, flushed, broken = os.fsync, [], True

    def failing(fd: int) -> None:
        flushed.append(os.fstat(fd).st_ino and fd)
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError):
        journal.append(RECORDS[1:2])
    failed = flushed[0]
    # While it cannot be repaired nothing is appended behind it.
    with pytest.raises(OSError):
        journal.append(RECORDS[2:3])
    assert journal.end == good
    broken = False
    flushed.clear()
    journal.append(RECORDS[3:])
    assert failed not in flushed
    assert records(journal) == RECORDS[:1] + RECORDS[3:]
    assert records(opened(directory)) == RECORDS[:1] + RECORDS[3:]
