"""Addresses that people and programs pass around (spec/storage-layout.md section 3, spec/feeds.md).

    sha1://<sha1>                                        a blob
    sha1://<sha1>/<name>?manifest=<manifest sha1>        with a name for people, and the manifest of a large blob
    sha1://<sha1>?chunkOf=<file sha1>~<start>~<end>      a chunk of a larger file
    feed://<feed id>                                     a feed
    feed://<feed id>/<percent-encoded subfeed name>      a subfeed; `~<subfeedHash>` where the name is no string

`str(uri)` is the text. Raises InvalidInput for everything else; unknown query parameters are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote

from kachery_lab.core.ids import ChunkOf, FeedId, FileKey, Sha1
from kachery_lab.core.strict_json import MAX_SAFE_INTEGER, shorten
from kachery_lab.errors import InvalidInput

MAX_LENGTH = 10_000


@dataclass(frozen=True, slots=True)
class BlobUri:
    """A blob, or a chunk of one. `name` is decoration for people and selects nothing; empty when there is none."""

    sha1: Sha1
    name: str = ""
    manifest_sha1: Sha1 | None = None
    chunk_of: ChunkOf | None = None

    @classmethod
    def parse(cls, value: object, where: str = "uri") -> Self:
        """Read a `sha1://` address. Raises InvalidInput."""
        address, _, query = _after_scheme(value, "sha1://", where).partition("?")
        digits, _, name = address.partition("/")
        manifest, chunk_of = None, None
        for parameter in query.split("&"):
            key, _, text = parameter.partition("=")
            if key == "manifest":
                manifest = Sha1.parse(text, f"{where}: manifest")
            elif key == "chunkOf":
                chunk_of = _parse_chunk_of(unquote(text), f"{where}: chunkOf")
        # A name was put in as it stood by some clients, so a % that is no escape is just a character.
        return cls(Sha1.parse(digits, f"{where}: hash"), unquote(name, errors="replace"), manifest, chunk_of)

    def __str__(self) -> str:
        name = f"/{quote(self.name, safe='/')}" if self.name else ""
        parameters = []
        if self.manifest_sha1 is not None:
            parameters.append(f"manifest={self.manifest_sha1}")
        if self.chunk_of is not None:
            chunk = self.chunk_of
            parameters.append(f"chunkOf={chunk.file_key.sha1}~{chunk.start_byte}~{chunk.end_byte}")
        query = f"?{'&'.join(parameters)}" if parameters else ""
        return f"sha1://{self.sha1}{name}{query}"

    def file_key(self) -> FileKey:
        """The same in the form that nodes of 2021 use."""
        return FileKey(self.sha1, self.manifest_sha1, self.chunk_of)


@dataclass(frozen=True, slots=True)
class FeedUri:
    """A feed, or with `subfeed_name` one of its subfeeds; a name that starts with `~` is the subfeed's hash."""

    feed_id: FeedId
    subfeed_name: str | None = None

    @classmethod
    def parse(cls, value: object, where: str = "uri") -> Self:
        """Read a `feed://` address; a trailing slash counts for nothing. Raises InvalidInput."""
        address = _after_scheme(value, "feed://", where).partition("?")[0]
        digits, _, name = address.partition("/")
        try:
            decoded = unquote(name, errors="strict")
        except UnicodeDecodeError:
            raise InvalidInput(f"{where}: the subfeed name is not percent-encoded UTF-8") from None
        return cls(FeedId.parse(digits, f"{where}: feed id"), decoded or None)

    def __str__(self) -> str:
        return f"feed://{self.feed_id}" + (f"/{quote(self.subfeed_name, safe='')}" if self.subfeed_name else "")


def parse_uri(value: object, where: str = "uri") -> BlobUri | FeedUri:
    """Read either kind of address. Raises InvalidInput."""
    if isinstance(value, str) and value.startswith("feed://"):
        return FeedUri.parse(value, where)
    return BlobUri.parse(value, where)


def _after_scheme(value: object, scheme: str, where: str) -> str:
    if not isinstance(value, str) or not value.startswith(scheme):
        raise InvalidInput(f"{where}: expected an address that starts with {scheme}, got {shorten(value)}")
    if len(value) > MAX_LENGTH:
        raise InvalidInput(f"{where}: {len(value)} characters; the most is {MAX_LENGTH}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput(f"{where}: half of a surrogate pair")
    return value.removeprefix(scheme)


def _parse_chunk_of(text: str, where: str) -> ChunkOf:
    parts = text.split("~")
    if len(parts) != 3:
        raise InvalidInput(f"{where}: expected <file sha1>~<start>~<end>, got {shorten(text)}")
    numbers = []
    for part in parts[1:]:
        if not (part.isascii() and part.isdigit() and len(part) <= 16 and int(part) <= MAX_SAFE_INTEGER):
            raise InvalidInput(f"{where}: expected a whole number of bytes, got {shorten(part)}")
        numbers.append(int(part))
    if numbers[0] > numbers[1]:
        raise InvalidInput(f"{where}: start {numbers[0]} is after end {numbers[1]}")
    return ChunkOf(FileKey(Sha1.parse(parts[0], where)), numbers[0], numbers[1])
