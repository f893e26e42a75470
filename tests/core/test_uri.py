"""Addresses: what clients hand out is read, and what is written is read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core.ids import ChunkOf, FeedId, FileKey, Sha1
from kachery_lab.core.uri import BlobUri, FeedUri, parse_uri
from kachery_lab.errors import InvalidInput

A, B, FEED = Sha1("a" * 40), Sha1("b" * 40), FeedId("f" * 64)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        (f"sha1://{A}", BlobUri(A)),
        (f"sha1://{A}/data.bin", BlobUri(A, "data.bin")),
        (f"sha1://{A}/data.bin?manifest={B}", BlobUri(A, "data.bin", B)),
        (f"sha1://{A}?chunkOf={B}~0~20000000", BlobUri(A, "", None, ChunkOf(FileKey(B), 0, 20_000_000))),
        (f"feed://{FEED}", FeedUri(FEED)),
        (f"feed://{FEED}/a%20b%2Fc", FeedUri(FEED, "a b/c")),
        (f"feed://{FEED}/~{A}", FeedUri(FEED, f"~{A}")),
    ],
)
def test_both_ways(text, uri):
    assert parse_uri(text) == uri
    assert str(uri) == text


def test_lenient_where_nothing_is_selected():
    assert BlobUri.parse(f"sha1://{A}/100% of é.txt?x=1") == BlobUri(A, "100% of é.txt")
    assert BlobUri.parse(f"sha1://{A}?chunkOf={B}%7E1%7E2").file_key() == FileKey(A, None, ChunkOf(FileKey(B), 1, 2))
    assert FeedUri.parse(f"feed://{FEED}/") == FeedUri(FEED)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "sha1://",
        f"sha1://{A.upper()}",
        f"sha1:/{A}",
        f"ipfs://{A}",
        f"sha1://{A}?manifest=",
        f"sha1://{A}?chunkOf={B}~5~1",
        f"sha1://{A}?chunkOf={B}~0",
        f"sha1://{A}?chunkOf={B}~-1~2",
        f"sha1://{A}?chunkOf={B}~\u0661~2",
        f"sha1://{A}?chunkOf={B}~0~{'1' * 5000}",
        f"sha1://{A}/\ud800",
        f"sha1://{A}/{'x' * 10_000}",
        f"feed://{A}",
        f"feed://{FEED}/%ff",
    ],
    ids=lambda value: repr(value)[:50],
)
def test_refuses(value):
    with pytest.raises(InvalidInput):
        parse_uri(value)


@given(st.text(min_size=1), st.text(min_size=1))
def test_names_survive(name, subfeed):
    assert BlobUri.parse(str(BlobUri(A, name, B))) == BlobUri(A, name, B)
    assert FeedUri.parse(str(FeedUri(FEED, subfeed))) == FeedUri(FEED, subfeed)


@given(st.sampled_from(["sha1://", "feed://", f"sha1://{A}?", f"feed://{FEED}/"]), st.text(alphabet=st.characters()))
def test_raises_only_invalid_input(start, rest):
    try:
        parse_uri(start + rest)
    except InvalidInput:
        pass
