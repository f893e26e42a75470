"""Reference for reading: nginx with sendfile, one worker, no log, serving one directory as it lies on the disk."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONFIG = """
{user}
worker_processes 1;
daemon off;
pid {work}/nginx.pid;
error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    {more}
    keepalive_requests 1000000;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
    }}
}}
"""


def program() -> str | None:
    """Where nginx is, or None."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def running(root: Path, work: Path, port: int, *, nopush: bool = True) -> Iterator[None]:
    """nginx on a port of the loopback interface for the time of the block. `nopush`: as Debian sets it for all; small
    answers on kept connections would wait 40 ms each with it."""
    work.mkdir(parents=True)
    more = "tcp_nopush on;" if nopush else ""
    user = "user root;" if os.getuid() == 0 else ""
    (work / "nginx.conf").write_text(_CONFIG.format(user=user, work=work, root=root, port=port, more=more))
    process = subprocess.Popen(
        [str(program()), "-p", str(work), "-c", str(work / "nginx.conf")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(process, port, work)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int, work: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            raise RuntimeError(f"nginx ended: {(work / 'error.log').read_text()}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError("nginx does not listen")
