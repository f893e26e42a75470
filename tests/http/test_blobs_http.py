"""Files by hash over HTTP: ranges, validators, caches, pages of other origins, and who may read."""

from __future__ import annotations

import time
from urllib.parse import quote, urlsplit

import pytest

from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.roles import Role
from kachery_lab.core.tickets import Ticket
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject
from tests.hubs import Hub, path_of, sha1_of
from tests.zones import Zone, fresh

DATA = bytes(range(256)) * 40
SIZE = len(DATA)
TAG = f'"{sha1_of(DATA)}"'


@pytest.fixture(scope="module")
def public(hub: Hub) -> Zone:
    zone = Zone(hub, public=True)
    zone.upload(zone.owner, DATA)
    return zone


@pytest.fixture
def private(hub: Hub) -> Zone:
    return Zone(hub)


@pytest.fixture
def url(hub: Hub, public: Zone) -> str:
    return f"{hub.base}/sha1/{sha1_of(DATA)}"


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_a_public_file(hub: Hub, url: str) -> None:
    for target in (url, f"{url}?label=x&v=1", f"{url}/session.nwb", f"{url}/{quote('ä b.nwb')}?x"):
        answer = hub.get(target)
        assert (answer.status, answer.body) == (200, DATA)
        expected = {
            "content-length": str(SIZE),
            "content-type": "application/octet-stream",
            "etag": TAG,
            "accept-ranges": "bytes",
            "cache-control": "public, max-age=31536000, immutable",
            "x-content-type-options": "nosniff",
            "content-security-policy": "sandbox",
            "access-control-allow-origin": "*",
        }
        assert expected.items() <= answer.headers.items()
        assert "content-encoding" not in answer.headers
        assert "content-disposition" not in answer.headers
        head = hub.request("HEAD", target)
        assert (head.status, head.body) == (200, b"")
        assert {**head.headers, "date": "", "x-request-id": ""} == {**answer.headers, "date": "", "x-request-id": ""}


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-9", 0, 10),
        ("bytes=5-", 5, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        (f"bytes=-{SIZE}", 0, SIZE),
        (f"bytes=-{10 * SIZE}", 0, SIZE),
        (f"bytes={SIZE - 1}-{SIZE - 1}", SIZE - 1, SIZE),
        (f"bytes=7-{2**64}", 7, SIZE),
        (f"bytes=7-{10**60}", 7, SIZE),
    ],
)
def test_single_ranges(hub: Hub, url: str, asked: str, first: int, end: int) -> None:
    answer = hub.get(url, Range=asked)
    assert (answer.status, answer.body) == (206, DATA[first:end])
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - first)
    head = hub.request("HEAD", url, None, {"Range": asked})
    assert (head.status, head.headers["content-range"]) == (206, answer.headers["content-range"])


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={2**64}-", "bytes=-0", f"bytes={SIZE}-{SIZE + 5}"])
def test_ranges_behind_the_end(hub: Hub, url: str, asked: str) -> None:
    answer = hub.get(url, Range=asked)
    assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert hub.get(url, Range="bytes=0-0").status == 206


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,4-5", "bytes=a-b", "bytes=-", "items=0-5", "", "bytes=0-1,"])
def test_what_is_no_single_range_gives_the_whole(hub: Hub, url: str, asked: str) -> None:
    answer = hub.get(url, Range=asked)
    assert (answer.status, answer.body) == (200, DATA)


