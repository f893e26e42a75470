"""Tickets and capabilities give no more than the credential that asked for them, and end with it (S7)."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject, subject_of
from tests.faults.report import report
from tests.hubs import Hub, LabNode, path_of
from tests.servers import Answer

BOSS = UserName("boss")
"""Owns every channel of these tests, so that only the token takes something away."""


def subject(hub: Hub, scopes: list[str], channels: list[str] | None = None, seconds: float | None = None) -> Subject:
    """Whose roles a new token of BOSS uses."""
    expires_at = None if seconds is None else int((time.time() + seconds) * 1000)
    made = hub.node.tokens.create(OPERATOR, BOSS, scopes, expires_at=expires_at, channels=channels)
    _, secret = hub.call(made)
    return subject_of(hub.node.access.by_token(secret, None), hub.node.identity.node_id)


def read(hub: Hub, channel: str, reader: Subject, path: str) -> Answer:
    return hub.get(f"/bucket/~{hub.node.uploads.capability(channel, reader)}/{channel}/{path}")


def ticket(hub: Hub, channel: str, owner: Subject, data: bytes) -> str:
    return f"/bucket/upload/{hub.node.uploads.issue(channel, ObjectPath.parse(path_of(data)), len(data), owner)}"


def revoke(hub: Hub, held: Subject) -> None:
    assert held.token is not None
    hub.call(hub.node.tokens.revoke(OPERATOR, held.token))


def test_a_token_reads_and_writes_what_its_scopes_say(
    hub: Hub, channel: str, member: LabNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.upload(member, channel, b"bound")
    reads, writes = subject(hub, ["read"]), subject(hub, ["write"])
    assert read(hub, channel, reads, path).body == b"bound"
    refused = read(hub, channel, writes, path)
    assert refused.status == 403
    assert "requestFiles" in refused.json()["detail"]
    assert hub.put(ticket(hub, channel, writes, b"new"), b"new").status == 200
    with pytest.raises(Forbidden, match="provideFiles"):
        ticket(hub, channel, reads, b"newer")
    # What a hub with another mind would have issued is not honoured either: the ceiling is looked at again.
    with monkeypatch.context() as careless:
        careless.setattr(hub.node.roles, "require", lambda *_: None)
        url = ticket(hub, channel, reads, b"newer")
    assert hub.put(url, b"newer").status == 403
    assert hub.call(hub.node.buckets.find(channel, path_of(b"newer"))) is None


def test_a_narrowed_token_stays_in_its_channels(hub: Hub, channel: str, member: LabNode) -> None:
    other = f"{channel}-other"
    hub.make_channel(other)
    hub.join(member, other)
    path = hub.upload(member, other, b"elsewhere")
    wide, narrow = subject(hub, ["read", "write"]), subject(hub, ["read", "write"], [channel])
    assert read(hub, other, wide, path).body == b"elsewhere"
    assert hub.put(ticket(hub, other, wide, b"wide"), b"wide").status == 200
    with pytest.raises(Forbidden, match="does not reach"):
        read(hub, other, narrow, path)
    with pytest.raises(Forbidden, match="provideFiles"):
        ticket(hub, other, narrow, b"narrow")
    # In its own channel it does, and that capability is for no other.
    own = hub.upload(member, channel, b"here")
    assert read(hub, channel, narrow, own).body == b"here"
    segment = hub.node.uploads.capability(channel, narrow)
    assert hub.get(f"/bucket/~{segment}/{other}/{path}").status == 403


@pytest.mark.parametrize("scopes", [["read", "write"], ["client"]], ids=" ".join)
@pytest.mark.parametrize("how", ["kept", "revoked", "expired", "user removed"])
def test_they_end_with_the_token(hub: Hub, channel: str, member: LabNode, how: str, scopes: list[str]) -> None:
    hub.join(hub.node.identity.node_id, channel)
    path = hub.upload(member, channel, b"S7")
    if how == "user removed":
        name = f"u{time.monotonic_ns():x}"
        hub.call(hub.node.authorizations.grant(OPERATOR, channel, "user", name, Role.ALL))
        _, secret = hub.call(hub.node.tokens.create(OPERATOR, UserName(name), scopes))
        held = subject_of(hub.node.access.by_token(secret, None), hub.node.identity.node_id)
    else:
        held = subject(hub, scopes, seconds=0.7 if how == "expired" else None)
    url, segment = ticket(hub, channel, held, b"late"), hub.node.uploads.capability(channel, held)
    address = f"/bucket/~{segment}/{channel}/{path}"
    assert hub.get(address).body == b"S7"
    if how == "revoked":
        revoke(hub, held)
    elif how == "expired":
        time.sleep(0.75)
    elif how == "user removed":
        hub.call(hub.node.users.remove(OPERATOR, name))
    expected = 200 if how == "kept" else 403
    answers = [hub.get(address), hub.request("HEAD", address), hub.put(url, b"late")]
    assert [answer.status for answer in answers] == [expected] * 3
    if how != "kept":
        assert f"token {held.token}" in answers[0].json()["detail"]
    assert (hub.call(hub.node.buckets.find(channel, path_of(b"late"))) is None) is (how != "kept")


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_s7_a_token_revoked_while_bytes_come(
    hub: Hub, channel: str, member: LabNode, monkeypatch: pytest.MonkeyPatch, guard: bool
) -> None:
    """Control: without the look at the token what was revoked is stored."""
    data = b"S7 token" * 100_000
    held = subject(hub, ["write"])
    url = ticket(hub, channel, held, data)
    if not guard:
        monkeypatch.setattr(hub.node.roles, "_token_in_force", lambda _: True)
    answer = hub.put(url, data, before_end=lambda: revoke(hub, held))
    stored = hub.call(hub.node.buckets.find(channel, path_of(data))) is not None
    assert (answer.status, stored) == ((403, False) if guard else (200, True))
    report("S7", 1, guard=guard, status=answer.status, stored=stored)


def test_control_without_the_binding_a_reader_writes(hub: Hub, channel: str, member: LabNode) -> None:
    """What a ticket that forgets the ceiling and the token would give."""
    held = subject(hub, ["read"])
    forgotten = replace(held, ceiling=Role.ALL, token=None)
    revoke(hub, held)
    assert hub.put(ticket(hub, channel, forgotten, b"control"), b"control").status == 200
    with pytest.raises(Forbidden, match="was revoked"):
        ticket(hub, channel, held, b"control")


def test_a_certificate_bounds_its_tickets(hub: Hub, channel: str, member: LabNode) -> None:
    """Roles that a node got after its certificate was issued are not in the tickets that it asks for with it."""
    hub.grant(member.id, channel, Role.PROVIDE_FILES)
    (url,) = hub.upload_urls(member, channel, [path_of(b"certified")], [9])
    _, owner = hub.node.uploads.open(url.rpartition("/")[2])
    assert owner == Subject("node", member.id, Role.PROVIDE_FILES, frozenset({channel}))
    assert hub.put(url, b"certified").status == 200
