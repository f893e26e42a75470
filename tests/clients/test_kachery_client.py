"""The published client, unmodified, in its own processes, against a real server.

It is told the port and the storage directory, and nothing else. It looks into that directory before it asks anybody,
so what it loads is read from the files that the server wrote; bytes are compared, because its commands print `None`
and succeed when they find nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.daemon_client import Client
from tests.clients.person import finish
from tests.nodes import running_node
from tests.servers import RunningNode, blob_path, drafts, free_port

MANIFESTS = json.loads((Path(__file__).parents[1] / "vectors" / "manifests.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with running_node(tmp_path_factory.mktemp("client")) as running:
        yield running


@pytest.fixture
def client(node: RunningNode, tmp_path: Path) -> Client:
    return Client(node.storage, node.port, tmp_path / "private")


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def generated(size: int) -> bytes:
    period = b"".join(bytes((low * 7 + high) % 256 for low in range(256)) for high in range(256))
    return (period * (size // len(period) + 1))[:size]


# -- files -------------------------------------------------------------------------------------------------------------


def test_info(node: RunningNode, client: Client) -> None:
    done = client.command("kachery-info")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert f"Node ID: {(node.storage / 'kachery-node-id').read_text()}" in text
    assert "You have access to this daemon" in text


@pytest.mark.parametrize(
    "data", [b"", b"x", b"text\n" * 3, bytes(range(256)) * 5000], ids=["empty", "1", "15", "1.2MB"]
)
def test_store_load_and_cat(node: RunningNode, client: Client, tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "a file.bin"
    source.write_bytes(data)
    uri = client.prints("kachery-store", source)
    assert uri == f"sha1://{sha1_of(data)}/a file.bin"
    stored = blob_path(node.storage, sha1_of(data))
    assert stored.read_bytes() == data
    assert stored.stat().st_mode & 0o777 == 0o644
    source.unlink()
    assert client.prints("kachery-load", uri) == str(stored)
    destination = tmp_path / "copy.bin"
    client.prints("kachery-load", uri, "--dest", destination)
    assert destination.read_bytes() == data
    assert client.command("kachery-cat", uri).stdout == data
    if len(data) > 10:
        assert client.command("kachery-cat", uri, "--start", "3", "--end", "11").stdout == data[3:11]
    assert drafts(node.storage) == []


def test_link(node: RunningNode, client: Client, tmp_path: Path) -> None:
    data = os.urandom(5000)
    source = tmp_path / "linked.bin"
    source.write_bytes(data)
    uri = client.prints("kachery-link", source)
    assert uri == f"sha1://{sha1_of(data)}/linked.bin"
    path = blob_path(node.storage, sha1_of(data))
    assert not path.exists()
    record = json.loads(path.with_name(path.name + ".link").read_text())
    # The client compares the time for equality, so it must have survived JSON bit for bit.
    assert record["stat"] == {"size": 5000, "mtime": source.stat().st_mtime}
    assert client.prints("kachery-load", uri) == str(source)
    assert client.command("kachery-cat", uri).stdout == data
    source.write_bytes(data[::-1])
    assert client.prints("kachery-load", uri) == "None"
    assert client.command("kachery-cat", uri).stdout == b""
    # The server serves it no more under this name either, and storing the right bytes heals it.
    assert node.request("GET", f"/api/v1/blobs/{sha1_of(data)}").status == 410
    source.write_bytes(data)
    assert client.prints("kachery-store", source) == uri
    source.unlink()
    assert client.command("kachery-cat", uri).stdout == data


def test_linking_a_stored_file_writes_no_link(node: RunningNode, client: Client, tmp_path: Path) -> None:
    source = tmp_path / "both.bin"
    source.write_bytes(b"stored and linked")
    uri = client.prints("kachery-store", source)
    assert client.prints("kachery-link", source) == uri
    path = blob_path(node.storage, sha1_of(b"stored and linked"))
    assert not path.with_name(path.name + ".link").exists()
    assert client.prints("kachery-load", uri) == str(path)


def test_what_is_not_there_is_none(client: Client) -> None:
    assert client.prints("kachery-load", f"sha1://{'0' * 40}/x") == "None"
    assert client.run(f"answer([kc.load_file('sha1://{'0' * 40}'), kc.load_text('sha1://{'0' * 40}')])") == [None, None]
    assert b"Error loading file" in client.command("kachery-cat", f"sha1://{'0' * 40}/x").stderr


def test_every_kind_of_value_comes_back(node: RunningNode, client: Client) -> None:
    uris = client.run("""
        import numpy as np
        answer([
            kc.store_text('grüße 😀\\n'),
            kc.store_json({'a': [1, 2.5, None, 'ü'], 'b': {}}),
            kc.store_npy(np.arange(12, dtype=np.float32).reshape(3, 4)),
            kc.store_pkl({'x': [1, 'two', 3.0, None], 'y': {'z': True}}),
            kc.store_text(''),
        ])
    """)
    assert [uri.rpartition("/")[2] for uri in uris] == ["file.txt", "file.json", "file.npy", "file.pkl", "file.txt"]
    assert blob_path(node.storage, uris[0].split("/")[2]).read_text() == "grüße 😀\n"
    # Another process, so nothing is remembered from storing.
    found = client.run(f"""
        import numpy as np
        text, js, npy, pkl, empty = {uris!r}
        array = kc.load_npy(npy)
        answer([kc.load_text(text), kc.load_json(js), array.tolist(), str(array.dtype), kc.load_pkl(pkl),
                kc.load_text(empty)])
    """)
    rows = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    value = {"a": [1, 2.5, None, "ü"], "b": {}}
    assert found == ["grüße 😀\n", value, rows, "float32", {"x": [1, "two", 3.0, None], "y": {"z": True}}, ""]


def test_a_large_file_has_the_recorded_manifest(node: RunningNode, client: Client, tmp_path: Path) -> None:
    data = generated(45_000_000)
    source = tmp_path / "big.bin"
    source.write_bytes(data)
    expected = next(case for case in MANIFESTS["files"] if case["size"] == 45_000_000)
    sha1, manifest = expected["sha1"], expected["manifestSha1"]
    assert sha1_of(data) == sha1
    assert client.prints("kachery-store", source) == f"sha1://{sha1}/big.bin?manifest={manifest}"
    assert blob_path(node.storage, sha1).read_bytes() == data
    assert sha1_of(blob_path(node.storage, manifest).read_bytes()) == manifest
    found = client.run(f"""
        import hashlib
        uri = 'sha1://{sha1}/big.bin?manifest={manifest}'
        ranges = [(0, 5), (19_999_990, 20_000_010), (44_999_990, 45_000_000), (0, 45_000_000), (7, 7)]
        answer([hashlib.sha1(kc.load_bytes(uri, start, end)).hexdigest() for start, end in ranges]
               + [kc.load_json('sha1://{manifest}')['chunks'][2]['end']])
    """)
    parts = [data[:5], data[19_999_990:20_000_010], data[44_999_990:], data, b""]
    assert found == [*map(sha1_of, parts), 45_000_000]


def test_two_clients_at_once(node: RunningNode, client: Client, tmp_path: Path) -> None:
    others = [Client(node.storage, node.port, tmp_path / f"private-{number}") for number in range(2)]
    script = """
        import time
        feed = kc.load_feed('shared') if {number} else None
        uris = [kc.store_text('text %d of both' % number) for number in range(15)]
        uris += [kc.store_text('text %d of {number}' % number) for number in range(15)]
        subfeed = kc.load_feed('shared').load_subfeed('both')
        for number in range(15):
            subfeed.append_message(dict(client={number}, number=number))
        answer(uris)
    """
    client.run("kc.create_feed('shared')")
    first, second = map(finish, [other.start(script.format(number=n)) for n, other in enumerate(others)])
    assert first[:15] == second[:15]
    for number, uris in enumerate((first, second)):
        texts = [f"text {n} of both" for n in range(15)] + [f"text {n} of {number}" for n in range(15)]
        for uri, text in zip(uris, texts, strict=True):
            assert blob_path(node.storage, uri.split("/")[2]).read_text() == text
    messages = client.run("answer(kc.load_feed('shared').load_subfeed('both').get_next_messages())")
    assert len(messages) == 30
    for number in range(2):
        assert [m["number"] for m in messages if m["client"] == number] == list(range(15))


# -- feeds -------------------------------------------------------------------------------------------------------------


def test_feeds_from_creation_to_deletion(client: Client) -> None:
    uri = client.run("""
        feed = kc.create_feed()
        assert feed.is_writeable and not feed.is_snapshot
        subfeed = feed.load_subfeed('first')
        assert subfeed.get_num_local_messages() == 0
        subfeed.append_messages([dict(n=0, text='ü'), dict(n=1, list=[1, 2.5, None])])
        subfeed.append_message(dict(n=2))
        feed.load_subfeed(dict(name='object', part=1)).append_message(dict(other=True))
        answer(feed.uri)
    """)
    found = client.run(f"""
        feed = kc.load_feed({uri!r})
        subfeed = feed.load_subfeed('first')
        got = [subfeed.get_num_local_messages(), subfeed.get_next_messages(), subfeed.position]
        got += [subfeed.get_next_messages(wait_msec=20), subfeed.get_next_message(wait_msec=20)]
        again = kc.load_subfeed({uri!r} + '/first')
        got += [again.get_next_messages(max_num_messages=2), again.position]
        got += [kc.load_feed({uri!r}).load_subfeed(dict(part=1, name='object')).get_next_messages()]
        got += [kc.load_feed({uri!r}).load_subfeed('never').get_next_messages(wait_msec=0)]
        got += [feed.is_writeable]
        answer(got)
    """)
    messages = [{"n": 0, "text": "ü"}, {"n": 1, "list": [1, 2.5, None]}, {"n": 2}]
    assert found == [3, messages, 3, [], None, messages[:2], 2, [{"other": True}], [], True]
    deleted = client.run(f"""
        kc.load_feed({uri!r}).delete()
        feed = kc.load_feed({uri!r})
        subfeed = feed.load_subfeed('first')
        answer([feed.is_writeable, subfeed.get_num_local_messages(), subfeed.get_next_messages(wait_msec=0)])
    """)
    assert deleted == [False, 0, []]
    assert "readonly" in client.fails(f"kc.load_feed({uri!r}).load_subfeed('first').append_message(dict(n=3))")


def test_feeds_by_name(client: Client) -> None:
    created = client.run("answer(kc.create_feed('by name').feed_id)")
    assert client.run("answer(kc.load_feed('by name').feed_id)") == created
    assert client.run("answer(kc.load_feed('by name', create=True).feed_id)") == created
    assert client.run("answer(kc.get_feed_id('by name'))") == created
    assert "Unable to load feed with name" in client.fails("kc.load_feed('no such name')")
    fresh = client.run("answer(kc.load_feed('made when absent', create=True).feed_id)")
    assert fresh != created
    assert client.run("answer(kc.load_feed('made when absent').feed_id)") == fresh
    assert client.run("kc.load_feed('by name').delete(); answer(kc.load_feed('by name').is_writeable)") is False


def test_a_stream_gets_what_another_process_appends(client: Client, tmp_path: Path) -> None:
    uri = client.run("answer(kc.create_feed().uri)")
    ready = tmp_path / "ready"
    reader = client.start(f"""
        got = []
        for message in kc.load_feed({uri!r}).load_subfeed('live').message_stream():
            got.append(message['n'])
            open({str(ready)!r}, 'w').close()
            if message['n'] == 'end':
                break
        answer(got)
    """)
    client.run(f"kc.load_feed({uri!r}).load_subfeed('live').append_message(dict(n='begin'))")
    until = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.02)
    client.run(f"""
        subfeed = kc.load_feed({uri!r}).load_subfeed('live')
        for number in range(20):
            subfeed.append_message(dict(n=number))
        subfeed.append_message(dict(n='end'))
    """)
    assert finish(reader)[:1] == ["begin"]
    # What the stream of this client does with messages that come while it reads is its own affair; the order is ours.
    everything = client.run(f"answer([m['n'] for m in kc.load_feed({uri!r}).load_subfeed('live').get_next_messages()])")
    assert everything == ["begin", *range(20), "end"]


def test_watching_several_subfeeds(client: Client) -> None:
    found = client.run("""
        import threading, time
        feed = kc.create_feed()
        other = kc.create_feed()
        def later():
            time.sleep(0.3)
            other.load_subfeed('b').append_message(dict(late=1))
        watches = dict(
            a=dict(feedId=feed.feed_id, subfeedName='a', position=0),
            b=dict(feedId=other.feed_id, subfeedName='b', position=0),
        )
        none = kc.watch_for_new_messages(watches, wait_msec=50)
        threading.Thread(target=later).start()
        started = time.monotonic()
        some = kc.watch_for_new_messages(watches, wait_msec=8000)
        answer([none, some, time.monotonic() - started < 4])
    """)
    assert found == [{"a": [], "b": []}, {"a": [], "b": [{"late": 1}]}, True]


def test_signed_messages_and_snapshots(client: Client) -> None:
    found = client.run("""
        feed = kc.create_feed()
        subfeed = feed.load_subfeed('signed')
        subfeed.append_messages([dict(n=0), dict(n=1)])
        signed = feed.load_subfeed('signed').get_next_messages(signed=True)
        snapshot = feed.create_snapshot(['signed', 'empty'])
        feed.delete()
        again = kc.load_feed(snapshot.uri)
        answer([signed, snapshot.uri, again.is_snapshot, again.is_writeable,
                again.load_subfeed('signed').get_next_messages(), again.load_subfeed('empty').get_num_local_messages()])
    """)
    signed, uri, is_snapshot, writeable, messages, empty = found
    assert [envelope["body"]["message"] for envelope in signed] == [{"n": 0}, {"n": 1}]
    assert [envelope["body"]["messageNumber"] for envelope in signed] == [0, 1]
    assert signed[1]["body"]["previousSignature"] == signed[0]["signature"]
    assert uri.startswith("sha1://")
    assert (is_snapshot, writeable, messages, empty) == (True, False, [{"n": 0}, {"n": 1}], 0)


def test_a_large_append(client: Client) -> None:
    found = client.run("""
        subfeed = kc.create_feed().load_subfeed('large')
        subfeed.append_messages([dict(text='x' * 1000, n=n) for n in range(5000)])
        messages = subfeed.get_next_messages()
        answer([len(messages), messages[0]['n'], messages[-1]['n'], subfeed.get_num_local_messages()])
    """)
    assert found == [5000, 0, 4999, 5000]


# -- mutables ----------------------------------------------------------------------------------------------------------


def test_mutables(client: Client) -> None:
    written = client.run("""
        answer([
            kc.set('key', 'text'), kc.set('key', 'other', update=False), kc.get('key'),
            kc.set({'b': 1, 'a': [2]}, {'z': 1, 'y': [None, 2.5, 'ü']}),
            kc.set('new', [1], update=False), kc.set('once', 1), kc.delete('once'), kc.delete('once'), kc.get('once'),
        ])
    """)
    assert written == [True, False, "text", True, True, True, True, False, None]
    read = client.run("answer([kc.get('key'), kc.get({'a': [2], 'b': 1}), kc.get('new'), kc.get('never')])")
    assert read == ["text", {"z": 1, "y": [None, 2.5, "ü"]}, [1], None]


# -- when something is wrong -------------------------------------------------------------------------------------------


def test_without_a_server_the_client_says_so(node: RunningNode, tmp_path: Path) -> None:
    """The control: these tests reach the server because it is there."""
    lost = Client(node.storage, free_port(), tmp_path / "lost")
    source = tmp_path / "x.bin"
    source.write_bytes(b"nobody listens")
    done = lost.command("kachery-store", source)
    assert done.returncode != 0
    assert b"Not connected to daemon" in done.stderr
    assert not blob_path(node.storage, sha1_of(b"nobody listens")).exists()
    assert b"Unable to connect to daemon" in lost.command("kachery-info").stderr


def test_a_directory_of_another_node_is_noticed(node: RunningNode, tmp_path: Path) -> None:
    other = tmp_path / "other-storage"
    other.mkdir()
    (other / "kachery-node-id").write_text("0" * 64)
    done = Client(other, node.port, tmp_path / "private").command("kachery-info")
    assert done.returncode != 0
    assert b"Inconsistent node ID" in done.stderr


def test_a_restart_is_not_noticed(make_node: Callable[..., RunningNode], tmp_path: Path) -> None:
    """A client keeps its code for up to 60 s; the server takes over the code of its previous run."""
    node = make_node().start()
    client = Client(node.storage, node.port, tmp_path / "private")
    go, stored = tmp_path / "go", tmp_path / "stored"
    process = client.start(f"""
        import os, time
        first = kc.store_text('before the restart')
        open({str(stored)!r}, 'w').close()
        while not os.path.exists({str(go)!r}):
            time.sleep(0.02)
        answer([first, kc.store_text('after the restart')])
    """)
    until = time.monotonic() + 30
    while not stored.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert node.terminate() == 0
    node.start()
    go.touch()
    before, after = finish(process)
    assert blob_path(node.storage, before.split("/")[2]).read_bytes() == b"before the restart"
    assert blob_path(node.storage, after.split("/")[2]).read_bytes() == b"after the restart"
