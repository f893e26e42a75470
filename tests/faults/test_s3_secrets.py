"""S3: secrets appear where they belong and nowhere else."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from kachery_lab.core.ids import FeedId
from kachery_lab.core.keys import PrivateKey, derive_key, unseal
from tests.faults.report import report, wait_for, without
from tests.servers import Answer, RunningNode, files_below

Make = Callable[..., RunningNode]
ADMIN = "klk_" + "canaryadmincanaryadmincanaryadmi"
BROWSER = "CanaryBrowserCode"
WRONG = ["CanaryWrongC", "CanaryWrongCodeThatIsLonger", "klk_canarywrongtokencanarywrong"]


class Scenario:
    """What happened, and every secret that took part, by name."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        self.secrets: dict[str, list[bytes]] = {}
        self.answers: list[Answer] = []

    def secret(self, name: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.secrets.setdefault(name, []).append(data)

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        answer = self.node.request(method, path, data, {**kind, **(headers or {})}, auth=False)
        self.answers.append(answer)
        return answer


def play(node: RunningNode) -> Scenario:
    """Right and wrong credentials of every kind on every kind of route, errors included."""
    scene = Scenario(node)
    token = {"Authorization": f"Bearer {ADMIN}"}
    scene.secret("admin token", ADMIN)
    scene.secret("client code", node.code)
    code = {"KACHERY-CLIENT-AUTH-CODE": node.code}
    made = node.post("/api/admin/v1/tokens", {"user": "ann", "scopes": ["client"]}, auth=ADMIN).json()["token"]
    scene.secret("made token", made)
    printed = node.run_cli("token", "create", "bob", "--scope", "read").stdout.strip()
    assert printed.startswith("klk_")
    scene.secret("printed token", printed)
    feed = scene.ask("POST", "/feed/createFeed", {"feedName": "f"}, code).json()["feedId"]
    subfeed = {"feedId": feed, "subfeedHash": "0" * 40}
    assert scene.ask("POST", "/feed/appendMessages", {**subfeed, "messages": [{"x": 1}]}, token).status == 200
    scene.secret("browser code", BROWSER)
    set_codes = {"key": "_other_client_auth_codes", "value": [BROWSER]}
    assert scene.ask("POST", "/mutable/set", set_codes, code).status == 200
    assert scene.ask("GET", "/stats", headers={"KACHERY-CLIENT-AUTH-CODE": BROWSER}).status == 200
    assert scene.ask("GET", "/stats", headers={"KACHERY-CLIENT-AUTH-CODE": made}).status == 200

    for wrong in WRONG:
        scene.secret("wrong credentials", wrong)
        for headers in (
            {"KACHERY-CLIENT-AUTH-CODE": wrong},
            {"Authorization": f"Bearer {wrong}"},
            {"Authorization": f"Basic {wrong}"},
            {"Authorization": wrong},
            {"X-Api-Key": wrong, "Cookie": f"code={wrong}"},
        ):
            scene.ask("GET", "/stats", headers=headers)
            scene.ask("POST", "/feed/getFeedInfo", {"feedId": feed}, headers)
            scene.ask("GET", "/api/v1/info", headers=headers)
            scene.ask("GET", "/api/admin/v1/tokens", headers=headers)
    for secret in (ADMIN, made, printed, node.code):
        scene.ask("GET", f"/api/v1/info?access_token={secret}&code={secret}")
        scene.ask("GET", f"/stats?format=json&token={secret}", headers=code)
        scene.ask(
            "GET", "/api/v1/blobs", headers={"Referer": f"http://x/?token={secret}", "User-Agent": secret, **token}
        )
    # A token in a path is told back to nobody but who sent it, so these answers do not count; the log does, which knows
    # a token by its look.
    for method, path in (("GET", "/api/v1/blobs"), ("GET", "/nowhere"), ("DELETE", "/api/admin/v1/tokens")):
        assert scene.ask(method, f"{path}/{made}", headers=token).status in (400, 404)
        scene.answers.pop()
    for body in (b"{", {"feedId": "x"}, {"unknown": 1}, {"key": {"type": "feedConfig", "feedId": feed}}):
        for path in ("/feed/getFeedInfo", "/mutable/get", "/feed/appendMessages", "/linkFile"):
            scene.ask("POST", path, body, code)
    private = node.storage / "private.pem"
    for path in (private, node.metadata / "admin-token", node.storage / "client-auth"):
        scene.ask("POST", "/storeFile", {"localFilePath": str(path)}, code)
    for path in ("/probe", "/livez", "/readyz", "/api/v1/info"):
        scene.ask("GET", path, headers=code)
    scene.ask("GET", "/api/admin/v1/tokens", headers=token)
    assert scene.ask("POST", "/mutable/get", {"key": "k"}, code).status == 200

    pem = private.read_text()
    key = PrivateKey.from_pem(pem)
    scene.secret("node key", pem.splitlines()[1])
    forms_of(scene, "node key", bytes.fromhex(key.seed_hex()))
    database = sqlite3.connect(f"file:{node.metadata / 'kachery-lab.db'}?mode=ro", uri=True)
    (sealed,) = database.execute("SELECT sealed_key FROM feeds WHERE feed_id = ?", (feed,)).fetchone()
    database.close()
    seed = unseal(derive_key(key, "kachery-lab/feed-keys/1"), sealed, FeedId.parse(feed).encode())
    assert PrivateKey.from_seed(seed.hex()).public_hex == feed
    forms_of(scene, "feed key", seed)
    return scene


def forms_of(scene: Scenario, name: str, seed: bytes) -> None:
    """A key as bytes and as the texts that are made of it."""
    scene.secret(name, seed)
    scene.secret(name, seed.hex())
    scene.secret(name, seed.hex().upper())
    scene.secret(name, base64.b64encode(seed))


def found_in(scene: Scenario, text: bytes, *, but: tuple[str, ...] = ()) -> set[str]:
    """Names of the secrets that occur."""
    return {name for name, forms in scene.secrets.items() if name not in but and any(form in text for form in forms)}


def leaks(scene: Scenario) -> dict[str, set[str]]:
    """Where a secret turned up, and which."""
    node = scene.node
    assert node.process is not None
    places: dict[str, bytes] = {
        "answers": b"\n".join(json.dumps(a.headers).encode() + a.body for a in scene.answers),
        "command line": Path(f"/proc/{node.process.pid}/cmdline").read_bytes(),
    }
    for command in (["config", "--explain"], ["info"], ["token", "list"]):
        result = node.run_cli(*command)
        assert result.returncode == 0, result.stderr
        places[" ".join(command)] = (result.stdout + result.stderr).encode()
    assert b"********" in places["config --explain"]
    node.terminate()
    places["log"] = node.log.encode()
    found = {place: found_in(scene, text) for place, text in places.items()}
    for path in [*files_below(node.metadata), *files_below(node.storage)]:
        name = path.name
        # The one place of each. Additional codes are a mutable, which clients read back.
        allowed = {"private.pem": ("node key",), "client-auth": ("client code",)}.get(name, ())
        if "records-log" in path.parts or name.startswith("kachery-lab.db"):
            allowed = ("browser code",)
        found[f"file {name}"] = found_in(scene, path.read_bytes(), but=allowed)
    return {place: names for place, names in found.items() if names}


ENVIRONMENT = {"KACHERY_LAB_ADMIN_TOKEN": ADMIN, "KACHERY_LAB_LOG_LEVEL": "debug"}


@pytest.mark.parametrize("form", ["json", pytest.param("console", marks=pytest.mark.slow)])
def test_no_secret_anywhere_but_in_its_place(make_node: Make, form: str) -> None:
    node = make_node(env={**ENVIRONMENT, "KACHERY_LAB_LOG_FORMAT": form}, fresh=True).start()
    scene = play(node)
    assert not (node.metadata / "admin-token").exists()
    assert leaks(scene) == {}
    assert len(node.log) > 2000, "the log was written"
    report(f"S3 {form}", len(scene.answers), canaries=sum(map(len, scene.secrets.values())), hits=0)


def test_files_with_secrets_are_private(make_node: Make) -> None:
    node = make_node().start()
    expected = {
        node.storage / "private.pem": 0o600,
        node.storage / "client-auth": 0o640,
        node.storage / "records-log": 0o700,
        node.storage / "feeds-log": 0o700,
        node.metadata / "admin-token": 0o600,
        node.metadata / "kachery-lab.db": 0o600,
        node.metadata / "admin.sock": 0o600,
    }
    # The admin socket is made once the server listens.
    wait_for((node.metadata / "admin.sock").exists, "there is an admin socket")
    assert {path: path.stat().st_mode & 0o7777 for path in expected} == expected
    token = node.admin_token.encode()
    assert [path.name for path in files_below(node.metadata) if token in path.read_bytes()] == ["admin-token"]
    assert [path for path in files_below(node.storage) if token in path.read_bytes()] == []
    assert token.decode() not in node.log


def test_a_start_that_is_refused_names_no_secret(make_node: Make) -> None:
    node = make_node(env=ENVIRONMENT).start()
    node.terminate()
    (node.storage / "private.pem").chmod(0o644)
    result = node.run_cli("start")
    assert result.returncode == 1 and "can be read by others" in result.stderr
    (node.storage / "private.pem").chmod(0o600)
    wrong = make_node("wrong", env={**ENVIRONMENT, "KACHERY_LAB_MAX_JSON": "much", "KACHERY_LAB_OWNER": " "})
    refused = wrong.run_cli("start")
    assert refused.returncode == 1 and "KACHERY_LAB_MAX_JSON" in refused.stderr
    pem = (node.storage / "private.pem").read_text().splitlines()[1]
    for text in (result.stdout, result.stderr, refused.stdout, refused.stderr):
        assert ADMIN not in text and pem not in text


def test_control_a_logged_code_is_found(make_node: Make) -> None:
    node = make_node(env=ENVIRONMENT, prefix=without("log_codes")).start()
    scene = play(node)
    found = leaks(scene)
    assert found == {"log": {"wrong credentials"}}
    report("S3 control log_codes", len(scene.answers), hits=len(found))
