"""Link records: which are used, as recorded with the older daemon and client, and which files may be opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kachery_lab.blobs.links import MTIME_TOLERANCE, LinkPolicy, LinkRecord, open_linked
from kachery_lab.core.ids import FileKey, Sha1
from kachery_lab.errors import Forbidden, Gone, InvalidInput, LinkChanged, NotFound
from kachery_lab.node import Node, open_node
from kachery_lab.services.principals import OPERATOR
from kachery_lab.settings import Settings

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "link_files.json").read_text("utf-8"))["cases"]
NAMES = [case["name"] for case in VECTORS]

SERVED_ALTHOUGH_THE_CLIENT_DOES_NOT = {
    "recorded mtime differs by 1 ms": "times lose up to 2 ms between file systems and JSON; the content is hashed here",
}
NOT_SERVED_ALTHOUGH_THE_CLIENT_DOES = {
    "manifestSha1 missing": "a record without that field is none, for the older daemon too",
    "manifest_hash instead of manifestSha1": "a record without that field is none, for the older daemon too",
}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    for name in [name for name in os.environ if name.startswith("KACHERY_")]:
        monkeypatch.delenv(name)
    for name in ("storage", "metadata", "targets"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings(KACHERY_STORAGE_DIR=tmp_path / "storage", metadata_dir=tmp_path / "metadata")
    opened = open_node(settings)
    yield opened
    opened.release()


def prepared(case: dict[str, object], root: Path) -> tuple[Sha1, Path]:
    """The case on our volume: its own bytes under their SHA-1, outside the storage, with the recorded time."""
    number = VECTORS.index(case)
    data = b"" if case["name"] == "target is empty" else b"t%03d" % number
    target = root / "targets" / f"t{number}"
    text = str(case["linkFileText"]).replace("<STORAGE>", str(root))
    if case["name"] != "target does not exist":
        target.write_bytes(data)
    try:
        mtime = json.loads(text)["stat"]["mtime"]
    except (ValueError, KeyError, TypeError):
        mtime = None
    if isinstance(mtime, float) and target.exists():
        shift = 0.001 if case["name"] == "recorded mtime differs by 1 ms" else 0.0
        os.utime(target, (mtime - shift, mtime - shift))
    sha1 = Sha1(hashlib.sha1(b"regular" if "regular" in str(case["name"]) else data).hexdigest())
    place = root / "storage" / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / f"{sha1}.link"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    if "regular" in str(case["name"]):
        place.with_suffix("").write_bytes(b"regular")
    return sha1, target


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("case", VECTORS, ids=NAMES)
async def test_recorded_link_files(case: dict[str, object], node: Node, tmp_path: Path) -> None:
    sha1, target = prepared(case, tmp_path)
    name = str(case["name"])
    expected = case["clientLocalPath"]
    served = expected is not None and not str(expected).startswith("raises")
    served = (served or name in SERVED_ALTHOUGH_THE_CLIENT_DOES_NOT) and name not in NOT_SERVED_ALTHOUGH_THE_CLIENT_DOES
    if not served:
        with pytest.raises((NotFound, Gone)):
            await node.files.locate(FileKey(sha1), OPERATOR)
        return
    path = await node.files.locate(FileKey(sha1), OPERATOR)
    regular = str(tmp_path / "storage" / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1)
    assert path == (regular if name == "regular file and link both present" else str(target))
    assert hashlib.sha1(Path(path).read_bytes()).hexdigest() == sha1


def test_every_exception_is_a_case():
    assert {*SERVED_ALTHOUGH_THE_CLIENT_DOES_NOT, *NOT_SERVED_ALTHOUGH_THE_CLIENT_DOES} <= set(NAMES)


@pytest.mark.parametrize("mtime", [1795344698.5176933, 0.1 + 0.2, 1.5, 5e-324, 1795344698, 1e9 + 2**-22])
def test_times_survive_json_bit_for_bit(mtime):
    record = LinkRecord("/dir/ü", None, 3, mtime)
    text = record.to_bytes()
    assert json.loads(text) == {
        "path": "/dir/ü",
        "manifestSha1": None,
        "stat": {"size": 3, "mtime": mtime},
        "_writingProcess": "daemon",
    }
    assert LinkRecord.from_bytes(text).mtime == mtime


def test_tolerance(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    os.utime(path, (1000.0, 1000.0))
    record = LinkRecord(str(path), None, 3, 1000.0)
    assert record.fits(path.stat())
    for shift, fits in ((MTIME_TOLERANCE * 0.9, True), (MTIME_TOLERANCE * 1.5, False), (1.0, False)):
        assert replace(record, mtime=1000.0 + shift).fits(path.stat()) is fits
        assert replace(record, mtime=1000.0 - shift).fits(path.stat()) is fits
    assert not replace(record, size=4).fits(path.stat())


# -- which files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server runs as a user to whom none of these files belong."""
    monkeypatch.setattr(os, "getuid", lambda: 54321)


