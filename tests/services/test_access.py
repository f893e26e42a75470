"""Who a caller is: rotating codes, additional codes, and what wrong ones cost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_lab.blobs.disk import Disk
from kachery_lab.core.ids import UserName
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import migrate
from kachery_lab.errors import TooManyRequests, Unauthenticated, Unavailable
from kachery_lab.services import access as module
from kachery_lab.services.access import WRONG_LIMIT, AccessService, WrongCounter
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.tokens import TokenService

PEER = "192.0.2.7"


class Door:
    """An access service on a directory."""

    def __init__(self, root: Path) -> None:
        migrate(root / "db", backup_dir=root / "backups")
        self.file = root / "client-auth"
        self.database = Database.open(root / "db")
        self.disk = Disk()
        data = AccessData(self.database, self.disk, root / "access.json")
        self.tokens = TokenService(self.database, data, AuditService(self.database, 1))
        self.tokens.load()
        self.another_volume = False
        self.service = self.another()

    def another(self) -> AccessService:
        """The service of the next run."""
        return AccessService(self.tokens, self.disk, self.file, None, self.check_volume)

    def check_volume(self) -> None:
        if self.another_volume:
            raise Unavailable("another volume")

    @property
    def code(self) -> str:
        return self.file.read_text()

    def close(self) -> None:
        self.database.close()
        self.disk.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made = Door(tmp_path)
    yield made
    made.close()


def opens(service: AccessService, code: str) -> bool:
    try:
        return service.by_code(code, PEER).kind == "local"
    except (Unauthenticated, TooManyRequests):
        return False


def test_the_file(door: Door) -> None:
    asyncio.run(door.service.start())
    assert len(door.code) == 12
    assert door.code.isascii()
    assert door.code.isalpha()
    assert door.file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in door.file.parent.glob("client-auth*")) == ["client-auth"]
    principal = door.service.by_code(door.code, PEER)
    assert (principal.kind, principal.peer) == ("local", PEER)


def test_rotation_keeps_the_previous_code_and_no_older_one(door: Door) -> None:
    async def work() -> list[str]:
        await door.service.start()
        codes = [door.code]
        for _ in range(3):
            await door.service.rotate()
            codes.append(door.code)
        return codes

    codes = asyncio.run(work())
    assert len(set(codes)) == 4
    assert [opens(door.service, code) for code in codes] == [False, False, True, True]


def test_a_new_code_is_valid_before_it_can_be_read(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def write(path: Path, data: bytes, mode: int, **more: object) -> None:
        seen.append(opens(door.service, data.decode()))

    monkeypatch.setattr(module, "write_file", write)
    asyncio.run(door.service.rotate())
    assert seen == [True]


def test_the_code_of_the_previous_run_is_accepted(door: Door) -> None:
    asyncio.run(door.service.start())
    before = door.code
    following = door.another()
    asyncio.run(following.start())
    assert door.code != before
    assert opens(following, before)
    asyncio.run(following.rotate())
    assert not opens(following, before)


@pytest.mark.parametrize("content", [b"", b"short", b"with space ab", b"x" * 13, b"\xff" * 12, b"klk_aaaaaaaa"])
def test_anything_else_in_the_file_is_no_code(door: Door, content: bytes) -> None:
    door.file.write_bytes(content)
    asyncio.run(door.service.start())
    assert not opens(door.service, content.decode("latin-1"))
    assert opens(door.service, door.code)


def test_a_volume_that_cannot_be_written_leaves_the_codes(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROTATION_SECONDS", 0.01)

    async def work() -> str:
        await door.service.start()
        code = door.code

        def write(*_: object, **__: object) -> None:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(module, "write_file", write)
        with pytest.raises(Unavailable):
            await door.service.rotate()
        rotating = asyncio.create_task(door.service.keep_rotating())
        await asyncio.sleep(0.2)
        assert not rotating.done()
        rotating.cancel()
        return code

    code = asyncio.run(work())
    assert door.code == code
    assert opens(door.service, code)


def test_no_code_is_written_to_another_volume(door: Door) -> None:
    async def work() -> str:
        await door.service.start()
        before = door.code
        door.another_volume = True
        with pytest.raises(Unavailable):
            await door.service.rotate()
        return before

    assert asyncio.run(work()) == door.code


def test_additional_codes(door: Door) -> None:
    asyncio.run(door.service.start())
    door.service.set_other_codes(["browser1", "", 3, None])
    assert door.service.by_code("browser1", PEER).kind == "browser"
    for wrong in ("", "3", "None", None):
        with pytest.raises(Unauthenticated):
            door.service.by_code(wrong, PEER)
    for nothing in ([], None, "browser1", {"browser1": 1}):
        door.service.set_other_codes(["browser1"])
        door.service.set_other_codes(nothing)
        with pytest.raises(Unauthenticated):
            door.service.by_code("browser1", PEER)


def test_wrong_codes_are_counted_and_right_ones_served(door: Door) -> None:
    asyncio.run(door.service.start())
    _, secret = asyncio.run(door.tokens.create(OPERATOR, UserName("ada"), ["client"]))
    for number in range(WRONG_LIMIT):
        with pytest.raises(Unauthenticated):
            door.service.by_code(f"wrong{number:07}", PEER)
    for attempt in (
        lambda: door.service.by_code("wrongagain12", PEER),
        lambda: door.service.by_token("klk_wrong", PEER),
        lambda: door.service.by_code("klk_wrong", PEER),
    ):
        with pytest.raises(TooManyRequests) as caught:
            attempt()
        assert 1 <= caught.value.retry_after <= 61
    # Whatever an address sent before: a class behind one router must not be locked out by one guesser.
    assert opens(door.service, door.code)
    assert door.service.by_token(secret, PEER).name == "ada"
    assert door.service.by_code(secret, PEER).name == "ada"
    with pytest.raises(Unauthenticated):
        door.service.by_code("wrongagain12", "192.0.2.8")
    # A missing credential is no guess.
    with pytest.raises(Unauthenticated):
        door.service.by_code(None, PEER)


def test_the_count_ends_with_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    counter, error = WrongCounter(2, 10.0), Unauthenticated("no")
    assert [type(counter.refuse(PEER, error)) for _ in range(3)] == [Unauthenticated, Unauthenticated, TooManyRequests]
    now += 9.9
    assert isinstance(counter.refuse(PEER, error), TooManyRequests)
    now += 0.2
    assert counter.refuse(PEER, error) is error


def test_the_count_is_of_few_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ADDRESSES", 3)
    counter = WrongCounter(1, 10.0)
    for number in range(10):
        counter.refuse(f"192.0.2.{number}", Unauthenticated("no"))
    assert len(counter._seen) == 3
