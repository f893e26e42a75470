"""Faults and abuse of `/api/gateway`: altered, repeated, late, too many, in somebody else's name.

Every row has a positive control: with its guard taken out the loss shows.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import types
from typing import Any

import pytest

from kachery_lab.core.rates import Rates
from kachery_lab.core.roles import Role
from kachery_lab.http.protocols.gateway2022 import auth, gateway
from kachery_lab.services import client_requests
from kachery_lab.services.channel_files import ChannelFiles
from kachery_lab.services.client_requests import WINDOW_MS, ClientRequests
from kachery_lab.services.clients import ClientService
from kachery_lab.services.principals import OPERATOR, Principal
from kachery_lab.services.subjects import RoleService
from tests import gateway as zones
from tests.faults.report import histogram, report
from tests.gateway import OTHER, ZONE, CloudClient, announce, ask, finalization, make_client, store
from tests.hubs import Hub
from tests.proxies import LosingProxy

pytestmark = pytest.mark.slow
hub, writer, data = zones.hub, zones.writer, zones.data

SMALL_ORDER = "01" + "00" * 31


def is_found(hub: Hub, client: CloudClient, data: bytes, zone: str = ZONE) -> bool:
    answer = ask(hub, client.file("findFile", data, zone))
    return answer.status == 200 and bool(answer.json()["found"])


# -- S4: altered -------------------------------------------------------------------------------------------------------


def mutants(hub: Hub, good: dict[str, Any], other: CloudClient) -> list[dict[str, Any]]:
    payload, signature = good["payload"], good["signature"]
    changed = [
        {**payload, "hash": "0" * 40},
        {**payload, "zone": OTHER},
        {**payload, "timestamp": payload["timestamp"] + 1},
        {**payload, "size": payload["size"] + 1},
        {**payload, "type": "initiateFileUpload", "objectKey": "x"},
    ]
    found = [{**good, "payload": one} for one in changed]
    flipped = [f"{signature[:at]}{int(signature[at], 16) ^ 1:x}{signature[at + 1 :]}" for at in range(0, 128, 3)]
    found += [{**good, "signature": one} for one in [*flipped, "0" * 128, signature[64:] + signature[:64]]]
    # S + L is the same point: a second signature for the same text, unless the scalar is bounded.
    order = 2**252 + 27742317777372353535851937790883648493
    scalar = (int.from_bytes(bytes.fromhex(signature[64:]), "little") + order).to_bytes(32, "little").hex()
    found.append({**good, "signature": signature[:64] + scalar})
    found.append({**good, "fromClientId": other.id})
    found.append({**good, "fromClientId": SMALL_ORDER, "signature": SMALL_ORDER + "00" * 32})
    return found


def test_s4_altered_requests_do_nothing(hub: Hub, writer: CloudClient, data: bytes) -> None:
    other = make_client(hub, "another", Role.PROVIDE_FILES)
    good = writer.file("initiateFileUpload", data, ZONE, size=len(data))
    found = mutants(hub, good, other)
    statuses = [ask(hub, one).status for one in found]
    assert set(statuses) <= {400, 401}
    assert ask(hub, good).status == 200
    report("S4 gateway", len(found), killed=len(found), statuses=histogram(statuses))


def test_s4_control_without_the_signature_check(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_requests, "verify_2021", lambda *_args, **_more: True)
    other = make_client(hub, "another", Role.PROVIDE_FILES)
    found = mutants(hub, writer.file("initiateFileUpload", data, ZONE, size=len(data)), other)
    accepted = sum(ask(hub, one).status == 200 for one in found)
    assert accepted > 40
    report("S4 gateway control", len(found), killed=len(found) - accepted)


# -- S5, O4: time ------------------------------------------------------------------------------------------------------


def shifted(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The wall clock that requests are compared with is off; the monotonic one is not."""
    clock = types.SimpleNamespace(
        time=lambda: time.time() + seconds,
        monotonic=time.monotonic,
        gmtime=time.gmtime,
        strftime=time.strftime,
    )
    monkeypatch.setattr(client_requests, "time", clock)


