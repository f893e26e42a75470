"""`kachery-lab client`: every command, on a running server."""

from __future__ import annotations

from kachery_lab.core.keys import PrivateKey
from tests.gateway import CloudClient
from tests.servers import RunningNode

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def cli(node: RunningNode, *arguments: str, code: int = 0) -> str:
    done = node.run_cli("client", *arguments)
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    return (done.stdout if code == 0 else done.stderr).strip()


def test_clients(node: RunningNode) -> None:
    first, second = PrivateKey.generate().public_hex, CloudClient()
    assert cli(node, "add", first, "--user", "ann", "--label", "rig 1") == f"added {first}"
    assert "registered already, for ann" in cli(node, "add", first, "--user", "ben", code=1)
    assert "64 lower-case hex digits" in cli(node, "add", "x", "--user", "ben", code=1)
    link = second.link(label="laptop")
    assert node.request("POST", link, b"user=ben", FORM, auth=False).status == 200
    lines = cli(node, "list").splitlines()
    assert lines[0].split() == ["LABEL", "USER", "ASKED_AS", "ASKED_FROM", "CREATED", "APPROVED", "CLIENT"]
    assert lines[1].split()[:3] == ["rig", "1", "ann"]
    assert lines[1].endswith(first)
    assert lines[2].split()[:4] == ["laptop", "-", "ben", "127.0.0.1"]
    assert cli(node, "approve", second.id, "--user", "carol") == f"approved {second.id} for carol"
    assert "belongs to carol" in cli(node, "approve", second.id, "--user", "ben", code=1)
    assert cli(node, "update", second.id, "--label", "ann's laptop").splitlines()[2].split(None, 1)[1] == "ann's laptop"
    assert cli(node, "show", second.id).splitlines()[1].split() == ["user", "carol"]
    assert cli(node, "remove", second.id) == f"removed {second.id}"
    assert "there is no client" in cli(node, "remove", second.id, code=1)


def test_codes(node: RunningNode) -> None:
    client = CloudClient()
    code = cli(node, "code", "add", "--user", "ann", "--label", "course", "--uses", "2", "--hours", "1")
    assert node.request("POST", client.link(), f"code={code}".encode(), FORM, auth=False).status == 200
    heading, line = cli(node, "code", "list").splitlines()
    assert heading.split() == ["ID", "USER", "LABEL", "USES_LEFT", "CREATED", "EXPIRES"]
    assert line.split()[1:4] == ["ann", "course", "1"]
    assert code not in line
    cli(node, "code", "add", "--user", "ann", "--hours", str(90 * 24))
    assert cli(node, "code", "remove", line.split()[0]) == f"removed {line.split()[0]}"
    assert "there is no enrolment code" in cli(node, "code", "remove", line.split()[0], code=1)
    late = CloudClient()
    assert node.request("POST", late.link(), f"code={code}".encode(), FORM, auth=False).status == 401
    assert code not in node.log
