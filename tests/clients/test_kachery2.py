"""kachery 2.0.3, unmodified, in an environment and caches of its own, told the server's address, a zone and a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.zone_client import Lab, ZoneClient, running_lab

INITIATE = ("POST", "/api/initiateFileUpload", 200)
PUT = ("PUT", "/bucket/upload/", 200)
FINALIZE = ("POST", "/api/finalizeFileUpload", 200)
FIND = ("POST", "/api/findFile", 200)
GET = ("GET", "/sha1/", 200)
Person = Callable[..., ZoneClient]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    people = {"ann": ["provideFiles", "requestFiles"], "ben": ["requestFiles"], "eve": ["requestFeeds"]}
    with running_lab(tmp_path_factory.mktemp("kachery2")) as lab:
        lab.zone("lab.private", **people)
        lab.zone("lab.public", public=True, **people)
        yield lab


@pytest.fixture
def person(lab: Lab, tmp_path: Path) -> Person:
    """Makes people, each with a fresh cache."""
    made: list[ZoneClient] = []

    def make(user: str | None, zone: str = "lab.private", key: str | None = None) -> ZoneClient:
        key = lab.key(user) if user is not None else key
        made.append(ZoneClient(lab, tmp_path / f"person{len(made)}", zone, key))
        return made[-1]

    return make


STORE = """
import numpy as np
found = {
    'text': ka.store_text('h\\u00e9llo \\U0001f9e0', label='note.txt'),
    'empty': ka.store_text(''),
    'json': ka.store_json({'units': [1, 2.5, None], 'name': '\\u00e9'}, label='units.json'),
    'npy': ka.store_npy(np.arange(60_000, dtype=np.int16).reshape(3, -1)),
    'file': ka.store_file('recording.bin', label='a b:c.bin'),
}
answer(found)
"""
LOAD = """
import hashlib
import numpy as np
found = json.loads(%r)
npy = ka.load_npy(found['npy'])
assert (npy == np.arange(60_000, dtype=np.int16).reshape(3, -1)).all() and npy.dtype == np.int16
answer([
    ka.load_text(found['text']),
    ka.load_text(found['empty']),
    ka.load_json(found['json']),
    hashlib.sha1(open(ka.load_file(found['file']), 'rb').read()).hexdigest(),
    open(ka.load_file(found['file'], dest='copy.bin'), 'rb').read() == open(ka.load_file(found['file']), 'rb').read(),
    ka.load_bytes(found['file'], 5, 25) == open(ka.load_file(found['file']), 'rb').read()[5:25],
    ka.load_file_info(found['file']),
])
"""


@pytest.mark.parametrize("zone", ["lab.private", "lab.public"])
def test_store_and_load_all_kinds(lab: Lab, person: Person, zone: str) -> None:
    ann, ben = person("ann", zone), person("ben", zone)
    data = hashlib.sha512(zone.encode()).digest() * 40_000
    (ann.private / "recording.bin").write_bytes(data)
    before = lab.log_size()
    uris = ann.run(STORE)
    sha1 = hashlib.sha1(data).hexdigest()
    assert uris["file"] == f"kachery:{zone}:sha1:{sha1}:a%20b%3Ac.bin"
    assert [lab.requests(before).count(kind) for kind in (INITIATE, PUT, FINALIZE)] == [5, 5, 5]
    before = lab.log_size()
    assert ann.run(STORE) == uris
    assert lab.requests(before) == [INITIATE] * 5
    before = lab.log_size()
    text, empty, value, found, copied, part, info = ben.run(LOAD % json.dumps(uris))
    assert (text, empty, value) == ("héllo 🧠", "", {"units": [1, 2.5, None], "name": "é"})
    assert (found, copied, part) == (sha1, True, True)
    assert (info["size"], info["found"], "url" in info) == (len(data), True, False)
    seen = lab.requests(before)
    assert (seen.count(FIND), seen.count(GET), len(seen)) == (6, 5, 11)


def test_the_commands(lab: Lab, person: Person) -> None:
    ann, ben = person("ann"), person("ben")
    data = bytes(range(256)) * 5000
    (ann.private / "a.bin").write_bytes(data)
    uri = ann.command("kachery-store", "a.bin").stdout.decode().split()[-1]
    assert uri == f"kachery:lab.private:sha1:{hashlib.sha1(data).hexdigest()}:a.bin"
    assert ben.command("kachery-cat", uri).stdout == data
    path = ben.command("kachery-load", uri).stdout.decode().splitlines()[-1]
    assert Path(path).read_bytes() == data
    info = ben.command("kachery-load-info", uri)
    assert json.loads(info.stdout)["size"] == len(data)


def test_a_trailing_slash_in_the_address(person: Person) -> None:
    ann = person("ann")
    base = ann.variables["KACHERY_BASE_URL"] + "/"
    assert ann.run("answer(ka.load_text(ka.store_text('slash')))", KACHERY_BASE_URL=base) == "slash"


def test_the_other_form_of_addresses(person: Person) -> None:
    ann, ben = person("ann"), person("ben")
    uri = ann.run("answer(ka.store_text('type one', uri_type=1))")
    assert uri.startswith("sha1://")
    assert ben.run(f"answer(ka.load_text({uri!r}))") == "type one"


@pytest.mark.parametrize(
    ("user", "key", "status"),
    [("ben", None, "403"), ("eve", None, "403"), (None, "klk_wrong", "401"), (None, None, None)],
)
def test_who_may_not_store(lab: Lab, person: Person, user: str | None, key: str | None, status: str | None) -> None:
    for zone in ("lab.private", "lab.public"):
        script = f"answer(ka.store_text('refused? {user} {key} {zone}'))"
        before = lab.log_size()
        text = person(user, zone, key).fails(script)
        if status is None:
            # The client itself waits for a person then, and asks nobody.
            assert lab.requests(before) == []
        else:
            assert f"({status})" in text
            assert lab.requests(before) == [("POST", "/api/initiateFileUpload", int(status))]
        assert person("ann", zone).run(script).startswith(f"kachery:{zone}:sha1:")


def test_who_may_not_load(lab: Lab, person: Person) -> None:
    uri = {
        zone: person("ann", zone).run(f"answer(ka.store_text('load? {zone}'))")
        for zone in ("lab.private", "lab.public")
    }
    for user, key, status in (("eve", None, 403), (None, "klk_wrong", 401), (None, None, 401)):
        before = lab.log_size()
        text = person(user, "lab.private", key).fails(f"ka.load_text({uri['lab.private']!r})")
        assert f"({status})" in text
        assert lab.requests(before) == [("POST", "/api/findFile", status)]
    assert person("ben").run(f"answer(ka.load_text({uri['lab.private']!r}))") == "load? lab.private"
    # The public one needs no key at all; a wrong key is told.
    assert person(None, "lab.public").run(f"answer(ka.load_text({uri['lab.public']!r}))") == "load? lab.public"
    assert person("eve", "lab.public").run(f"answer(ka.load_text({uri['lab.public']!r}))") == "load? lab.public"
    assert "(401)" in person(None, "lab.public", "klk_wrong").fails(f"ka.load_text({uri['lab.public']!r})")


def test_a_hash_from_elsewhere_opens_nothing(person: Person) -> None:
    uri = person("ann").run("answer(ka.store_text('only in the private zone'))")
    elsewhere = uri.replace("lab.private", "lab.public")
    assert person("ben", "lab.public").run(f"answer(ka.load_file({elsewhere!r}))") is None
    assert person("ben").run(f"answer(ka.load_text({uri!r}))") == "only in the private zone"


def test_a_netrc_file_is_named_in_the_error(lab: Lab, person: Person) -> None:
    ann = person("ann")
    netrc = ann.private / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    netrc.chmod(0o600)
    text = ann.fails("ka.store_text('netrc')")
    assert "(401)" in text
    assert "netrc" in text
    assert ann.run("answer(ka.load_text(ka.store_text('netrc')))", NETRC="/dev/null") == "netrc"


def test_what_the_server_knows_of_it(lab: Lab, person: Person) -> None:
    uri = person("ann").run("answer(ka.store_text('to be found by the admin'))")
    sha1 = uri.split(":")[3]
    person("ben").run(f"ka.load_text({uri!r})")
    (found,) = lab.admin("GET", f"/uploads?channel=lab.private&sha1={sha1}")["uploads"]
    assert (found["principal"], found["size"], found["channel"]) == ("user:ann", 24, "lab.private")
    rows = {row["principal"]: row for row in lab.admin("GET", "/usage?channel=lab.private")["usage"]}
    assert rows["user:ann"]["uploads"] >= 1
    assert rows["user:ben"]["bytesDownloaded"] >= 24
