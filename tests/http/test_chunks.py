"""The end of a chunked body is found wherever pieces are cut, and whatever the chunks hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.http.chunks import ChunkScanner

FOLLOWING = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n0\r\n\r\n"
BODIES = [
    b"0\r\n\r\n",
    b"000;extension=1\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nTrailer: x\r\nAnother: y\r\n\r\n",
    b"a;name=value\r\n\r\n\r\n0\r\n\r\nx\r\n1\r\n\n\r\n0\r\n\r\n",
    b"5;" + b"e" * 5000 + b"\r\nhello\r\n0\r\n" + b"T: " + b"t" * 5000 + b"\r\n\r\n",
]


def ends_at(pieces: list[bytes]) -> int:
    """Where the body ends, in bytes from its beginning; -1 when it does not. An end between two pieces is not told: the
    parser knows then."""
    scanner, before = ChunkScanner(), 0
    for piece in pieces:
        end = scanner.end(piece)
        if end < len(piece):
            return before + end
        before += end
    return -1


@pytest.mark.parametrize("body", BODIES)
def test_wherever_it_is_cut(body):
    data = body + FOLLOWING
    assert ends_at([data]) == len(body)
    for cut in range(1, min(len(body), 200)):
        assert ends_at([data[:cut], data[cut:]]) == len(body), cut
    single = [data[index : index + 1] for index in range(len(body) - 1)]
    assert ends_at([*single, data[len(body) - 1 :]]) == len(body)


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    st.lists(st.integers(1, 60), max_size=12),
)
def test_any_chunks_in_any_pieces(chunks, cuts):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    data, pieces = body, []
    for cut in cuts:
        if cut < len(data):
            pieces.append(data[:cut])
            data = data[cut:]
    assert ends_at([*pieces, data + FOLLOWING]) == len(body)


@pytest.mark.parametrize(
    "junk", [b"xyz\r\n\r\n\r\n", b"-5\r\nhello", b"\n\n\n\n", b"\r\n\r\n", b"f" * 10_000, b"\xff\r\n"]
)
def test_nonsense_ends_somewhere_or_nowhere_and_raises_nothing(junk):
    assert -1 <= ends_at([junk, junk]) <= 2 * len(junk)
