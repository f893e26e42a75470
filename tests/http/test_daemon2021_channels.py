"""The daemon API's channel part: a file into a channel, out of it, and who is refused."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import FileKey, Sha1, UserName
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, NotFound, Unavailable
from kachery_lab.http.protocols.daemon2021 import channels
from kachery_lab.http.protocols.daemon2021.channels import upload_size
from kachery_lab.services.offers import ChannelFinder, Progress, UploadUrl
from kachery_lab.services.principals import OPERATOR, Principal
from tests.hubs import Hub, LabNode, path_of, sha1_of
from tests.servers import Answer


@pytest.fixture
def channel(hub: Hub) -> str:
    """A private channel in which this server's own node has every role."""
    name = f"c{time.monotonic_ns():x}"
    hub.make_channel(name)
    hub.join(hub.node.identity.node_id, name)
    return name


def store(hub: Hub, data: bytes) -> str:
    answer = hub.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": hub.code})
    assert answer.status == 200
    return sha1_of(data)


def frames(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    found, rest = [], answer.body
    while rest:
        length, _, rest = rest.partition(b"#")
        found.append(json.loads(rest[: int(length)]))
        rest = rest[int(length) :]
    return found


def load(hub: Hub, sha1: str, channel: str | None, **key: Any) -> Answer:
    body: dict[str, Any] = {"fileKey": {"sha1": sha1, **key}}
    return hub.daemon("/loadFile", body if channel is None else {**body, "channelName": channel})


def in_bucket(hub: Hub, channel: str, data: bytes) -> bool:
    return hub.call(hub.node.buckets.find(channel, path_of(data))) is not None


def refused_as(hub: Hub, answer: Answer, role: str, channel: str, action: str) -> None:
    """403 in words, and an entry in the audit."""
    assert answer.status == 403, answer.body
    assert role in answer.body.decode()
    assert channel in answer.body.decode()
    assert ("local:local", action, channel) in [entry[:3] for entry in hub.refusals()]


# -- into a channel ----------------------------------------------------------------------------------------------------


def test_upload_file(hub: Hub, channel: str) -> None:
    own = hub.node.identity.node_id
    data = b"upload me" + channel.encode()
    absent = hub.daemon("/uploadFile", {"sha1": sha1_of(data), "channel": channel})
    assert absent.status == 404
    store(hub, data)
    hub.grant(own, channel, Role.ALL & ~Role.PROVIDE_FILES)
    request = {"sha1": sha1_of(data), "channel": channel}
    refused_as(hub, hub.daemon("/uploadFile", request), "provideFiles", channel, "file.upload")
    assert not in_bucket(hub, channel, data)
    hub.grant(own, channel, Role.PROVIDE_FILES)
    for _ in range(2):
        answer = hub.daemon("/uploadFile", request)
        assert (answer.status, answer.json()) == (200, {"success": True})
    assert in_bucket(hub, channel, data)
    hub.revoke(own, channel)
    assert hub.daemon("/uploadFile", request).status == 403
    assert hub.daemon("/uploadFile", {**request, "channel": "no-such-channel"}).status == 404


@pytest.mark.parametrize("size", [0, 1, 20_000_001], ids=["empty", "1", "over one chunk"])
def test_upload_file_of_any_size(hub: Hub, channel: str, size: int) -> None:
    data = b"u" * size
    store(hub, data)
    assert hub.daemon("/uploadFile", {"sha1": sha1_of(data), "channel": channel}).status == 200
    reader = LabNode()
    hub.register(reader)
    hub.join(reader, channel)
    assert hub.get(f"{hub.bucket(reader, channel)}/{path_of(data)}").body == data


def test_upload_file_over_the_channels_limits(hub: Hub) -> None:
    name = f"l{time.monotonic_ns():x}"
    hub.make_channel(name, max_bytes=12, max_object_bytes=10)
    hub.join(hub.node.identity.node_id, name)
    results = []
    for data in (b"e" * 11, b"t" * 10, b"x" * 3):
        store(hub, data)
        results.append(hub.daemon("/uploadFile", {"sha1": sha1_of(data), "channel": name}).status)
    assert results == [413, 200, 507]


@pytest.mark.parametrize(
    "body",
    [
        {"sha1": "0" * 39, "channel": "default"},
        {"sha1": "0" * 40, "channel": "a/b"},
        {"sha1": "0" * 40},
        {"sha1": "0" * 40, "channel": None},
        {"sha1": "0" * 40, "channel": "default", "x": 1},
        {"sha1": "0" * 40, "channelName": "default"},
    ],
    ids=repr,
)
def test_malformed_uploads(hub: Hub, body: dict[str, Any]) -> None:
    assert hub.daemon("/uploadFile", body).status == 400
    assert hub.daemon("/createSignedFileUploadUrl", {**body, "size": "1"}).status == 400


def test_local_codes_only(hub: Hub) -> None:
    for path in ("/uploadFile", "/createSignedFileUploadUrl"):
        assert hub.post(path, {}).status == 403
        assert hub.post(path, {}, **{"KACHERY-CLIENT-AUTH-CODE": "x" * 12}).status == 403
        assert hub.daemon(path, {}).status == 400


@pytest.mark.parametrize(
    ("given", "local", "size"),
    [(None, 5, 5), (5, 5, 5), (4, 5, None), (0, 5, None), (5, None, 5), (0, None, None), (None, None, None), (0, 0, 0)],
)
def test_the_size_of_an_upload(given: int | None, local: int | None, size: int | None) -> None:
    assert upload_size(given, local) == size


def test_signed_upload_urls(hub: Hub, channel: str) -> None:
    own = hub.node.identity.node_id
    data = b"by url " + channel.encode()
    sha1, size = sha1_of(data), len(data)

    def ask(**more: Any) -> Answer:
        return hub.daemon("/createSignedFileUploadUrl", {"channelName": channel, "sha1": sha1, **more})

    nothing = {"success": False, "alreadyUploaded": False}
    assert ask().json() == nothing
    assert ask(size=0).json() == nothing
    absent = ask(size=size).json()
    assert (absent["success"], absent["alreadyUploaded"]) == (True, False)
    store(hub, data)
    assert ask(size=size + 1).json() == nothing
    for answer in (ask(), ask(size=size), ask(size=float(size))):
        assert answer.json()["success"] is True
        url = answer.json()["signedUrl"]
        assert url.startswith(f"{hub.base}/bucket/upload/")
    hub.grant(own, channel, Role.REQUEST_FILES)
    refused_as(hub, ask(size=size), "provideFiles", channel, "file.upload")
    assert hub.put(url, data).status == 403
    hub.grant(own, channel, Role.ALL)
    assert hub.put(url, b"x" * size).status == 422
    assert not in_bucket(hub, channel, data)
    assert hub.put(url, data).status == 200
    assert in_bucket(hub, channel, data)
    for answer in (ask(), ask(size=size), ask(size=size + 1)):
        assert answer.json() == {"success": True, "alreadyUploaded": True}
    assert hub.daemon("/createSignedFileUploadUrl", {"channelName": "none", "sha1": sha1, "size": 1}).status == 404


def test_tokens_with_the_scope_client_act_as_the_node(hub: Hub, channel: str) -> None:
    data = b"token " + channel.encode()
    store(hub, data)
    request = {"sha1": sha1_of(data), "channel": channel}
    _, reader = hub.call(hub.node.tokens.create(OPERATOR, UserName("boss"), ["read", "write"]))
    _, client = hub.call(hub.node.tokens.create(OPERATOR, UserName("boss"), ["client"]))
    assert hub.post("/uploadFile", request, Authorization=f"Bearer {reader}").status == 403
    assert not in_bucket(hub, channel, data)
    assert hub.post("/uploadFile", request, Authorization=f"Bearer {client}").status == 200
    assert in_bucket(hub, channel, data)
    hub.revoke(hub.node.identity.node_id, channel)
    assert hub.post("/uploadFile", request, Authorization=f"Bearer {client}").status == 403


# -- out of a channel --------------------------------------------------------------------------------------------------


def test_what_is_here_needs_no_right(hub: Hub, channel: str) -> None:
    data = b"here " + channel.encode()
    hub.revoke(hub.node.identity.node_id, channel)
    assert frames(load(hub, sha1_of(data), None))[0]["type"] == "error"
    assert load(hub, sha1_of(data), channel).status == 403
    store(hub, data)
    for name in (None, channel, "no-such-channel"):
        first, last = frames(load(hub, sha1_of(data), name))
        assert first == {"type": "progress", "bytesLoaded": 0, "bytesTotal": 0}
        assert Path(last["localFilePath"]).read_bytes() == data


def test_a_missing_role_is_said_before_the_first_message(hub: Hub, channel: str) -> None:
    own = hub.node.identity.node_id
    absent = sha1_of(b"absent")
    (message,) = frames(load(hub, absent, channel))
    assert message["type"] == "error"
    assert absent in message["error"]
    hub.grant(own, channel, Role.ALL & ~Role.REQUEST_FILES)
    refused_as(hub, load(hub, absent, channel), "requestFiles", channel, "file.load")
    hub.grant(own, channel, Role.REQUEST_FILES)
    assert frames(load(hub, absent, channel))[0]["type"] == "error"
    (unknown,) = frames(load(hub, absent, "no-such-channel"))
    assert "no-such-channel" in unknown["error"]


def test_a_file_is_put_together_from_its_chunks(hub: Hub, channel: str) -> None:
    pieces = [channel.encode() * 1000, b"second" * 100]
    whole = b"".join(pieces)
    bounds = [0, len(pieces[0]), len(whole)]
    manifest = {
        "size": len(whole),
        "sha1": sha1_of(whole),
        "chunks": [
            {"start": start, "end": end, "sha1": sha1_of(piece)}
            for start, end, piece in zip(bounds, bounds[1:], pieces, strict=False)
        ],
    }
    document = json.dumps(manifest).encode()
    uploader = LabNode()
    hub.register(uploader)
    hub.join(uploader, channel)
    hub.upload(uploader, channel, document)
    hub.upload(uploader, channel, pieces[0])
    assert frames(load(hub, sha1_of(whole), channel, manifestSha1=sha1_of(document)))[-1]["type"] == "error"
    hub.upload(uploader, channel, pieces[1])
    other = sha1_of(b"another file")
    (wrong,) = frames(load(hub, other, channel, manifestSha1=sha1_of(document)))
    assert "manifest of another file" in wrong["error"]
    last = frames(load(hub, sha1_of(whole), channel, manifestSha1=sha1_of(document)))[-1]
    assert Path(last["localFilePath"]).read_bytes() == whole
    # It came through this channel, so it is not this server's own to offer in others.
    hub_id = hub.node.identity.node_id
    assert hub.call(hub.node.origins.of(sha1_of(whole))) == {f"{hub_id}/{channel}"}


class OtherHub:
    """Has the channel `far`; what it does is scripted."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.data = b"from far away"
        self.error: Exception | None = None
        self.steps: list[int] = []
        self.cancelled = False
        self.uploads: list[tuple[str, str]] = []

    async def has(self, channel: str) -> bool:
        return channel == "far"

    async def upload(self, sha1: Sha1, channel: str, principal: Principal) -> None:
        self.uploads.append((sha1, channel))

    async def upload_url(self, sha1: Sha1, channel: str, size: int | None, principal: Principal) -> UploadUrl:
        return UploadUrl(exists=False, url="http://other.hub/bucket/upload/x")

    async def fetch(self, key: FileKey, channel: str, principal: Principal, progress: Progress) -> None:
        try:
            for step in self.steps:
                progress.start(100)
                progress.add(step)
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error
        await self.hub.node.blobs.store_bytes(self.data, OPERATOR)


@pytest.fixture
def far(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> OtherHub:
    other = OtherHub(hub)
    own = hub.node.offers
    finder = ChannelFinder(other, *own._hubs)
    monkeypatch.setattr(hub.node, "offers", finder)
    monkeypatch.setattr(channels, "PROGRESS_SECONDS", 0.02)
    return other


def test_channels_of_another_hub_plug_in(hub: Hub, far: OtherHub) -> None:
    sha1 = store(hub, b"out")
    assert hub.daemon("/uploadFile", {"sha1": sha1, "channel": "far"}).status == 200
    assert far.uploads == [(sha1, "far")]
    answer = hub.daemon("/createSignedFileUploadUrl", {"sha1": sha1, "channelName": "far", "size": 3})
    assert answer.json()["signedUrl"] == "http://other.hub/bucket/upload/x"
    # Other names are this hub's own, as before.
    assert hub.daemon("/uploadFile", {"sha1": sha1, "channel": "default"}).status == 200
    assert len(far.uploads) == 1


def test_progress_is_told_while_it_comes(hub: Hub, far: OtherHub) -> None:
    far.data, far.steps = b"progress", [10, 20, 70]
    *told, last, finished = frames(load(hub, sha1_of(far.data), "far"))
    assert told
    assert {message["bytesTotal"] for message in told} == {100}
    loaded = [message["bytesLoaded"] for message in told]
    assert loaded == sorted(loaded)
    assert last == {"type": "progress", "bytesLoaded": 100, "bytesTotal": 100}
    assert Path(finished["localFilePath"]).read_bytes() == far.data


@pytest.mark.parametrize("steps", [[], [50]], ids=["at once", "after progress"])
def test_refusals_and_failures_of_another_hub(hub: Hub, far: OtherHub, steps: list[int]) -> None:
    absent, far.steps = sha1_of(b"nothing"), steps
    far.error = Forbidden("node N lacks requestFiles in the channel far")
    refusal = load(hub, absent, "far")
    if steps:
        assert "lacks requestFiles" in frames(refusal)[-1]["error"]
    else:
        assert refusal.status == 403
        assert b"lacks requestFiles" in refusal.body
    for error in (NotFound("not there"), Unavailable("the hub does not answer")):
        far.error = error
        last = frames(load(hub, absent, "far"))[-1]
        assert last == {"type": "error", "error": error.message}


def test_a_client_that_goes_away_ends_the_fetch(hub: Hub, far: OtherHub) -> None:
    far.steps = [0] * 200
    body = json.dumps({"fileKey": {"sha1": sha1_of(b"never")}, "channelName": "far"})
    head = [
        "POST /loadFile HTTP/1.1",
        "Host: localhost",
        f"KACHERY-CLIENT-AUTH-CODE: {hub.code}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    with socket.create_connection(("127.0.0.1", hub.port), 5) as connection:
        connection.sendall(("\r\n".join(head) + "\r\n\r\n" + body).encode())
        assert b"200" in connection.recv(1000)
        assert not far.cancelled
    until = time.monotonic() + 5
    while not far.cancelled:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_shadowing_is_logged_once(hub: Hub, far: OtherHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.make_channel("far")
    for _ in range(3):
        load(hub, sha1_of(b"shadow"), "far")
    assert capsys.readouterr().out.count("hides this hub's own") == 1
