"""kachery-cloud 0.4.10 and 0.4.2 (the one that spyglass gets), unmodified, each in an environment and cache of its own.

They are told three variables: the gateway, the zone, and a directory of their own. What they load is compared byte for
byte; the storer's and the loader's directories differ, and the server's log shows what was asked.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from kachery_lab.core.keys import PrivateKey, PublicKey
from tests.clients.person import Person, ended
from tests.nodes import admin, requests_of, running_node
from tests.servers import RunningNode

VERSIONS = ("0.4.10", "0.4.2")
ZONE = "lab.private"


class Cloud(Person):
    """One client: a version, a zone, a directory. Scripts have `kcl`."""

    imports = "import kachery_cloud as kcl\n"

    def __init__(self, node: RunningNode, version: str, place: Path, zone: str = ZONE, **more: str) -> None:
        self.cache = place / "cloud"
        variables = {
            "KACHERY_GATEWAY_URL": f"http://127.0.0.1:{node.port}",
            "KACHERY_ZONE": zone,
            "KACHERY_CLOUD_DIR": str(self.cache),
            **more,
        }
        super().__init__(f"kachery-cloud-{version}", place, variables)

    def give_keys(self) -> None:
        """As the client itself writes them, without a newline at the end."""
        key = PrivateKey.generate()
        self.cache.mkdir(parents=True, exist_ok=True)
        (self.cache / "private.pem").write_text(key.to_pem().rstrip())
        (self.cache / "public.pem").write_text(PublicKey.parse(key.public_hex).to_pem().rstrip())

    @property
    def id(self) -> str:
        """The client id, once there are keys."""
        return PublicKey.from_pem((self.cache / "public.pem").read_text()).hex


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    root = tmp_path_factory.mktemp("cloud")
    (root / "resource").mkdir()
    env = {"KACHERY_LAB_RESOURCE_DIRS": f"{ZONE}={root / 'resource'},lab.open={root / 'resource'}"}
    with running_node(root, env=env) as running:
        own = running.request("GET", "/api/v1/info", auth=False).json()["nodeId"]
        for user in ("ann", "guest"):
            admin(running, "POST", "/users", {"name": user})
        for zone in (ZONE, "lab.open"):
            admin(running, "POST", "/channels", {"name": zone, "owner": "ann", "public": zone == "lab.open"})
            admin(running, "PUT", f"/channels/{zone}/memberships/{own}", {})
            admin(running, "PUT", f"/channels/{zone}/authorizations/node/{own}", {"roles": ["provideFiles"]})
        yield running


def grant(node: RunningNode, user: str, *roles: str) -> None:
    """Set what a user may do in the private zone."""
    path = f"/channels/{ZONE}/authorizations/user/{user}"
    if roles:
        admin(node, "PUT", path, {"roles": list(roles)})
    else:
        admin(node, "DELETE", path)


def cli(node: RunningNode, *arguments: str) -> str:
    done = node.run_cli(*arguments)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout.strip()


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(node: RunningNode, version: str, tmp_path: Path) -> Callable[..., Cloud]:
    """Clients with directories of their own and, unless `keys` is false, with keys, which are registered for `user`
    unless that is None."""

    def make_client(name: str, user: str | None = "ann", *, keys: bool = True, **more: str) -> Cloud:
        client = Cloud(node, version, tmp_path / name, **more)
        if keys:
            client.give_keys()
        if user is not None:
            admin(node, "POST", "/clients", {"clientId": client.id, "user": user, "label": name})
        return client

    return make_client


class Requests:
    """What the server was asked since this was made, as `METHOD path status`; hashes are shortened to `*`."""

    def __init__(self, node: RunningNode) -> None:
        self._node = node
        self._from = len(node.log)

    def __call__(self) -> list[str]:
        found = []
        for entry in requests_of(self._node, self._from):
            if not entry["path"].startswith(("/readyz", "/api/admin")):
                path = re.sub(r"[0-9a-f]{40}|\[redacted\]|(?<=/upload/)[^/]+", "*", entry["path"])
                found.append(f"{entry['method']} {path} {entry['status']}")
        return found


GATEWAY = "POST /api/gateway 200"
UPLOAD = [GATEWAY, "PUT /bucket/upload/* 200", GATEWAY]
DOWNLOAD = [GATEWAY, "GET /sha1/* 200"]

STORE = """
import numpy
open('data.bin', 'wb').write(DATA)
open('empty', 'wb').close()
answer({
    'file': kcl.store_file('data.bin', label='data.bin'),
    'empty': kcl.store_file('empty'),
    'text': kcl.store_text('Zürich, 電極 ' + SALT, label='some text'),
    'json': kcl.store_json({'a': [1, 2.5, None], 'ü': SALT}),
    'npy': kcl.store_npy(numpy.arange(100, dtype='<f8').reshape(4, 25) + len(SALT)),
})
"""
LOAD = """
import base64, hashlib, numpy
uris = json.loads(URIS)
found = kcl.load_npy(uris['npy'])
answer({
    'file': hashlib.sha256(open(kcl.load_file(uris['file']), 'rb').read()).hexdigest(),
    'empty': len(open(kcl.load_file(uris['empty']), 'rb').read()),
    'text': kcl.load_text(uris['text']),
    'json': kcl.load_json(uris['json']),
    'npy': [found.dtype.str, list(found.shape), bool((found == numpy.arange(100.0).reshape(4, 25) + len(SALT)).all())],
})
"""


def test_store_and_load(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    data = bytes(range(256)) * 1000 + version.encode()
    salt = f"SALT = {version!r}\nDATA = bytes(range(256)) * 1000 + SALT.encode()\n"
    storer, loader = make("storer"), make("loader")
    requests = Requests(node)
    uris = storer.run(salt + STORE)
    assert uris["file"] == f"sha1://{hashlib.sha1(data).hexdigest()}?label=data.bin"
    # The empty file is the same for both versions: the second one is told that it is there.
    assert sorted(requests()) == sorted(UPLOAD * 5 if version == VERSIONS[0] else UPLOAD * 4 + [GATEWAY])
    requests = Requests(node)
    assert loader.run(f"{salt}URIS = {json.dumps(json.dumps(uris))}\n{LOAD}") == {
        "file": hashlib.sha256(data).hexdigest(),
        "empty": 0,
        "text": f"Zürich, 電極 {version}",
        "json": {"a": [1, 2.5, None], "ü": version},
        "npy": ["<f8", [4, 25], True],
    }
    assert requests() == DOWNLOAD * 5


def test_a_file_that_is_there_is_not_sent_again(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    first, second = make("first"), make("second")
    script = f"answer(kcl.store_text('twice {version}'))"
    uri = first.run(script)
    requests = Requests(node)
    assert second.run(script) == uri
    assert not [one for one in requests() if "PUT" in one]


def test_load_file_info(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    client = make("client")
    uri = client.run(f"answer(kcl.store_text('info {version}'))")
    info = client.run(f"answer(kcl.load_file_info({uri!r}))")
    assert (info["found"], info["size"]) == (True, len(f"info {version}"))
    assert "url" not in info
    absent = f"sha1://{'0' * 40}"
    assert client.run(f"answer(kcl.load_file_info({absent!r}))") is None
    assert client.run(f"answer(kcl.load_file({absent!r}))") is None


def test_private_zone(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    storer, guest, stranger = make("storer"), make("guest", "guest"), make("stranger", None)
    uri = storer.run(f"answer(kcl.store_text('private {version}'))")
    load, store = f"answer(kcl.load_text({uri!r}))", f"answer(kcl.store_text('mine {version}'))"
    errors = guest.fails(load)
    assert "403" in errors
    assert f"client {guest.id}, zone {ZONE}, server's time" in errors
    assert "lacks requestFiles" in errors
    assert "not registered" in stranger.fails(load)
    assert "provideFiles" in guest.fails(store)
    grant(node, "guest", "requestFiles")
    try:
        assert guest.run(load) == f"private {version}"
        assert "provideFiles" in guest.fails(store)
        grant(node, "guest", "requestFiles", "provideFiles")
        assert guest.run(store).startswith("sha1://")
    finally:
        grant(node, "guest")


def test_public_zone(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    storer, stranger = make("storer", zone="lab.open"), make("stranger", None, zone="lab.open")
    text = f"public {version}"
    uri = storer.run(f"answer(kcl.store_text({text!r}))")
    assert stranger.run(f"answer(kcl.load_text({uri!r}))") == text
    assert "not" in stranger.fails("answer(kcl.store_text('x'))")
    elsewhere = make("elsewhere", zone=ZONE)
    assert elsewhere.run(f"answer(kcl.load_file({uri!r}))") is None


@pytest.mark.parametrize("version", ["0.4.10"])
def test_deleting(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    """0.4.2 cannot delete."""
    owner, guest = make("owner"), make("guest", "guest")
    uri = owner.run("answer(kcl.store_text('to be deleted'))")
    assert "403" in guest.fails(f"kcl.admin_delete_file({uri!r})")
    assert owner.run(f"answer(kcl.load_file_info({uri!r})['found'])") is True
    owner.run(f"kcl.admin_delete_file({uri!r})")
    assert owner.run(f"answer(kcl.load_file_info({uri!r}))") is None
    assert "there is no file" in owner.fails(f"kcl.admin_delete_file({uri!r})")


def test_keys_in_variables(node: RunningNode, make: Callable[..., Cloud], version: str, tmp_path: Path) -> None:
    """The way without a home directory: for jobs and CI."""
    key = PrivateKey.generate()
    keys = {"KACHERY_CLOUD_CLIENT_ID": key.public_hex, "KACHERY_CLOUD_PRIVATE_KEY": key.seed_hex()}
    job = make("job", None, keys=False, **keys)
    script = f"answer(kcl.store_text('by a job {version}'))"
    errors = job.fails(script)
    assert "not" in errors
    cli(node, "client", "add", key.public_hex, "--label", "job", "--user", "ann")
    assert job.run(script).startswith("sha1://")


# -- registering ---------------------------------------------------------------------------------------------------


def browse(node: RunningNode, method: str, url: str, **form: str) -> tuple[int, str]:
    """A browser without any script."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=30)
    body = urlencode(form) if method == "POST" else None
    headers = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
    try:
        connection.request(method, f"{parts.path}?{parts.query}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def begin(client: Cloud) -> tuple[subprocess.Popen[bytes], str]:
    """`kachery-cloud-init`, waiting for Enter, and the link that it printed."""
    process = client.open("kachery-cloud-init", stdin=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"http"):
            return process, line.decode().strip()
    raise AssertionError(process.communicate()[1])


def press_enter(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """(Exit code, output, errors) of the rest."""
    done = ended(process, b"\n")
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_init_with_approval(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    client = make("laptop", None, keys=False)
    process, link = begin(client)
    assert "/registerClient/" in link
    status, page = browse(node, "GET", link)
    assert (status, "<form" in page) == (200, True)
    status, page = browse(node, "POST", link, user="ann", code="")
    assert "waits for approval" in page
    code, output, errors = press_enter(process)
    assert code != 0, output
    assert "Failed to initialize" in errors
    approve = re.search(r"kachery-lab (client approve [0-9a-f]{64})<", page)
    assert approve is not None
    assert client.id in approve.group(1)
    cli(node, *approve.group(1).split())
    done = client.command("kachery-cloud-init")
    assert done.returncode == 0, done.stderr
    output = done.stdout.decode()
    assert "already been registered" in output
    assert "Owner: ann" in output
    known = re.search(r"http\S+/client/[0-9a-f]{64}", output)
    assert known is not None
    assert "is registered" in browse(node, "GET", known.group(0))[1]
    assert client.run(f"answer(kcl.store_text('approved {version}'))").startswith("sha1://")


def test_init_with_an_enrolment_code(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    code = cli(node, "client", "code", "add", "--user", "ann", "--label", "course")
    client = make("student", None, keys=False)
    process, link = begin(client)
    assert browse(node, "POST", link, user="", code=f"{code}x")[0] == 401
    status, page = browse(node, "POST", link, user="", code=code)
    assert (status, "is registered" in page) == (200, True)
    exit_code, output, errors = press_enter(process)
    assert exit_code == 0, errors
    assert "initialized successfully" in output
    assert "Owner: ann" in output
    assert client.run(f"answer(kcl.store_text('enrolled {version}'))").startswith("sha1://")


def test_removed_client(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    client = make("removed")
    script = f"answer(kcl.store_text('before {version}'))"
    assert client.run(script).startswith("sha1://")
    assert client.id in cli(node, "client", "list")
    cli(node, "client", "remove", client.id)
    assert "not" in client.fails(f"answer(kcl.store_text('after {version}'))")


# -- on-demand resources, as spyglass uses them ----------------------------------------------------------------------

SPYGLASS = """
import os
os.environ['KACHERY_ZONE'] = ZONE
os.environ['KACHERY_RESOURCE_URL'] = PROXY + '/r/' + ZONE
path = kcl.load_file(URI, dest='loaded.nwb')
answer(path)
"""


def link_and_load(node: RunningNode, make: Callable[..., Cloud], zone: str, proxy: str, user: str | None) -> list[str]:
    """What the server is asked when one person links a file and another one loads it as spyglass does."""
    resource = node.storage.parent / "resource"
    linker = make(f"linker-{zone}", None, KACHERY_CLOUD_DIR=str(resource))
    data = f"{zone} {linker.python}".encode() * 10_000
    source = linker.private / "session.nwb"
    source.write_bytes(data)
    uri = linker.run(f"answer(kcl.link_file({str(source)!r}))")
    assert (resource / "linked_files").is_dir()
    loader = make(f"loader-{zone}", user)
    loader.variables.pop("KACHERY_ZONE")
    requests = Requests(node)
    script = f"ZONE, URI, PROXY = {zone!r}, {uri!r}, {proxy!r}\n{SPYGLASS}"
    assert loader.run(script) == "loaded.nwb"
    assert (loader.private / "loaded.nwb").read_bytes() == data
    seen = requests()
    second = make(f"second-{zone}", user)
    requests = Requests(node)
    assert second.run(f"answer(kcl.load_file({uri!r}) is not None)" if zone == ZONE else "answer(True)") is True
    assert zone != ZONE or requests() == DOWNLOAD
    blob = hashlib.sha1(data).hexdigest()
    assert not list((node.storage / "sha1").rglob(f"{blob}*")), "nothing is copied"
    return seen


def test_link_file_in_a_public_zone(node: RunningNode, make: Callable[..., Cloud]) -> None:
    proxy = f"http://127.0.0.1:{node.port}"
    seen = link_and_load(node, make, "lab.open", proxy, None)
    assert seen == [GATEWAY, "POST /r/lab.open 200", GATEWAY, "GET /sha1/* 200"]


def test_link_file_in_a_private_zone(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    plain = f"http://127.0.0.1:{node.port}"
    loader = make("wrong", "ann")
    script = f"ZONE, URI, PROXY = {ZONE!r}, 'sha1://{'1' * 40}', {plain!r}\n{SPYGLASS}"
    errors = loader.fails(script)
    assert "401" in errors
    assert "/p/" in errors
    token = admin(node, "POST", "/tokens", {"user": "ann", "scopes": ["read"], "channels": [ZONE]})["token"]
    seen = link_and_load(node, make, ZONE, f"{plain}/p/{token}", "ann")
    assert seen == [GATEWAY, f"POST /p/*/r/{ZONE} 200", GATEWAY, "GET /sha1/* 200"]
    absent = script.replace(plain, f"{plain}/p/{token}")
    assert loader.run(absent) is None
    assert token not in node.log


@pytest.mark.parametrize("version", ["0.4.10", "0.4.2"])
def test_a_directory_of_the_clients_own(node: RunningNode, make: Callable[..., Cloud], version: str) -> None:
    """KACHERY_STORE_FILE_DIR: files get http addresses of the server, which offers the directory in a public zone."""
    place = node.storage.parent / "resource"
    prefix = f"http://127.0.0.1:{node.port}"
    client = make("figures", None, KACHERY_STORE_FILE_DIR=str(place), KACHERY_STORE_FILE_PREFIX=prefix)
    requests = Requests(node)
    uri = client.run(f"answer(kcl.store_json({{'figure': {version!r}}}))")
    assert requests() == []
    assert uri.startswith(f"{prefix}/sha1/")
    answer = node.request("GET", urlsplit(uri).path, auth=False)
    assert (answer.status, answer.json()) == (200, {"figure": version})
    assert answer.headers["access-control-allow-origin"] == "*"
    if version == "0.4.10":
        assert make("reader", None).run(f"answer(kcl.load_json({uri!r}))") == {"figure": version}
