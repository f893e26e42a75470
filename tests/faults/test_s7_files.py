"""S7: authority that ends while an upload is under way."""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable

import pytest

from tests.faults.report import report, without
from tests.federations import CHANNEL, Federation, SignedRequests, federate, sha1_of
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]


def role(lab: Federation, member: SignedRequests) -> None:
    """The channel takes the role away."""
    lab.grant(member.id, "requestFiles")


def membership(lab: Federation, member: SignedRequests) -> None:
    """The node is no member any more."""
    lab.admin("DELETE", f"/channels/{CHANNEL}/memberships/{member.id}")


def offer(lab: Federation, member: SignedRequests) -> None:
    """The node's owner offers local files no longer."""
    lab.admin("PUT", f"/channels/{CHANNEL}/memberships/{member.id}", {"offer": "uploaded"})


def public(lab: Federation, member: SignedRequests) -> None:
    """The channel becomes public, where local files are not offered."""
    lab.admin("PATCH", f"/channels/{CHANNEL}", {"public": True})


ENDS = (role, membership, offer, public)


def upload(lab: Federation, member: SignedRequests, end: Callable[[Federation, SignedRequests], None] | None) -> int:
    """PUT on an on-demand ticket; `end` happens when half of the body is sent. The status."""
    data = os.urandom(200_000)
    url = member.upload_url(sha1_of(data), len(data)).json()["url"]
    connection = http.client.HTTPConnection("127.0.0.1", lab.hub.port, timeout=30)
    connection.putrequest("PUT", "/" + url.split("/", 3)[3])
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data[:100_000])
    if end is not None:
        end(lab, member)
    connection.send(data[100_000:])
    response = connection.getresponse()
    response.read()
    connection.close()
    assert (sha1_of(data) in lab.objects()) is (response.status == 200)
    return response.status


def test_the_end_of_authority_ends_an_upload_under_way(make_node: Make) -> None:
    lab = federate(make_node)
    # The last one changes the channel for all.
    members = {end: lab.stranger(f"odd-{end.__name__}") for end in ENDS}

    def attempt() -> dict[str, int]:
        return {end.__name__: upload(lab, members[end], end) for end in ENDS}

    for member in members.values():
        assert upload(lab, member, None) == 200
    found = attempt()
    assert lab.hub.terminate() == 0
    lab.hub.prefix = without("no_recheck")
    lab.hub.start()
    lab.admin("PATCH", f"/channels/{CHANNEL}", {"public": False})
    for member in members.values():
        lab.join(member.id, offer="local")
    unguarded = attempt()
    report("S7 on-demand upload", len(found), **found, unguarded=unguarded)
    assert set(found.values()) == {403}
    assert set(unguarded.values()) == {200}


def test_a_provider_whose_role_ends_is_not_heard(make_node: Make) -> None:
    """The role goes while requests wait for their turn: what was not uploaded by then is not uploaded."""
    lab = federate(make_node, "alpha", "beta")
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    lab.grant(lab.hub, "requestFiles")
    first, second = (alpha.store(os.urandom(1000)).json()["sha1"] for _ in range(2))
    assert lab.last(beta, first)["type"] == "finished"
    lab.grant(alpha, "requestFiles")
    ticket = lab.as_node(alpha).upload_url(second, 1000)
    assert ticket.status == 403 and "provideFiles" in ticket.json()["detail"]
    assert lab.last(beta, second)["type"] == "error"
    assert second not in lab.objects()


@pytest.mark.parametrize("again", [False, True])
def test_a_deletion_while_it_arrives_stays(make_node: Make, again: bool) -> None:
    """An object that is deleted while an on-demand upload of it is under way is not brought back; an upload on purpose
    brings it back."""
    lab = federate(make_node)
    member = lab.stranger()
    data = os.urandom(50_000)
    sha1 = sha1_of(data)
    first = member.upload_url(sha1, len(data)).json()["url"]
    late = member.upload_url(sha1, len(data), on_demand=not again).json()["url"]
    assert lab.hub.request("PUT", "/" + first.split("/", 3)[3], data, auth=False).status == 200
    lab.admin("DELETE", f"/channels/{CHANNEL}/objects/{lab.objects()[sha1]['path']}")
    status = lab.hub.request("PUT", "/" + late.split("/", 3)[3], data, auth=False).status
    assert (status, sha1 in lab.objects()) == ((200, True) if again else (404, False))
    assert member.upload_url(sha1, len(data)).status == (200 if again else 404)