@pytest.mark.parametrize("shift", [-86_400, -3600, -901, -895, -60, 0, 60, 895, 901, 3600, 86_400, None])
def test_s5_o4_clocks(
    hub: Hub, writer: CloudClient, data: bytes, shift: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's clock is off by so many seconds; None: it is 1970."""
    shift = -time.time() if shift is None else shift
    good = writer.file("findFile", data, ZONE)
    with monkeypatch.context() as patch:
        shifted(patch, shift)
        answer = ask(hub, good)
        expected = 200 if abs(shift) <= WINDOW_MS / 1000 else 401
        assert answer.status == expected, answer.body
        if expected == 401:
            there = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(max(time.time() + shift, 0.0)))
            text = answer.body.decode()
            assert "Set the clock" in text
            assert there in text or time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time())) in text
    assert ask(hub, good).status == 200
    report("S5 O4 gateway", 1, shift=round(shift), status=expected, wrong_expiries=0)


def test_o4_rates_do_not_follow_the_clock(hub: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(hub, "steady", Role.REQUEST_FILES)
    monkeypatch.setattr(hub.node.client_requests, "_rates", Rates(0.01, 3))
    for shift in (0.0, 600.0, -600.0):
        with monkeypatch.context() as patch:
            shifted(patch, shift)
            assert ask(hub, client.file("findFile", data, ZONE)).status == 200
    with monkeypatch.context() as patch:
        shifted(patch, 800.0)
        assert ask(hub, client.file("findFile", data, ZONE)).status == 429


def test_s5_control_without_the_window(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientRequests, "check_time", lambda self, timestamp: None)
    old = writer.file("findFile", data, ZONE, timestamp=1)
    assert ask(hub, old).status == 200
    report("S5 gateway control", 1, accepted=1)


# -- S6, C5: again -----------------------------------------------------------------------------------------------------


def forget(self: ClientRequests, signature: str, timestamp: float, work: Any) -> Any:
    """`once` without its memory."""
    return work()


def repeat_a_deletion(hub: Hub, writer: CloudClient, data: bytes) -> bool:
    """Somebody who saw a signed deletion sends it again after the file was uploaded anew; whether it is still there."""
    store(hub, writer, data)
    deletion = make_client(hub, "boss").file("deleteFile", data, ZONE)
    assert ask(hub, deletion).json() == {"type": "deleteFile", "success": True}
    store(hub, writer, data)
    assert ask(hub, deletion).json() == {"type": "deleteFile", "success": True}
    return is_found(hub, writer, data)


def test_s6_a_replayed_deletion_has_no_effect(hub: Hub, writer: CloudClient) -> None:
    assert all(repeat_a_deletion(hub, writer, os.urandom(100)) for _ in range(5))
    report("S6 gateway", 5, with_effect=0)


def test_s6_control_without_memory(hub: Hub, writer: CloudClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientRequests, "once", forget)
    assert not repeat_a_deletion(hub, writer, os.urandom(100))
    report("S6 gateway control", 1, with_effect=1)


def through(port: int, envelope: dict[str, Any]) -> tuple[int, Any] | None:
    """(Status, JSON), or None when the connection ended without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/api/gateway", json.dumps(envelope), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def lose_and_ask_again(hub: Hub, writer: CloudClient, data: bytes) -> list[tuple[int, Any] | None]:
    """Each request of an upload and a deletion loses its answer once; what the second asking is answered."""
    owner = make_client(hub, "boss")
    found = []
    with LosingProxy(hub.port) as proxy:

        def twice(envelope: dict[str, Any]) -> Any:
            proxy.losing.append("gateway")
            assert through(proxy.port, envelope) is None
            found.append(through(proxy.port, envelope))
            return found[-1]

        announced = twice(writer.file("initiateFileUpload", data, ZONE, size=len(data)))[1]
        assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
        twice(finalization(writer, data, announced["objectKey"]))
        twice(owner.file("deleteFile", data, ZONE))
        assert proxy.lost["gateway"] == 3
    return found


def test_c5_a_lost_answer_is_given_again(hub: Hub, writer: CloudClient) -> None:
    for _ in range(5):
        data = os.urandom(300)
        initiated, finalized, deleted = lose_and_ask_again(hub, writer, data)
        assert initiated is not None and initiated[0] == 200
        assert finalized == (200, {"type": "finalizeFileUpload"})
        assert deleted == (200, {"type": "deleteFile", "success": True})
        assert not is_found(hub, writer, data)
    report("C5 gateway", 15, lost=0, duplicates=0)


def test_c5_control_without_memory(hub: Hub, writer: CloudClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientRequests, "once", forget)
    deleted = lose_and_ask_again(hub, writer, os.urandom(300))[2]
    assert deleted is not None and deleted[1]["success"] is False
    report("C5 gateway control", 1, lost=1)


# -- S7: rights that end meanwhile -------------------------------------------------------------------------------------


def end_rights(hub: Hub, how: str, client: CloudClient, user: str) -> None:
    if how == "key removed":
        hub.call(hub.node.clients.remove(OPERATOR, client.id))
    elif how == "role revoked":
        hub.call(hub.node.authorizations.revoke(OPERATOR, ZONE, "user", user))
    else:
        hub.call(hub.node.authorizations.grant(OPERATOR, ZONE, "client", client.id, Role.REQUEST_FILES))


@pytest.mark.parametrize("how", ["key removed", "role revoked", "own authorization"])
@pytest.mark.parametrize("when", ["before the bytes", "before the end"])
def test_s7_rights_that_end_meanwhile(hub: Hub, writer: CloudClient, data: bytes, how: str, when: str) -> None:
    user = f"leaving-{time.monotonic_ns()}"
    client = make_client(hub, user, Role.PROVIDE_FILES | Role.REQUEST_FILES)
    announced = announce(hub, client, data)
    if when == "before the bytes":
        end_rights(hub, how, client, user)
        assert hub.request("PUT", announced["signedUploadUrl"], data).status == 403
    else:
        assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
        end_rights(hub, how, client, user)
    refused = ask(hub, finalization(client, data, announced["objectKey"]))
    assert refused.status in (401, 403)
    assert not is_found(hub, writer, data)
    report("S7 gateway", 1, how=how, when=when, bypass=0)


def test_s7_control_without_the_last_look(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(hub, "lingering", Role.PROVIDE_FILES)
    announced = announce(hub, client, data)
    assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
    end_rights(hub, "role revoked", client, "lingering")
    with monkeypatch.context() as patch:
        patch.setattr(RoleService, "require", lambda self, subject, channel, role: None)
        assert ask(hub, finalization(client, data, announced["objectKey"])).status == 200
    assert is_found(hub, writer, data)
    report("S7 gateway control", 1, bypass=1)


# -- S8, S10: what is others' ------------------------------------------------------------------------------------------


def test_s8_nobody_else_takes_a_file_away(hub: Hub, writer: CloudClient, data: bytes) -> None:
    key = store(hub, writer, data)["objectKey"]
    rival = make_client(hub, "rival", Role.ALL)
    attempts = [
        finalization(rival, data, key),
        finalization(rival, data, key, size=1),
        finalization(writer, data, key, size=1),
        finalization(rival, data, key.replace(ZONE, OTHER, 1), OTHER),
        finalization(rival, data, key, OTHER),
        rival.file("deleteFile", data, ZONE),
        writer.file("deleteFile", data, ZONE),
        make_client(hub, "nobody").file("deleteFile", data, ZONE),
        CloudClient().file("deleteFile", data, ZONE),
    ]
    statuses = [ask(hub, one).status for one in attempts]
    assert all(400 <= status < 500 for status in statuses), statuses
    assert ask(hub, finalization(writer, data, key)).status == 200
    assert is_found(hub, writer, data)
    report("S8 gateway", len(attempts), lost=0, statuses=histogram(statuses))


def test_s8_control_without_the_owner_check(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(hub, writer, data)
    anyone = Principal("user", "boss", frozenset({"admin"}))
    monkeypatch.setattr(ClientService, "as_owner", lambda *_: anyone)
    assert ask(hub, make_client(hub, "rival", Role.ALL).file("deleteFile", data, ZONE)).json()["success"] is True
    assert not is_found(hub, writer, data)
    report("S8 gateway control", 1, lost=1)


def leaks(hub: Hub, data: bytes) -> int:
    """How many ways to learn of a file by its hash alone worked."""
    tenant = make_client(hub, "tenant", Role.ALL, OTHER)
    found = int(is_found(hub, tenant, data, ZONE)) + int(is_found(hub, tenant, data, OTHER))
    found += int(is_found(hub, CloudClient(), data, ZONE))
    found += int(bool(announce(hub, tenant, data, OTHER)["alreadyExists"]))
    # The same answer for what is there and what is not.
    texts = {
        ask(hub, tenant.file("findFile", one, ZONE)).body.partition(b"(client")[0] for one in (data, data + b"absent")
    }
    return found + len(texts) - 1


def test_s10_a_hash_is_no_proof(hub: Hub, writer: CloudClient, data: bytes) -> None:
    store(hub, writer, data)
    assert leaks(hub, data) == 0
    report("S10 gateway", 5, leaks=0)


def test_s10_control_without_the_look_at_the_reader(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(hub, writer, data)
    monkeypatch.setattr(ChannelFiles, "_may_find", lambda *_: True)
    monkeypatch.setattr(RoleService, "require", lambda self, subject, channel, role: None)
    found = leaks(hub, data)
    assert found >= 2
    report("S10 gateway control", 5, leaks=found)


# -- S14: too many -----------------------------------------------------------------------------------------------------


def flood(hub: Hub, requests: int) -> list[int]:
    greedy, data = make_client(hub, f"greedy-{time.monotonic_ns()}", Role.REQUEST_FILES), b"x"
    statuses: list[int] = []

    def work() -> None:
        statuses.extend(ask(hub, greedy.file("findFile", data, ZONE)).status for _ in range(requests // 8))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def test_s14_one_key_does_not_stop_the_others(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.node.client_requests, "_rates", Rates(5.0, 40))
    statuses = flood(hub, 240)
    assert set(statuses) == {200, 429}
    assert 40 <= statuses.count(200) <= 120
    assert ask(hub, writer.file("findFile", data, ZONE)).status == 200
    report("S14 gateway", len(statuses), statuses=histogram(statuses))


def test_s14_a_forged_name_uses_up_nobodys_share(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.node.client_requests, "_rates", Rates(0.1, 20))
    forged = {**CloudClient().file("findFile", data, ZONE), "fromClientId": writer.id}
    assert {ask(hub, forged).status for _ in range(50)} == {401}
    assert ask(hub, writer.file("findFile", data, ZONE)).status == 200


def test_s14_control_without_rates(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientRequests, "check_rate", lambda self, who: None)
    statuses = flood(hub, 240)
    assert set(statuses) == {200}
    report("S14 gateway control", len(statuses), stopped=0)


def test_github_identities_open_nothing(hub: Hub, writer: CloudClient, data: bytes) -> None:
    store(hub, writer, data)
    claimed = {"payload": writer.file("findFile", data, ZONE)["payload"], "githubUserId": "writer"}
    for more in ({}, {"githubAccessToken": "ghp_x"}):
        assert ask(hub, {**claimed, **more}).status == 401
    assert auth.PAYLOADS.keys() == gateway._ANSWERS.keys()