def test_validators(hub: Hub, url: str) -> None:
    for given in (TAG, f"W/{TAG}", "*", f'"x", {TAG}'):
        answer = hub.get(url, **{"If-None-Match": given})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", TAG)
        assert "max-age" in answer.headers["cache-control"]
    assert hub.get(url, **{"If-None-Match": '"other"'}).status == 200
    assert hub.get(url, **{"If-Range": TAG, "Range": "bytes=0-4"}).status == 206
    for other in ('"other"', f"W/{TAG}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        answer = hub.get(url, **{"If-Range": other, "Range": "bytes=0-4"})
        assert (answer.status, answer.body) == (200, DATA)


def test_an_empty_file(hub: Hub, public: Zone) -> None:
    public.upload(public.owner, b"")
    url = f"/sha1/{sha1_of(b'')}"
    assert (hub.get(url).status, hub.get(url).headers["content-length"]) == (200, "0")
    assert hub.get(url, Range="bytes=0-0").status == 416


def test_names_of_downloads(hub: Hub, url: str) -> None:
    for name, shown in (
        ("a b.nwb", "a%20b.nwb"),
        ('x"; filename=evil.html', "x%22%3B%20filename%3Devil.html"),
        ("ä\r\nSet-Cookie: a=b\x1b[31m\u202e", "%C3%A4%0D%0ASet-Cookie%3A%20a%3Db%1B%5B31m%E2%80%AE"),
        ("n" * 300, "n" * 255),
    ):
        answer = hub.get(f"{url}/{quote(name, safe='')}?download")
        assert answer.status == 200
        assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''{shown}"
        assert "set-cookie" not in answer.headers
    assert hub.get(f"{url}?download").headers["content-disposition"].endswith(sha1_of(DATA))


@pytest.mark.parametrize("name", ["x", "A" * 40, "0" * 39, "0" * 41, "0" * 40 + "%0a", "..%2f..%2fetc", "%00" * 40])
def test_what_is_no_hash(hub: Hub, url: str, name: str) -> None:
    assert hub.get(f"/sha1/{name}").status in (400, 404)
    assert hub.get(url).status == 200


# -- pages of other origins --------------------------------------------------------------------------------------------


def test_a_page_of_another_origin(hub: Hub, url: str, private: Zone) -> None:
    asked = {
        "Origin": "https://figurl.org",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization, range, if-none-match",
        "Access-Control-Request-Private-Network": "true",
    }
    answer = hub.request("OPTIONS", url, None, asked)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    assert {"GET", "HEAD", "PUT", "POST"} <= set(answer.headers["access-control-allow-methods"].split(","))
    assert answer.headers["access-control-allow-headers"] == "authorization,range,if-none-match"
    assert answer.headers["access-control-max-age"] == "86400"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in answer.headers
    exposed = hub.get(url, Origin="https://figurl.org").headers["access-control-expose-headers"]
    assert {"Content-Length", "Content-Range", "Accept-Ranges", "ETag"} <= set(exposed.split(", "))
    data = fresh()
    put = private.initiate(private.owner, data).json()["signedUploadUrl"]
    assert hub.request("OPTIONS", put, None, asked).headers["access-control-allow-origin"] == "*"
    done = hub.request("PUT", put, data, {"Origin": "https://figurl.org"})
    assert (done.status, done.headers["access-control-allow-origin"]) == (200, "*")
    # What answers with rights of a person stays with the listed origins.
    other = hub.request("OPTIONS", "/api/admin/v1/users", None, asked)
    assert other.headers["access-control-allow-origin"] == "http://localhost:3000"


# -- who may read ------------------------------------------------------------------------------------------------------


def test_a_private_file_needs_a_token_or_a_ticket(hub: Hub, private: Zone) -> None:
    data = fresh()
    private.upload(private.owner, data)
    plain = f"/sha1/{sha1_of(data)}"
    for key, status in (
        (None, 404),
        ("klk_wrong", 401),
        (private.other, 404),
        (private.writer, 404),
        (private.token("reader", "write"), 404),
        (private.token("reader", channels=["default"]), 404),
        (private.reader, 200),
        (private.owner, 200),
    ):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        for method in ("GET", "HEAD"):
            answer = hub.request(method, plain, None, headers)
            assert answer.status == status, (key, answer)
        if status == 200:
            assert answer.headers["cache-control"] == "private, no-store"
    signed = private.url(private.reader, data)
    for method in ("GET", "HEAD"):
        answer = hub.request(method, signed)
        assert (answer.status, answer.headers["cache-control"]) == (200, "private, no-store")
    assert hub.get(signed, Range="bytes=0-9").body == data[:10]
    named = signed.replace("?", "/recording.nwb?") + "&label=ignored"
    assert hub.get(named).body == data
    assert hub.get(signed, Authorization="Bearer klk_wrong").body == data


def test_the_local_client_reads_what_is_here(hub: Hub) -> None:
    data = fresh()
    code = {"KACHERY-CLIENT-AUTH-CODE": hub.code}
    assert hub.request("POST", "/store", data, code).status == 200
    assert hub.request("GET", f"/sha1/{sha1_of(data)}", None, code).body == data
    assert hub.request("GET", f"/sha1/{sha1_of(data)}").status == 404


def test_a_ticket_opens_one_file_for_reading(hub: Hub, private: Zone) -> None:
    data, other = fresh(), fresh()
    private.upload(private.owner, data)
    private.upload(private.owner, other)
    signed = urlsplit(private.url(private.reader, data))
    ticket = signed.query.removeprefix("ticket=")
    refused = [
        (f"/sha1/{sha1_of(other)}", ticket),
        (signed.path, ticket[:-1]),
        (signed.path, ticket[1:]),
        (signed.path, "x.y"),
        (signed.path, ""),
    ]
    for path, text in refused:
        assert hub.get(f"{path}?ticket={text}").status in (400, 403), path
    assert hub.request("PUT", f"/bucket/upload/{ticket}", data).status == 403
    put = private.initiate(private.owner, fresh()).json()["signedUploadUrl"].rpartition("/")[2]
    assert hub.get(f"{signed.path}?ticket={put}").status == 403
    assert hub.get(f"{signed.path}?ticket={ticket}").body == data


def test_a_right_that_is_taken_away_ends_signed_addresses(hub: Hub, private: Zone) -> None:
    data = fresh()
    private.upload(private.owner, data)
    signed = private.url(private.reader, data)
    assert hub.get(signed).status == 200
    private.revoke("reader")
    assert hub.get(signed).status == 403
    assert (f"user:{private.user('reader')}", "file.read", private.name) in [one[:3] for one in hub.refusals()]
    private.grant("reader", Role.REQUEST_FILES)
    assert hub.get(signed).status == 200
    hub.call(hub.node.channels.remove(OPERATOR, private.name))
    assert hub.get(signed).status in (403, 404)


@pytest.mark.parametrize(
    ("issued", "expires", "status"),
    [
        (-3600, -59, 200),
        (-3600, -61, 403),
        (59, 3600, 200),
        (62, 3600, 403),
        (0, 7 * 86400, 200),
        (0, 7 * 86400 + 1, 403),
        (0, 2**60, 403),
    ],
)
def test_the_times_of_a_ticket(hub: Hub, private: Zone, issued: int, expires: int, status: int) -> None:
    data = fresh()
    private.upload(private.owner, data)
    now = int(time.time())
    subject = str(Subject("user", private.user("reader")))
    ticket = Ticket("GET", private.name, path_of(data), subject, now + issued, now + expires, "n")
    text = hub.node.uploads._signer.ticket(ticket)
    assert hub.get(f"/sha1/{sha1_of(data)}?ticket={text}").status == status


def test_what_is_offered_on_demand_is_not_for_anybody(hub: Hub) -> None:
    zone, data = Zone(hub, public=True), fresh()
    own = hub.node.identity.node_id
    hub.call(hub.node.authorizations.join(OPERATOR, zone.name, own, offer="local", public_local=True))
    hub.grant(own, zone.name, Role.ALL)
    assert hub.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": hub.code}).status == 200
    assert zone.find(None, data).json()["found"] is False
    assert hub.get(zone.url(zone.reader, data)).body == data
    assert zone.find(None, data).json()["found"] is False
    assert hub.get(f"/sha1/{sha1_of(data)}").status == 404
    reference = hub.call(hub.node.buckets.find(zone.name, path_of(data)))
    assert reference is not None
    assert (reference.on_demand, reference.principal) == (True, f"node:{own}")


def test_the_address_of_a_closed_zone_ends(hub: Hub) -> None:
    zone, data = Zone(hub, public=True), fresh()
    zone.upload(zone.owner, data)
    plain = f"/sha1/{sha1_of(data)}"
    assert hub.get(plain).status == 200
    hub.call(hub.node.channels.update(OPERATOR, zone.name, {"public": False}))
    assert hub.get(plain).status == 404
    assert hub.get(zone.url(zone.reader, data)).body == data
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, ObjectPath.parse(path_of(data)).text))
    assert hub.get(plain, Authorization=f"Bearer {zone.reader}").status == 404
