"""The pages behind the link of `kachery-cloud-init`: looking changes nothing, nothing is run, text stays text."""

from __future__ import annotations

import html
import re
from urllib.parse import quote, urlencode

from kachery_lab.core.ids import UserName
from kachery_lab.services.principals import OPERATOR
from tests.gateway import CloudClient
from tests.hubs import Hub
from tests.servers import Answer

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"


def post(hub: Hub, path: str, **form: str) -> Answer:
    return hub.request("POST", path, urlencode(form).encode(), FORM)


def is_page(answer: Answer, status: int = 200) -> str:
    """The text of a page that loads nothing, runs nothing and sends its address nowhere."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "script-src" not in policy
    text = answer.body.decode()
    nonce = re.fullmatch(r"'nonce-([A-Za-z0-9_-]{16})'", policy["style-src"])
    assert nonce is not None
    assert f'<style nonce="{nonce.group(1)}">' in text
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script|<img|<link|\son\w+=|https?://", text)
    return text


def test_looking_changes_nothing(hub: Hub) -> None:
    client = CloudClient()
    for _ in range(2):
        text = is_page(hub.get(client.link(label="rig 1")))
        assert client.id in text
        assert "rig 1" in text
        assert '<form method="post">' in text
    assert hub.request("HEAD", client.link()).status == 200
    assert client.id not in hub.node.data.clients
    assert "there is no client" in is_page(hub.get(f"/client/{client.id}"), 404)


def test_asking_and_approval(hub: Hub) -> None:
    client = CloudClient()
    text = is_page(post(hub, client.link(label="rig 1"), user="ann", code=""))
    assert f"kachery-lab client approve {client.id}<" in text
    assert is_page(hub.get(f"/client/{client.id}")).split("<main>")[1] == text.split("<main>")[1]
    assert "waits" in is_page(hub.get(client.link()))
    found = hub.node.data.clients[client.id]
    assert (found.user, found.label, found.asked_as, found.asked_from) == (None, "rig 1", "ann", "127.0.0.1")
    hub.call(hub.node.clients.approve(OPERATOR, client.id))
    for path in (client.link(), f"/client/{client.id}"):
        assert "is registered" in is_page(hub.get(path))
    assert "is registered" in is_page(post(hub, client.link(), user="ben", code=""))


def test_without_a_name_the_admin_says_whose(hub: Hub) -> None:
    client = CloudClient()
    assert f"client approve {client.id} --user NAME<" in is_page(post(hub, client.link(), user="", code=""))


def test_enrolment_code(hub: Hub) -> None:
    client = CloudClient()
    _, code = hub.call(hub.node.clients.add_code(OPERATOR, UserName("ann")))
    assert "enrolment code" in is_page(post(hub, client.link(), code="wrong"), 401)
    assert "is registered" in is_page(post(hub, client.link(), code=f" {code} "))
    assert hub.node.data.clients[client.id].user == "ann"
    assert "used up" in is_page(post(hub, CloudClient().link(), code=code), 401)


def test_links_that_the_client_did_not_sign(hub: Hub) -> None:
    client, other = CloudClient(), CloudClient()
    good = client.link()
    for wrong in (
        good.replace(client.id, other.id),
        re.sub("signature=[0-9a-f]{4}", "signature=0000", good),
        f"/registerClient/{client.id}",
        f"/registerClient/{client.id}?signature=",
    ):
        assert "not signed" in is_page(hub.get(wrong), 401)
        assert "not signed" in is_page(post(hub, wrong, user="ann"), 401)
    assert not {client.id, other.id} & set(hub.node.data.clients)
    assert hub.get(good).status == 200


def test_text_stays_text(hub: Hub) -> None:
    client = CloudClient()
    text = is_page(hub.get(client.link(label=HOSTILE)))
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert "49" not in text.split("<strong>")[1].split("</strong>")[0].replace("{{7*7}}", "")
    is_page(post(hub, client.link(label=HOSTILE), user="<b>ann"))
    assert "&lt;b&gt;ann" in is_page(hub.get(f"/client/{client.id}"))
    for room in ("client", "registerClient"):
        is_page(hub.get(f"/{room}/{quote(HOSTILE.replace('/', ''), safe='')}"), 400)


def test_bad_forms(hub: Hub) -> None:
    client = CloudClient()
    link = client.link()
    for body, kind, status in (
        (b"user=ann&user=ben", FORM, 400),
        (b"admin=1", FORM, 400),
        (b"user=%ff", FORM, 400),
        (b"user=\xff", FORM, 400),
        (b"user=a b", FORM, 400),
        (b"user=" + b"a" * 81, FORM, 400),
        (b"&".join(b"a%d=1" % number for number in range(20)), FORM, 400),
        (b"user=" + b"a" * 10_000, FORM, 413),
        (b'{"user": "ann"}', {"Content-Type": "application/json"}, 415),
        (b"user=ann", {}, 415),
    ):
        is_page(hub.request("POST", link, body, kind), status)
    for label in ("a\nb", "a" * 101, "\u202eevil"):
        is_page(hub.get(client.link(label=label)), 400)
    assert client.id not in hub.node.data.clients
    is_page(post(hub, link, user="ann"))
    assert client.id in hub.node.data.clients
