"""What is uploaded into buckets is verified before it counts; references, limits and deletions."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import Sha1
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from kachery_lab.errors import NotFound
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject
from tests.hubs import Hub, LabNode, path_of, path_of_sha1, sha1_of, upload_request
from tests.servers import Answer, files_below

DATA = bytes(range(256)) * 20
SIZE = len(DATA)
SHA1 = sha1_of(DATA)


def put(hub: Hub, node: LabNode, channel: str, path: str, data: bytes, size: int | None = None) -> Answer:
    (url,) = hub.upload_urls(node, channel, [path], [len(data) if size is None else size])
    return hub.put(url, data)


def test_a_file_must_be_the_announced_one(hub: Hub, channel: str, member: LabNode) -> None:
    path = path_of(DATA)
    wrong_bytes = bytes([1]) + DATA[1:]
    own = hub.bucket(member, channel)
    for data, size in ((wrong_bytes, SIZE), (DATA[:-1], SIZE), (DATA, SIZE + 1), (DATA + b"x", SIZE), (b"", SIZE)):
        assert put(hub, member, channel, path, data, size).status == 422
        assert hub.get(f"{own}/{path}").status == 404
    answer = put(hub, member, channel, path, DATA)
    assert (answer.status, answer.body) == (200, b"")
    assert hub.get(f"{own}/{path}").body == DATA


def test_an_empty_file(hub: Hub, channel: str, member: LabNode) -> None:
    assert put(hub, member, channel, path_of(b""), b"").status == 200
    answer = hub.get(f"{hub.bucket(member, channel)}/{path_of(b'')}")
    assert (answer.status, answer.headers["content-length"]) == (200, "0")


def test_a_put_with_parameters_is_refused(hub: Hub, channel: str, member: LabNode) -> None:
    (url,) = hub.upload_urls(member, channel, [path_of(DATA)], [SIZE])
    for query in ("?a=1", "?a", "?size=1"):
        assert hub.put(url + query, DATA).status == 403
    assert hub.put(url, DATA).status == 200


class Feed:
    def __init__(self) -> None:
        self.key = PrivateKey.generate()
        self.subfeed = "cd" * 20
        feed_id = self.key.public_hex
        self.folder = f"feeds/{feed_id[:2]}/{feed_id[2:4]}/{feed_id[4:6]}/{feed_id}/subfeeds/cd/cd/cd/{self.subfeed}"

    def message(self, number: int, previous: str | None, content: Any = None, **changes: Any) -> dict[str, Any]:
        body = {"message": content or {"n": number}, "messageNumber": number, "timestamp": 1_700_000_000_000}
        if previous is not None:
            body["previousSignature"] = previous
        body |= changes
        return {"body": body, "signature": sign_2021(self.key, canonical_2021(body))}


def test_messages_must_continue_their_subfeed(hub: Hub, channel: str, member: LabNode) -> None:
    feed, other = Feed(), Feed()
    own = hub.bucket(member, channel)
    first = feed.message(0, None)
    second = feed.message(1, first["signature"])

    def send(number: int, value: Any) -> int:
        data = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
        return put(hub, member, channel, f"{feed.folder}/{number}", data).status

    assert send(1, second) == 409
    wrong_first = [
        other.message(0, None),
        {**first, "signature": "0" * 128},
        {**first, "body": {**first["body"], "timestamp": 1}},
        feed.message(1, None),
        feed.message(0, "0" * 128),
        {**first, "extra": 1},
        first["body"],
        b"not json",
        b"null",
    ]
    for value in wrong_first:
        assert send(0, value) == 422
        assert hub.get(f"{own}/{feed.folder}/0").status == 404
    assert send(0, first) == 200
    assert send(0, first) == 200
    assert send(0, feed.message(0, None, {"another": "first"})) == 409
    wrong_second = [feed.message(1, "0" * 128), feed.message(1, None), feed.message(2, first["signature"])]
    for value in wrong_second:
        assert send(1, value) == 422
    assert send(1, second) == 200
    read = hub.get(f"{own}/{feed.folder}/1")
    assert read.json() == second
    assert read.headers["content-type"] == "application/json"
    assert hub.get(f"{own}/{feed.folder}/0").json() == first


def test_subfeed_json_is_never_cached_and_may_change(hub: Hub, channel: str, member: LabNode) -> None:
    """It counts the messages that are there, whatever an upload says of them."""
    feed, own = Feed(), hub.bucket(member, channel)
    path = f"{feed.folder}/subfeed.json"
    for wrong in (b"{}", b'{"messageCount":"1"}', b'{"messageCount":-1}', b'{"messageCount":true}', b"[1]", b"x"):
        assert put(hub, member, channel, path, wrong).status == 422
        assert hub.get(f"{own}/{path}?cb=abcdefghij").status == 404
    previous = None
    for count in (1, 2):
        assert put(hub, member, channel, path, b'{"messageCount":%d}' % count).status == 409
        message = feed.message(count - 1, previous)
        previous = message["signature"]
        assert put(hub, member, channel, f"{feed.folder}/{count - 1}", json.dumps(message).encode()).status == 200
        assert put(hub, member, channel, path, b'{"messageCount":%d}' % count).status == 200
        answer = hub.get(f"{own}/{path}?cb=abcdefghij")
        assert answer.json() == {"messageCount": count}
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json"


def test_many_messages_in_one_object(hub: Hub, channel: str, member: LabNode) -> None:
    """`<n>-<m>`: what nodes of our kind put and get; single messages lie there too."""
    feed, own = Feed(), hub.bucket(member, channel)
    messages: list[Any] = []
    for number in range(5):
        messages.append(feed.message(number, messages[-1]["signature"] if messages else None))

    def send(name: str, value: Any) -> int:
        return put(hub, member, channel, f"{feed.folder}/{name}", json.dumps(value).encode()).status

    assert send("2-5", {"messages": messages[2:]}) == 409
    for wrong in ({"messages": messages[:2]}, {"messages": messages[1:4]}, {"messages": [{}] * 3}, messages[:3], {}):
        assert send("0-3", wrong) == 422
    assert hub.get(f"{own}/{feed.folder}/0-3").status == 404
    for _ in range(2):
        assert send("0-3", {"messages": messages[:3]}) == 200
    assert send("1-5", {"messages": messages[1:]}) == 200
    assert hub.get(f"{own}/{feed.folder}/1-4").json() == {"messages": messages[1:4]}
    assert hub.get(f"{own}/{feed.folder}/3-100").json() == {"messages": messages[3:]}
    assert hub.get(f"{own}/{feed.folder}/5-100").status == 404
    assert [hub.get(f"{own}/{feed.folder}/{number}").json() for number in range(5)] == messages
    other = feed.message(4, messages[3]["signature"], {"another": "fourth"})
    assert send("4", other) == 409
    assert send("3-5", {"messages": [messages[3], other]}) == 409
    for name in ("3-3", "4-3", "-3", "0-", "00-1", "0-01"):
        assert hub.get(f"{own}/{feed.folder}/{name}").status == 400


def test_task_results_must_be_json(hub: Hub, channel: str, member: LabNode) -> None:
    path, own = path_of(b"task").replace("sha1", "task_results", 1), hub.bucket(member, channel)
    for wrong in (b"", b"null", b"{", b"NaN", b"\xff", b"[" * 100_000):
        assert put(hub, member, channel, path, wrong).status == 422
        assert hub.request("HEAD", f"{own}/{path}").status == 404
    for result in (b'"text \\u00e9"', b"0", b"false", b'{"a":[1,2]}'):
        assert put(hub, member, channel, path, result).status == 200
        answer = hub.get(f"{own}/{path}?cb=$abcdefghij")
        assert answer.body == result
        assert (answer.headers["cache-control"], answer.headers["content-type"]) == ("no-store", "application/json")


def test_each_kind_needs_its_own_role(hub: Hub, channel: str, member: LabNode) -> None:
    feed = Feed()
    message = json.dumps(feed.message(0, None)).encode()
    kinds = [
        (path_of(DATA), DATA, Role.PROVIDE_FILES, Role.REQUEST_FILES),
        (f"{feed.folder}/0", message, Role.PROVIDE_FEEDS, Role.REQUEST_FEEDS),
        (f"{feed.folder}/subfeed.json", b'{"messageCount":1}', Role.PROVIDE_FEEDS, Role.REQUEST_FEEDS),
        (path_of(b"t").replace("sha1", "task_results", 1), b"1", Role.PROVIDE_TASKS, Role.REQUEST_TASKS),
    ]
    own = hub.bucket(member, channel)
    for path, data, provide, request in kinds:
        hub.grant(member.id, channel, Role.ALL)
        (url,) = hub.upload_urls(member, channel, [path], [len(data)])
        hub.grant(member.id, channel, Role.ALL & ~provide)
        assert hub.put(url, data).status == 403
        hub.grant(member.id, channel, provide)
        assert hub.put(url, data).status == 200
        assert hub.get(f"{own}/{path}").status == 403
        hub.grant(member.id, channel, request)
        read = hub.get(f"{own}/{path}").body
        # A message lies in the store of feeds, which does not keep its white space.
        assert read == data or (path.endswith("/0") and json.loads(read) == json.loads(data))


# -- limits, references, deletion --------------------------------------------------------------------------------------


def test_limits_of_a_channel(hub: Hub) -> None:
    name, node = f"l{time.monotonic_ns():x}", LabNode()
    hub.make_channel(name, max_bytes=10, max_object_bytes=6)
    hub.register(node)
    hub.join(node, name)
    seven, six, five, four = (b"7" * 7, b"6" * 6, b"5" * 5, b"4" * 4)
    certificate, key = hub.certificate(node, name)
    resource_id = hub.node.data.channel(name).resource_id
    request = upload_request(certificate, key, resource_id, [f"{name}/{path_of(seven)}"], [7])
    assert hub.post("/api/resource", request).status == 413
    assert put(hub, node, name, path_of(six), six).status == 200
    (url,) = hub.upload_urls(node, name, [path_of(five)], [5])
    assert hub.put(url, five).status == 507
    assert put(hub, node, name, path_of(four), four).status == 200
    assert put(hub, node, name, path_of(six), six).status == 200
    assert hub.get(f"{hub.bucket(node, name)}/{path_of(five)}").status == 404


def test_three_channels_and_one_file_on_the_disk(hub: Hub) -> None:
    data = b"once" * 50_000
    node, names = LabNode(), [f"t{n}{time.monotonic_ns():x}" for n in range(3)]
    hub.register(node)
    for name in names:
        hub.make_channel(name)
        hub.join(node, name)
        assert hub.get(f"{hub.bucket(node, name)}/{path_of(data)}").status == 404
        hub.upload(node, name, data)
        assert hub.get(f"{hub.bucket(node, name)}/{path_of(data)}").body == data
    large = [path for path in files_below(hub.storage) if path.stat().st_size == len(data)]
    assert [path.name for path in large] == [sha1_of(data)]
    assert large[0].stat().st_nlink == 1
    # What goes in one channel stays in the others.
    subject = Subject("user", "admin")
    hub.call(hub.node.buckets.forget(names[0], ObjectPath.parse(path_of(data)), subject))
    hub.call(hub.node.channels.remove(OPERATOR, names[1]))
    assert hub.get(f"{hub.bucket(node, names[0])}/{path_of(data)}").status == 404
    assert hub.get(f"{hub.bucket(node, names[2])}/{path_of(data)}").body == data


def test_a_deletion_leaves_a_tombstone(hub: Hub, channel: str, member: LabNode) -> None:
    path = hub.upload(member, channel, DATA)
    own, parsed = f"{hub.bucket(member, channel)}/{path}", ObjectPath.parse(path)
    hub.call(hub.node.buckets.forget(channel, parsed, Subject("user", "admin")))
    for method in ("GET", "HEAD"):
        assert hub.request(method, own).status == 404
    subject = Subject("node", member.id)
    with pytest.raises(NotFound, match="deleted"):
        hub.call(hub.node.buckets.refer(channel, parsed, Sha1(SHA1), SIZE, subject, on_demand=True))
    assert hub.get(own).status == 404
    assert hub.upload(member, channel, DATA) == path
    assert hub.get(own).body == DATA


def test_many_at_once(hub: Hub, channel: str, member: LabNode) -> None:
    contents = [b"%d" % n * 1000 for n in range(20)]
    urls = hub.upload_urls(member, channel, [path_of(c) for c in contents], [len(c) for c in contents])
    with ThreadPoolExecutor(8) as pool:
        # Each twice, so that the same bytes race with themselves.
        statuses = list(pool.map(lambda pair: hub.put(*pair).status, list(zip(urls, contents, strict=True)) * 2))
    assert set(statuses) == {200}
    own = hub.bucket(member, channel)
    assert all(hub.get(f"{own}/{path_of(content)}").body == content for content in contents)
    assert path_of_sha1(sha1_of(contents[0])) == path_of(contents[0])
