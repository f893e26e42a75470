"""WebSocket `/p/{token}`: what is no message ends the connection with its reason, and nothing else."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from kachery_lab.http.protocols.gateway2022 import resource_providers as room
from tests import resource_providers as providers
from tests.resource_providers import SECONDS, Reader, all_gone, opened, providing
from tests.zones import Zone

hub, zone, reader, data = providers.hub, providers.zone, providers.reader, providers.data

GOOD = {"type": "initialize", "resourceName": "Z", "zone": "Z"}
REPLY = {
    "type": "responseToClient",
    "requestId": "R",
    "response": {"type": "fileUpload", "status": {"status": "queued"}},
}
NO_FRAMES: list[str | bytes] = [
    "",
    " ",
    "{",
    "null",
    "[]",
    "1",
    '"initialize"',
    "[" * 5000,
    '{"type":"ping","type":"ping"}',
    '{"type":NaN}',
    '{"type":"\\ud800"}',
    b"{}",
    b"\xff\xfe",
    "{}",
    '{"type":["ping"]}',
    '{"type":"acknowledge"}',
    '{"type":"requestFromClient"}',
    json.dumps({"type": "ping", "x": "x" * room.MAX_FRAME}),
]
NO_BEGINNINGS = [
    {"type": "ping"},
    REPLY,
    {"type": "initialize"},
    {**GOOD, "extra": 1},
    {**GOOD, "resourceName": "another"},
    {**GOOD, "resourceName": None},
    {**GOOD, "zone": 1},
    {**GOOD, "zone": "../x"},
    {**GOOD, "zone": None},
    {**GOOD, "zone": ["Z"]},
    {"type": "initialize", "resourceName": "Z"},
]
NO_REPLIES = [
    GOOD,
    {**REPLY, "requestId": None},
    {**REPLY, "requestId": 1},
    {**REPLY, "extra": 1},
    {**REPLY, "error": 1},
    {**REPLY, "error": None},
    {**REPLY, "response": None},
    {**REPLY, "response": {}},
    {**REPLY, "response": []},
    {**REPLY, "response": {"type": "fileUpload"}},
    {**REPLY, "response": {"type": "other", "status": {"status": "queued"}}},
    {**REPLY, "response": {"type": "fileUpload", "status": "queued"}},
    {**REPLY, "response": {"type": "fileUpload", "status": {}}},
    {**REPLY, "response": {"type": "fileUpload", "status": {"status": "done"}}},
    {**REPLY, "response": {"type": "fileUpload", "status": {"status": ["queued"]}}},
    {**REPLY, "response": {"type": "fileUpload", "status": {"status": "error", "error": {}}}},
    {key: value for key, value in REPLY.items() if key != "requestId"},
    {key: value for key, value in REPLY.items() if key != "response"},
]


def named(message: Any, zone: Zone, request: str = "R") -> str:
    """A frame of the table, with the names of the test in it."""
    return json.dumps(message).replace('"Z"', json.dumps(zone.name)).replace('"R"', json.dumps(request))


@pytest.mark.parametrize(
    "frame", [*NO_FRAMES, *NO_BEGINNINGS], ids=lambda one: one[:40] if isinstance(one, str) else ascii(one)[:60]
)
def test_bad_beginnings(zone: Zone, frame: Any) -> None:
    with opened(zone.hub, zone.writer) as line:
        line.socket.send(frame if isinstance(frame, str | bytes) else named(frame, zone))
        code, reason = line.end()
        assert (code, reason[:13]) == (1008, "bad_message: "), reason
    all_gone(zone.hub)
    with providing(zone.hub, zone.writer, zone.name):
        pass


@pytest.mark.parametrize(
    "frame", [*NO_FRAMES, *NO_REPLIES], ids=lambda one: one[:40] if isinstance(one, str) else ascii(one)[:60]
)
def test_bad_messages(zone: Zone, reader: Reader, data: bytes, frame: Any) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        asked = reader.begin(data)
        wanted = line.wanted()
        line.socket.send(frame if isinstance(frame, str | bytes) else named(frame, zone, wanted["requestId"]))
        code, reason = line.end()
        assert (code, reason[:13]) == (1008, "bad_message: "), reason
        found = asked.result(SECONDS)
        assert (found["status"], "disconnected" in found["error"]) == ("error", True)
    with providing(zone.hub, zone.writer, zone.name):
        pass


def test_a_frame_over_the_servers_limit(zone: Zone) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        line.socket.send(" " * 300_000)
        assert line.end()[0] == 1009


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {"type": st.sampled_from(["initialize", "ping", "responseToClient", "acknowledge"]) | JSON},
    optional=dict.fromkeys(("resourceName", "zone", "proxySecret", "requestId", "response", "error"), JSON),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.booleans(), message=FIELDS | JSON)
def test_any_message(zone: Zone, first: bool, message: Any) -> None:
    """It is taken, or it ends the connection with a reason; the next one is served."""
    with opened(zone.hub, zone.writer) if first else providing(zone.hub, zone.writer, zone.name) as line:
        with suppress(ConnectionClosed):
            line.socket.send(json.dumps(message))
            line.socket.send("{")
        code, reason = line.end()
        assert (code, reason.partition(": ")[0]) in {(1008, "bad_message"), (1008, "forbidden")}, reason
    all_gone(zone.hub)


def test_silence(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "INITIALIZE_SECONDS", 0.2)
    with opened(zone.hub, zone.writer) as line:
        code, reason = line.end()
        assert (code, "no initialize came" in reason) == (1008, True)


def test_many_messages(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        for _ in range(450):
            line.say(type="ping")
        asked = reader.begin(data)
        line.status(line.wanted(), "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}
