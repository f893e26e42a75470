"""H9: names that are no hash, on every route that takes one."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path
from urllib.parse import quote

from tests.faults.report import Client, histogram, missing, report, wait_for, with_every_right, without
from tests.servers import RunningNode

Make = Callable[..., RunningNode]
GOOD = sha1(b"good").hexdigest()
BAD = [
    "",
    ".",
    "..",
    "../../../../../../../etc/passwd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "..\\..\\..\\etc\\passwd",
    "/etc/passwd",
    "....//....//etc/passwd",
    GOOD + "/../../../../../private.pem",
    "..//../" + "private.pem".rjust(33, "/"),
    GOOD[:39],
    GOOD + "0",
    GOOD.upper(),
    GOOD[:39] + "G",
    GOOD[:39] + "\n",
    GOOD + "\n",
    "\n" + GOOD,
    GOOD + " ",
    " " + GOOD,
    GOOD + "\t",
    GOOD + "\x00",
    GOOD[:39] + "\x00",
    "\x00" * 40,
    GOOD + "\x00.link",
    GOOD + ".link",
    GOOD + ".tmp",
    GOOD[:35] + ".link",
    "\u0661" * 40,
    "\uff11" * 40,
    "\u0661" + GOOD[1:],
    "\u00b2" * 40,
    "\u202e" + GOOD,
    "\U0001f4be" * 40,
    GOOD[:20] + "/" + GOOD[21:],
    GOOD[:20] + "." + GOOD[21:],
    "0x" + GOOD[:38],
    "-" + GOOD[1:],
    "%s" * 20,
    "%2e%2e%2f" * 5,
    "' OR 1=1 --".ljust(40),
    "*" * 40,
    "a" * 8000,
    "%00",
    "sha1://" + GOOD,
]
FIRST_JSON_ONLY = [None, 0, 1.5, True, [GOOD], {"sha1": GOOD}, int(GOOD, 16), "\ud83d\ude00" * 20]
HEX64 = "a" * 64
Send = Callable[[Client, object], tuple[str, int, str]]


def in_path(method: str, prefix: str, escape: Callable[[str], str]) -> Send:
    """The name as the last part of the path, and the status."""

    def send(client: Client, name: object) -> tuple[str, int, str]:
        body = b"good" if method == "PUT" else None
        answer = client.request(method, prefix + escape(str(name)), body)
        return f"{method} {prefix}", answer.status, answer.body.decode(errors="replace")

    return send


def in_json(path: str, place: Callable[[object], object]) -> Send:
    """The name somewhere in a JSON body."""

    def send(client: Client, name: object) -> tuple[str, int, str]:
        answer = client.post(path, place(name))
        text = answer.body.decode(errors="replace")
        # A refusal after the credential is in-band on this route, as its client expects.
        status = 400 if path == "/loadFile" and '"type":"error"' in text and answer.status == 200 else answer.status
        return f"POST {path}", status, text

    return send


def escape_all(name: str) -> str:
    return quote(name, safe="")


def watch(feed: object, subfeed: object) -> object:
    one = {"feedId": feed, "subfeedHash": subfeed, "position": 0, "channelName": "chan"}
    return {"subfeedWatches": {"w": one}, "waitMsec": 0}


def chunk(name: object) -> object:
    return {"fileKey": {"sha1": GOOD, "chunkOf": {"fileKey": {"sha1": name}, "startByte": 0, "endByte": 1}}}


PATHS = [in_path(method, "/api/v1/blobs/", escape_all) for method in ("GET", "HEAD", "PUT", "DELETE")]
QUERY = [in_path("GET", "/api/v1/blobs?after=", escape_all)]
BODIES = [
    in_json(path, place)
    for path, place in [
        *((path, lambda name: {"fileKey": {"sha1": name}}) for path in ("/loadFile", "/downloadFileData")),
        *((path, lambda name: {"fileKey": {"sha1": "0" * 40, "manifestSha1": name}}) for path in ("/loadFile",)),
        *((path, chunk) for path in ("/loadFile", "/downloadFileData")),
        ("/feed/deleteFeed", lambda name: {"feedId": name}),
        ("/feed/getFeedInfo", lambda name: {"feedId": name}),
        ("/feed/getNumLocalMessages", lambda name: {"feedId": name, "subfeedHash": GOOD}),
        ("/feed/getNumLocalMessages", lambda name: {"feedId": HEX64, "subfeedHash": name}),
        ("/feed/appendMessages", lambda name: {"feedId": name, "subfeedHash": GOOD, "messages": []}),
        ("/feed/appendMessages", lambda name: {"feedId": HEX64, "subfeedHash": name, "messages": []}),
        ("/feed/watchForNewMessages", lambda name: watch(name, GOOD)),
        ("/feed/watchForNewMessages", lambda name: watch(HEX64, name)),
    ]
]


def ask_all(client: Client) -> Iterator[tuple[str, object, int, str]]:
    for name in BAD:
        for send in PATHS:
            yield (send_path := send(client, name))[0], name, *send_path[1:]
        if name:  # an empty `after` begins at the beginning
            for send in QUERY:
                yield (sent := send(client, name))[0], name, *sent[1:]
    for name in [*BAD, *FIRST_JSON_ONLY]:
        for send in BODIES:
            yield (sent := send(client, name))[0], name, *sent[1:]


def good_ones(client: Client) -> None:
    """The same requests with a name: every one is understood."""
    assert client.request("PUT", f"/api/v1/blobs/{GOOD}", b"good").status in (200, 201)
    assert client.request("GET", f"/api/v1/blobs/{GOOD}").body == b"good"
    assert client.request("GET", f"/api/v1/blobs?after={'0' * 40}").json()["blobs"][0]["sha1"] == GOOD
    assert client.post("/downloadFileData", {"fileKey": {"sha1": GOOD}}).body == b"good"
    assert b"finished" in client.post("/loadFile", {"fileKey": {"sha1": GOOD}}).body
    for body in ({"feedId": HEX64}, {"feedId": HEX64, "subfeedHash": GOOD}):
        path = "/feed/getNumLocalMessages" if "subfeedHash" in body else "/feed/getFeedInfo"
        assert client.post(path, body).status == 200


def test_bad_names_are_400_on_every_route(node: RunningNode) -> None:
    client = with_every_right(node)
    good_ones(client)
    statuses = []
    for route, name, status, text in ask_all(client):
        statuses.append(status)
        decoded = str(name)
        # A path with a slash in its last part, or without one, is an address that does not exist.
        unroutable = "/api/v1/blobs/" in route and ("/" in decoded or decoded in ("", ".", ".."))
        # (The empty name is the list's address with a slash behind it, which is redirected to the list.)
        allowed = {307} if not decoded and unroutable else {400, 404, 405} if unroutable else {400}
        assert status in allowed, (route, name, status, text[:300])
        assert "root:" not in text and "PRIVATE KEY" not in text
        assert str(node.storage) not in text
    good_ones(client)
    assert node.request("GET", "/readyz", auth=False).status == 200
    assert "Traceback" not in node.log
    report("H9", len(statuses), server_errors=0, status_histogram=histogram(statuses))


def test_names_that_are_not_escaped_at_all(node: RunningNode) -> None:
    """Bytes as they are in the request line: what is no address is refused before there is a route."""
    import socket

    token = node.admin_token
    statuses = []
    for path in [
        b"/api/v1/blobs/../../../../etc/passwd",
        b"/api/v1/blobs/..%2f..%2f..%2fetc%2fpasswd",
        b"/api/v1/blobs/%2e%2e/%2e%2e/private.pem",
        b"/api/v1/blobs//etc/passwd",
        b"/api/v1/blobs/%00",
        b"/api/v1/blobs/" + GOOD.encode() + b"%00",
        b"/api/v1/blobs/" + GOOD.encode() + b"%0a",
        b"/api/v1/blobs/" + GOOD.encode() + b"%20",
        b"/api/v1/blobs/" + GOOD.encode() + b";.link",
        b"/api/v1/blobs/%ff%fe" + b"0" * 38,
        b"/api/v1/blobs/%zz",
        b"/api/v1/blobs/\xd9\xa1" + b"0" * 39,
        b"/../../etc/passwd",
        b"//etc/passwd",
    ]:
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as raw:
            raw.sendall(
                b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Authorization: Bearer " + token.encode() + b"\r\n\r\n"
            )
            answer = b""
            while piece := raw.recv(65536):
                answer += piece
        status = int(answer[9:12])
        statuses.append(status)
        assert status in (400, 404), (path, answer[:300])
        assert b"root:" not in answer and b"PRIVATE" not in answer
    good_ones(with_every_right(node))
    report("H9 raw", len(statuses), server_errors=0, status_histogram=histogram(statuses))


OPENED = re.compile(r'open(?:at2?)?\((?:(?:AT_FDCWD|\d+)<(?P<at>[^>]*)>, )?"(?P<path>[^"]*)"(?P<dots>\.\.\.)?')


def opened_elsewhere(trace: str, allowed: list[Path]) -> list[str]:
    """Names in a trace that lie outside the allowed directories."""
    found = []
    for match in OPENED.finditer(trace):
        path = Path(match["path"])
        if not path.is_absolute() and match["at"]:
            path = Path(match["at"]) / path
        resolved = path.resolve() if ".." not in path.parts else Path(*_without_dots(path))
        if not any(resolved == place or place in resolved.parents for place in allowed):
            found.append(str(path))
    return found


def _without_dots(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            del parts[max(1, len(parts) - 1) :]
        else:
            parts.append(part)
    return parts


def traced(make_node: Make, *prefix: str) -> tuple[list[str], int]:
    """Files that all the bad names make a server open outside its own directories; and how many names were sent."""
    strace = shutil.which("strace")
    if strace is None:
        missing("needs strace")
    node = make_node("traced")
    trace = node.metadata.parent / "trace"
    node.prefix = [
        strace,
        "-f",
        "-qq",
        "-y",
        "-e",
        "trace=open,openat,openat2",
        "-s",
        "9000",
        "-o",
        str(trace),
        *prefix,
    ]
    try:
        node.start()
    except AssertionError:
        if "PTRACE" in node.log or "ptrace" in node.log:
            missing("strace may not trace here")
        raise
    client = with_every_right(node)
    good_ones(client)
    begin = trace.stat().st_size
    trials = sum(1 for _ in ask_all(client))
    good_ones(client)
    client.request("GET", f"/api/v1/blobs/{'e' * 40}")
    wait_for(lambda: b"e" * 40 in trace.read_bytes()[begin:], "the last request is in the trace")
    own = [node.storage, node.metadata, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[2]]
    own += [place.resolve() for place in own]
    # What the heartbeat reads, every two seconds.
    own.append(Path("/proc/sys/kernel/random/boot_id"))
    return opened_elsewhere(trace.read_bytes()[begin:].decode(errors="replace"), own), trials


def test_no_file_outside_the_servers_own_directories_is_opened(make_node: Make) -> None:
    outside, trials = traced(make_node)
    assert outside == []
    report("H9 strace", trials, opened_outside=0)


def test_control_without_the_check_of_names_files_elsewhere_are_opened(make_node: Make) -> None:
    outside, trials = traced(make_node, *without("any_sha1"))
    assert any(path.endswith("/etc/passwd") for path in outside), outside
    report("H9 control any_sha1", trials, opened_outside=len(outside), example=outside[0])


def test_control_the_reader_of_traces_sees_escapes() -> None:
    allowed = [Path("/srv/store")]
    line = '12 openat(AT_FDCWD</work>, "{}", O_RDONLY) = 3</x>\n'
    assert opened_elsewhere(line.format("/srv/store/sha1/a"), allowed) == []
    for path in ("/etc/passwd", "/srv/store/../other/file", "/srv/store2/x", "relative"):
        assert opened_elsewhere(line.format(path), allowed), path
