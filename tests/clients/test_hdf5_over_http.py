"""h5py reads one small data set of a large file in a private zone, by a signed address, and fetches little of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.person import Person
from tests.gateway import CloudClient
from tests.nodes import admin, requests_of, running_node
from tests.servers import RunningNode

ZONE = "lab.private"
LARGEST_SHARE = 0.05

MAKE = """
import h5py, numpy
rng = numpy.random.default_rng(1)
with h5py.File(PATH, 'w', libver='latest') as file:
    # In one piece, most of it a hole in the file: its bytes are never asked for here.
    raw = file.create_dataset('acquisition/ecephys/data', shape=(SIZE // 128, 64), dtype='<i2', fillvalue=None)
    for start in range(0, raw.shape[0], 1 << 20):
        raw[start : start + 4096] = rng.integers(-500, 500, size=(4096, 64), dtype='<i2')
    raw[-1] = 1
    for unit in range(50):
        group = file.create_group(f'units/{unit}')
        group.create_dataset('spike_times', data=numpy.arange(2000) / 7.0 + unit)
        group.attrs['quality'] = 'good'
"""

REMFILE = """
import h5py, remfile
remote = remfile.File(URL)
with h5py.File(remote, 'r') as file:
    times = file['units/17/spike_times'][:]
    answer([len(times), float(times[1999]), file['units/17'].attrs['quality']])
"""

FSSPEC = """
import fsspec, h5py
with fsspec.filesystem('http').open(URL, block_size=1 << 20) as remote, h5py.File(remote, 'r') as file:
    times = file['units/17/spike_times'][:]
    answer([len(times), float(times[1999]), file['units/17'].attrs['quality']])
"""


class Reader(Person):
    """Has h5py and two ways to read a part of a file over HTTP."""

    def __init__(self, private: Path) -> None:
        super().__init__("hdf5-over-http", private, {})

    def with_values(self, script: str, **values: Any) -> Any:
        """The answer of a script that has these values under their names."""
        return self.run("".join(f"{name} = {value!r}\n" for name, value in values.items()) + script)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    root = tmp_path_factory.mktemp("hdf5")
    (root / "old").mkdir()
    with running_node(root, env={"KACHERY_LAB_RESOURCE_DIRS": f"{ZONE}={root / 'old'}"}) as running:
        yield running


def fetched(node: RunningNode, since: int) -> tuple[int, set[tuple[str, int]]]:
    """(Bytes, {(method, status)}) of the answers to requests of files since a place in the log."""
    found = [one for one in requests_of(node, since) if one["path"].startswith("/sha1/")]
    return sum(one["bytes"] for one in found), {(one["method"], one["status"]) for one in found}


def test_a_small_data_set_of_a_large_file(node: RunningNode, tmp_path: Path) -> None:
    size = 1 << 30
    client, reader = CloudClient(), Reader(tmp_path / "reader")
    admin(node, "POST", "/users", {"name": "ann"})
    admin(node, "POST", "/clients", {"clientId": client.id, "user": "ann"})
    own = node.request("GET", "/api/v1/info", auth=False).json()["nodeId"]
    admin(node, "POST", "/channels", {"name": ZONE, "owner": "admin"})
    admin(node, "PUT", f"/channels/{ZONE}/memberships/{own}", {})
    admin(node, "PUT", f"/channels/{ZONE}/authorizations/node/{own}", {"roles": ["provideFiles"]})
    admin(node, "PUT", f"/channels/{ZONE}/authorizations/user/ann", {"roles": ["requestFiles"]})
    path = tmp_path / "session.nwb"
    reader.with_values(MAKE, PATH=str(path), SIZE=size)
    assert path.stat().st_size >= size
    with path.open("rb") as file:
        sha1 = hashlib.file_digest(file, "sha1").hexdigest()
    flat = node.storage.parent / "old" / "sha1" / sha1
    flat.parent.mkdir(exist_ok=True)
    path.rename(flat)
    token = admin(node, "POST", "/tokens", {"user": "ann", "scopes": ["read"]})["token"]
    request = {
        "type": "requestFromClient",
        "resourceName": ZONE,
        "zone": ZONE,
        "request": {"type": "fileUpload", "uri": f"sha1://{sha1}", "timeoutMsec": 10_000},
        "timeoutMsec": 15_000,
    }
    for _ in range(20):
        answer = node.post(f"/p/{token}/r/{ZONE}", request, auth=False)
        assert answer.status == 200, answer
        status = answer.json()["response"]["status"]
        if status["status"] == "completed":
            break
    assert status["status"] == "completed", status
    asked = client.envelope("findFile", hashAlg="sha1", hash=sha1, zone=ZONE)
    found = node.post("/api/gateway", asked, auth=False).json()
    url = found["url"]
    assert "ticket=" in url
    plain = url.partition("?")[0].removeprefix(f"http://127.0.0.1:{node.port}")
    assert node.request("GET", plain, auth=False).status == 404
    for name, script in (("remfile", REMFILE), ("fsspec", FSSPEC)):
        since = len(node.log)
        assert reader.with_values(script, URL=url) == [2000, 1999 / 7.0 + 17, "good"]
        size_fetched, kinds = fetched(node, since)
        print(json.dumps({"reader": name, "file": found["size"], "fetched": size_fetched, "kinds": sorted(kinds)}))
        assert ("GET", 206) in kinds
        assert 0 < size_fetched < LARGEST_SHARE * found["size"]
