from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from kachery_lab.observability.logging import LineStream, RateLimited, configure, redact_text
from kachery_lab.observability.request_lines import MOST_HELD, request_logger

NASTY = 'a\r\n{"event":"forged"}\x1b[31m\u202eb\0\x7f\udc80'


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def written(fmt: str | None = None, level: str = "info") -> list[str]:
        if fmt is not None:
            configure(fmt, level, descriptor=descriptor)  # type: ignore[arg-type]
        return path.read_text().splitlines()

    yield written
    os.close(descriptor)


def test_json_lines(lines: Callable[..., list[str]]) -> None:
    lines("json")
    structlog.contextvars.bind_contextvars(request_id="r1")
    structlog.get_logger().info("stored", sha1="ab", size=3, peers=["x"], ok=True, nothing=None)
    structlog.get_logger().debug("not this one")
    logging.getLogger("uvicorn.error").warning("from %s", "uvicorn")
    first, second = (json.loads(line) for line in lines())
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "stored", "level": "info", "sha1": "ab", "size": 3, "peers": ["x"], "ok": True, "nothing": None,
        "request_id": "r1",
    }  # fmt: skip
    assert (second["event"], second["logger"], second["level"]) == ("from uvicorn", "uvicorn.error", "warning")


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_h10_a_text_of_a_client_is_one_printable_line(lines: Callable[..., list[str]], fmt: str) -> None:
    lines(fmt)
    structlog.get_logger().info("named", label=NASTY, nested={NASTY: [NASTY]})
    structlog.get_logger().info(NASTY)
    logging.getLogger("other").warning("%s", NASTY)
    found = lines()
    assert len(found) == 3
    assert all(line.isascii() and line.isprintable() for line in found)
    if fmt == "json":
        assert json.loads(found[0])["label"].startswith("a\r\n")


def test_a_traceback_is_one_json_line(lines: Callable[..., list[str]]) -> None:
    lines("json")
    try:
        raise RuntimeError("with klk_abcdefgh")
    except RuntimeError:
        structlog.get_logger().exception("failed")
        logging.getLogger("uvicorn.error").exception("failed there")
    for line in lines():
        assert "Traceback" in json.loads(line)["exception"]
        assert "klk_abcdefgh" not in line
    assert len(lines()) == 2


