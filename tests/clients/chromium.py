"""Debian's Chromium as a client: a page of a chosen origin makes requests and hands back what it could read."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import json
import os
import queue
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.faults.report import missing

RESULT_SECONDS = 90.0
END_SECONDS = 30.0

PAGE = """<!doctype html>
<meta charset="utf-8">
<script>
const ask = async ({url, body, ...init}) => {
  try {
    if (body !== undefined) init.body = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
    const answer = await fetch(url, init);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    return {
      type: answer.type,
      status: answer.status,
      headers: Object.fromEntries(answer.headers),
      body: btoa(String.fromCharCode(...bytes)),
    };
  } catch (error) {
    return {error: String(error)};
  }
};
(async () => {
  const results = [];
  for (const request of REQUESTS) results.push(await ask(request));
  await fetch("/results", {method: "POST", body: JSON.stringify({origin: location.origin, results})});
})();
</script>
"""
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad"),
)


@dataclass(frozen=True)
class Seen:
    """What a page could see of one request: an answer, or that there is none that it may read."""

    status: int = 0
    headers: Mapping[str, str] | None = None
    body: bytes = b""
    type: str = ""
    error: str | None = None

    @property
    def unreadable(self) -> bool:
        """`fetch` failed, without telling the page why."""
        return self.error is not None and "Failed to fetch" in self.error

    def header(self, name: str) -> str | None:
        """A header, when the page may read it."""
        return (self.headers or {}).get(name)


def request(url: str, method: str = "GET", body: bytes | None = None, **init: Any) -> dict[str, Any]:
    """One call of `fetch`, past the browser's cache, so that the server answers; `init` as there."""
    text = {} if body is None else {"body": base64.b64encode(body).decode()}
    return {"url": url, "method": method, "cache": "no-store", **text, **init}


def chromium() -> str:
    """The browser. Skips the test when there is none; fails it in CI."""
    found = shutil.which("chromium")
    if found is None:
        missing("needs chromium; on Debian: apt-get install chromium")
    return found


class Pages:
    """A web server of some origin: it serves the page and takes its results. Start with `with`.

    `host` is a name that only the browser resolves, to this server. With `tls` the origin is https, as the browser's
    rules for pages that reach into a local network want it.
    """

    def __init__(self, host: str, root: Path, *, tls: bool = False) -> None:
        self.host = host
        self._page = b""
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._port = self._server.server_port
        # The default port belongs to no origin's text; the browser is told where it really is.
        self.origin = f"https://{host}" if tls else f"http://{host}:{self._port}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(_certificate(host, root / f"{host}.pem"))
            # The handshake belongs into the connection's thread: a connection kept in reserve must not block others.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Pages:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join(END_SECONDS)
        self._server.server_close()

    def visit(
        self, requests: Sequence[Mapping[str, Any]], *, public: bool = False, allowed: bool = False
    ) -> list[Seen]:
        """Open the page in a fresh browser; what it saw of each request, made one after the other.

        `public`: the browser takes the page's server for one on the internet. `allowed`: its user has agreed that
        pages of this origin reach programs on the same computer.
        """
        self._page = PAGE.replace("REQUESTS", json.dumps(list(requests)).replace("<", "\\u003c")).encode()
        flags = [
            f"--host-resolver-rules=MAP {self.host} 127.0.0.1:{self._port}, MAP * ~NOTFOUND, EXCLUDE localhost,"
            " EXCLUDE 127.0.0.1",
            "--ignore-certificate-errors",
        ]
        if public:
            flags.append(f"--ip-address-space-overrides=127.0.0.1:{self._port}=public")
        # Not in the test's own directory: the browser makes sockets there, whose paths must be short.
        with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as directory:
            profile = Path(directory)
            if allowed:
                (profile / "Default").mkdir()
                (profile / "Default" / "Preferences").write_text(json.dumps(_permission(self.origin)))
            command = [chromium(), *QUIET, f"--user-data-dir={profile}", *flags, f"{self.origin}/"]
            given = self._browse(command, profile)
        assert given["origin"] == self.origin
        return [_seen(one) for one in given["results"]]

    def _browse(self, command: list[str], profile: Path) -> dict[str, Any]:
        machine = {"HOME": str(profile), "LANG": "C.UTF-8", "PATH": os.environ["PATH"], "TMPDIR": str(profile)}
        log = profile / "log"
        with log.open("wb") as output:
            browser = subprocess.Popen(
                command,
                env=machine,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until = time.monotonic() + RESULT_SECONDS
            while time.monotonic() < until and browser.poll() is None:
                try:
                    return self._results.get(timeout=0.2)
                except queue.Empty:
                    continue
            raise AssertionError(f"no result of the page:\n{log.read_text(errors='replace')[-4000:]}")
        finally:
            _end(browser)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        pages = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = pages._page if self.path == "/" else b""
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                pages._results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """The browser's requests to its own page are nobody's concern."""

        return Handler


def _seen(given: dict[str, Any]) -> Seen:
    if "error" in given:
        return Seen(error=given["error"])
    return Seen(given["status"], given["headers"], base64.b64decode(given["body"]), given["type"])


def _permission(origin: str) -> dict[str, Any]:
    """Preferences in which the user has agreed; the permission's name before and since it was split in two."""
    names = ("local_network_access", "loopback_network")
    granted = {f"{origin}:443,*": {"setting": 1}}
    return {"profile": {"content_settings": {"exceptions": dict.fromkeys(names, granted)}}}


def _end(browser: subprocess.Popen[bytes]) -> None:
    """The browser and all its processes; some outlive the first one for a moment, and write."""
    browser.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        browser.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(browser.pid, signal.SIGKILL)
    browser.wait(END_SECONDS)


def _certificate(host: str, path: Path) -> Path:
    """A file with a key and a certificate that it signed itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path
