"""Head and body of an answer leave together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from kachery_lab.http.corked import CorkedTransport


class Recorder(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def writelines(self, list_of_data: object) -> None:
        self.sent.append(b"".join(list_of_data))  # type: ignore[arg-type]

    def write_eof(self) -> None:
        self.sent.append(b"<eof>")

    def close(self) -> None:
        self.sent.append(b"<close>")

    def abort(self) -> None:
        self.sent.append(b"<abort>")


def sent(use: Callable[[CorkedTransport], None]) -> tuple[list[bytes], list[bytes]]:
    """What had been sent when `use` returned, and after another turn of the loop."""

    async def run() -> tuple[list[bytes], list[bytes]]:
        plain = Recorder()
        use(CorkedTransport(plain, asyncio.get_running_loop()))
        at_once = plain.sent.copy()
        await asyncio.sleep(0)
        return at_once, plain.sent

    return asyncio.run(run())


def test_a_body_leaves_with_its_head() -> None:
    def answer(transport: CorkedTransport) -> None:
        transport.write(b"head")
        transport.write(b"body")
        transport.write(b"next")

    assert sent(answer) == ([b"headbody"], [b"headbody", b"next"])


def test_a_head_alone_waits_for_one_turn_only() -> None:
    assert sent(lambda transport: transport.write(b"head")) == ([], [b"head"])


def test_what_is_large_is_neither_copied_nor_held() -> None:
    large = bytes(100_000)

    def answer(transport: CorkedTransport) -> None:
        transport.write(b"head")
        transport.write(large)
        transport.write(large)

    assert sent(answer)[0] == [b"head" + large, large]


def test_ends_send_what_is_held_and_abort_does_not() -> None:
    def ending(end: str) -> Callable[[CorkedTransport], None]:
        def use(transport: CorkedTransport) -> None:
            transport.write(b"head")
            getattr(transport, end)()

        return use

    assert sent(ending("close"))[1] == [b"head", b"<close>"]
    assert sent(ending("write_eof"))[1] == [b"head", b"<eof>"]
    assert sent(ending("abort"))[1] == [b"<abort>"]


def test_everything_else_is_the_transport_itself() -> None:
    async def run() -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            loop = asyncio.get_running_loop()
            plain, _ = await loop.create_connection(asyncio.Protocol, sock=mine)
            corked = CorkedTransport(plain, loop)
            assert corked.get_extra_info("socket") is plain.get_extra_info("socket")
            assert corked.get_extra_info("nothing", 5) == 5
            assert corked.get_protocol() is plain.get_protocol()
            other = asyncio.Protocol()
            corked.set_protocol(other)
            assert plain.get_protocol() is other
            assert corked.can_write_eof() == plain.can_write_eof()
            assert corked.get_write_buffer_size() == 0
            corked.pause_reading()
            corked.resume_reading()
            assert plain.is_reading()
            corked.close()
            assert corked.is_closing()

    asyncio.run(run())