SECRETS = [
    "klk_geheim",
    "token klk_GEHEIMABC in words",
    "KACHERY-CLIENT-AUTH-CODE: geheim",
    "kachery-client-auth-code=geheim",
    "{'kachery-client-auth-code': 'geheim'}",
    "(b'authorization', b'Bearer geheim')",
    "Authorization: Bearer geheim",
    "Authorization: Basic geheim",
    "bearer geheim",
    "GET /x?signature=geheim&a=1",
    "/x?a=1&X-Amz-Signature=geheim",
    "/x?access_token=geheim#a",
    "/?ticket=geheim",
    "/x?key=geheim",
    "/bucket/~geheim/chan/a",
    "/bucket/upload/geheim",
    "https://host/p/geheim/r/zone",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_redacted_by_their_look(text: str, lines: Callable[..., list[str]]) -> None:
    assert "geheim" not in redact_text(text).lower()
    assert "[redacted]" in redact_text(text)
    lines("json")
    structlog.get_logger().info(text, value=text, nested={"deep": [text]}, raw=text.encode())
    logging.getLogger("uvicorn.error").error("said %s", text)
    assert "geheim" not in "".join(lines()).lower()


@pytest.mark.parametrize(
    "key", ["authorization", "KACHERY-CLIENT-AUTH-CODE", "token", "signature", "passcode", "cookie"]
)
def test_secrets_are_redacted_by_their_name(key: str, lines: Callable[..., list[str]]) -> None:
    lines("json")
    structlog.get_logger().info("x", **{key: "geheim", "headers": {key: "geheim"}})
    assert "geheim" not in lines()[0]
    assert json.loads(lines()[0])[key] == "[redacted]"


@pytest.mark.parametrize(
    "text", ["sha1://" + "ab" * 20, "/sha1/abc/my key.bin", "keep-alive: 5", "a=b", "?zone=lab&page=2"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_o6_a_flood_makes_few_lines_and_a_summary() -> None:
    wrote: list[tuple[str, dict[str, Any]]] = []
    clock = Clock()
    limited = RateLimited(20, 10.0, sink=lambda event, **fields: wrote.append((event, fields)), clock=clock)
    for number in range(10_000):
        limited.note("refused", number=number)
        if number % 100 == 0:
            limited.note("other")
    assert [event for event, _ in wrote].count("refused") == 20
    limited.flush()
    assert [event for event, _ in wrote].count("lines_left_out") == 0
    clock.now += 10
    limited.flush()
    left_out = [fields for event, fields in wrote if event == "lines_left_out"]
    assert {fields["kind"]: fields["count"] for fields in left_out} == {"refused": 9980, "other": 80}
    limited.note("refused", number=1)
    assert wrote[-1] == ("refused", {"number": 1})
    limited.flush()
    clock.now += 10
    limited.note("refused")
    assert [event for event, _ in wrote].count("lines_left_out") == 2


def test_o6_a_sink_that_fails_breaks_nothing() -> None:
    def broken(event: str, **fields: Any) -> None:
        raise OSError(28, "No space left on device")

    RateLimited(sink=broken).note("refused")


def log_something() -> None:
    structlog.get_logger().info("to structlog")
    logging.getLogger("uvicorn.error").error("to logging")


def test_o6_a_closed_descriptor_breaks_nothing() -> None:
    descriptor = os.dup(1)
    stream = configure(descriptor=descriptor)
    os.close(descriptor)
    log_something()
    assert stream.dropped >= 1


def test_o6_a_reader_that_went_away_breaks_nothing() -> None:
    reader, writer = os.pipe()
    stream = configure(descriptor=writer)
    os.close(reader)
    log_something()
    assert stream.dropped >= 1
    os.close(writer)


def test_o6_a_full_disk_breaks_nothing() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    stream = configure(descriptor=descriptor)
    log_something()
    assert stream.dropped >= 1
    os.close(descriptor)


def test_o6_a_reader_that_does_not_read_blocks_nothing() -> None:
    reader, writer = os.pipe()
    stream = LineStream(writer)
    total = fcntl.fcntl(writer, 1032)  # F_GETPIPE_SZ
    done = threading.Event()

    def write() -> None:
        for _ in range(total // 1000 + 50):
            stream.write_line("x" * 1000)
        stream.write_line("y" * 20_000)
        done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert done.wait(5), "a full pipe stopped the writer"
    assert stream.dropped > 0
    dropped = stream.dropped
    read = os.read(reader, 2 * total)
    stream.write_line("again")
    read += os.read(reader, 2 * total)
    assert read.endswith(b"again\n")
    assert json.loads(read.splitlines()[-2]) == {"event": "log_lines_dropped", "count": dropped}
    os.close(reader)
    os.close(writer)


def test_console_is_for_people(lines: Callable[..., list[str]]) -> None:
    lines("console", "debug")
    structlog.get_logger().debug("stored", size=3)
    assert "stored" in lines()[0]
    assert "size=3" in lines()[0]


def test_request_lines_are_those_of_structlog(lines: Callable[..., list[str]]) -> None:
    facts = {"method": "GET", "path": NASTY, "status": 200, "bytes": 5, "ms": 0.25, "peer": None, "request_id": "r-1"}
    lines("json")
    request_logger().info("request", **facts)
    structlog.get_logger().info("request", **facts)
    ours, theirs = (json.loads(line) for line in lines())
    assert all(line.isascii() and line.isprintable() for line in lines())
    assert datetime.fromisoformat(theirs.pop("timestamp")) - datetime.fromisoformat(ours.pop("timestamp")) < timedelta(
        seconds=5
    )
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_request_lines_wait_for_one_another_and_keep_their_order(lines: Callable[..., list[str]]) -> None:
    lines("json")
    log = request_logger()

    async def work() -> None:
        log.info("request", number=1)
        log.info("request", number=2)
        assert lines() == []
        structlog.get_logger().info("other")
        assert [json.loads(line).get("number") for line in lines()] == [1, 2, None]
        log.info("request", number=4)
        await asyncio.sleep(0.1)
        assert len(lines()) == 4
        for number in range(MOST_HELD):
            log.info("request", number=number)
        assert len(lines()) == 4 + MOST_HELD

    asyncio.run(work())


def test_request_lines_follow_level_and_format(lines: Callable[..., list[str]]) -> None:
    lines("json", "warning")
    request_logger().info("request", number=1)
    assert lines() == []
    lines("console")
    request_logger().info("request", number=1)
    assert "number=1" in lines()[0]