def test_what_is_opened(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    for name in ("f", "link"):
        file = LinkPolicy().open(str(tmp_path / name))
        assert file.read(0, 3) == b"abc"
        file.close()


@pytest.mark.parametrize("path", ["relative", "", "/x\0y", "/" + "x" * 5000])
def test_what_is_no_path(path):
    with pytest.raises(InvalidInput):
        LinkPolicy().open(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InvalidInput):
            LinkPolicy().open(str(path))
    with pytest.raises((OSError, InvalidInput)):
        LinkPolicy().open(str(tmp_path / "loop"))
    with pytest.raises(FileNotFoundError):
        LinkPolicy().open(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "path", ["/proc/self/environ", "/proc/version", "/sys/kernel/ostype", "/dev/null", "/dev/stdin"]
)
def test_the_machine_itself_is_closed(path):
    with pytest.raises((Forbidden, InvalidInput, FileNotFoundError)):
        LinkPolicy(roots=[Path("/")]).open(path)


def test_the_servers_own_files_are_closed(tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "private.pem").write_bytes(b"secret")
    (tmp_path / "way-in").symlink_to(storage)
    policy = LinkPolicy(roots=[tmp_path], forbidden=[storage])
    for path in (
        storage / "private.pem",
        tmp_path / "way-in" / "private.pem",
        tmp_path / "x" / ".." / "storage" / "private.pem",
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(Forbidden):
            policy.open(str(path))


def test_files_of_others(tmp_path, others):
    path = tmp_path / "d" / "f"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    path.chmod(0o600)
    for own_files_only in (True, False):
        with pytest.raises(Forbidden) as caught:
            LinkPolicy(own_files_only=own_files_only).open(str(path))
        assert "KACHERY_LAB_LINK_ROOTS" in str(caught.value.hint)
    LinkPolicy(roots=[tmp_path]).open(str(path)).close()
    with pytest.raises(Forbidden):
        LinkPolicy(roots=[tmp_path / "other"]).open(str(path))


def test_own_files_when_one_person_uses_the_node(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    path.chmod(0o600)
    LinkPolicy(own_files_only=True).open(str(path)).close()
    with pytest.raises(Forbidden):
        LinkPolicy(own_files_only=False).open(str(path))


def test_paths_of_the_host(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "f").write_bytes(b"abc")
    policy = LinkPolicy(path_map={"/host/data": str(tmp_path / "in")})
    file = policy.open("/host/data/f")
    assert file.read(0, 3) == b"abc"
    file.close()
    assert policy.server_path("/host/database/f") == "/host/database/f"
    assert policy.server_path("/host/data") == str(tmp_path / "in")


def test_a_linked_file_that_is_gone(tmp_path):
    record = LinkRecord(str(tmp_path / "f"), None, 3, 1000.0)
    with pytest.raises(LinkChanged):
        open_linked(LinkPolicy(), record)
    (tmp_path / "f").write_bytes(b"abc")
    file, fits = open_linked(LinkPolicy(), record)
    file.close()
    assert not fits
