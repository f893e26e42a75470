"""Reference for small answers: bare Starlette on bare uvicorn (httptools, uvloop), one route that answers `ok`.

`python -m tests.bench.reference_starlette PORT` serves it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


async def ok(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def serve(port: int) -> None:
    """Until the process is told to stop."""
    app = Starlette(routes=[Route("/", ok)])
    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


@contextmanager
def running(port: int) -> Iterator[None]:
    """The server in a process of its own for the time of the block."""
    process = subprocess.Popen([sys.executable, "-m", __name__, str(port)], stdin=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
