"""Value types for every name that crosses a wire or a table.

Each is a `str`, so it compares, hashes, stores and prints as text. `parse` is the only door: it raises InvalidInput
that names the field, what came and what was expected. Hex digits are lower case only: older nodes accepted both but
looked names up by their exact text, so upper case never worked (spec/daemon-api.md section 2).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import ClassVar, Self

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.strict_json import MAX_SAFE_INTEGER, shorten
from kachery_lab.errors import InvalidInput


class _Name(str):
    __slots__ = ()

    noun: ClassVar[str]
    expected: ClassVar[str]
    pattern: ClassVar[re.Pattern[str]]

    @classmethod
    def parse(cls, value: object, where: str = "") -> Self:
        """The value as this type; `where` names the field in the error. Raises InvalidInput."""
        if isinstance(value, str) and cls.pattern.fullmatch(value):
            return cls(value)
        raise InvalidInput(f"{where or cls.noun}: expected {cls.expected}, got {shorten(value)}")


class _Hex(_Name):
    __slots__ = ()

    @classmethod
    def parse(cls, value: object, where: str = "") -> Self:
        """The value as this type; `where` names the field in the error.

        Raises InvalidInput, also for upper-case digits.
        """
        if isinstance(value, str) and not cls.pattern.fullmatch(value) and cls.pattern.fullmatch(value.lower()):
            raise InvalidInput(
                f"{where or cls.noun}: upper-case hex digits are refused, got {shorten(value, 72)}",
                hint="use lower case",
            )
        return super().parse(value, where)


class Sha1(_Hex):
    """SHA-1 of bytes, the name of a blob: 40 lower-case hex digits."""

    __slots__ = ()
    noun = "sha1"
    expected = "40 lower-case hex digits"
    pattern = re.compile("[0-9a-f]{40}")


class SubfeedHash(_Hex):
    """The name of a subfeed inside its feed: 40 lower-case hex digits, computed by the client from the subfeed's
    name.
    """

    __slots__ = ()
    noun = "subfeedHash"
    expected = "40 lower-case hex digits"
    pattern = re.compile("[0-9a-f]{40}")


class Sha256(_Hex):
    """SHA-256 of bytes: 64 lower-case hex digits."""

    __slots__ = ()
    noun = "sha256"
    expected = "64 lower-case hex digits"
    pattern = re.compile("[0-9a-f]{64}")


class NodeId(_Hex):
    """The Ed25519 public key of a node.

    Only the form is checked; `keys.PublicKey.parse` refuses weak keys when one is first seen.
    """

    __slots__ = ()
    noun = "nodeId"
    expected = "64 lower-case hex digits"
    pattern = re.compile("[0-9a-f]{64}")


class FeedId(_Hex):
    """The Ed25519 public key of a feed.

    Only the form is checked; `keys.PublicKey.parse` refuses weak keys when one is first seen.
    """

    __slots__ = ()
    noun = "feedId"
    expected = "64 lower-case hex digits"
    pattern = re.compile("[0-9a-f]{64}")


class ChannelName(_Name):
    """The name of a channel. `api` and `upload` are reserved, because addresses begin with them."""

    __slots__ = ()
    noun = "channelName"
    expected = "2 to 100 characters in dot-separated parts of A-Z a-z 0-9 _ -"
    pattern = re.compile(r"(?=.{2,100}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
    reserved: ClassVar[frozenset[str]] = frozenset({"api", "upload"})

    @classmethod
    def parse(cls, value: object, where: str = "", legacy: bool = False) -> Self:
        """The value as a channel name; with `legacy`, one that nodes of 2021 can join too: 3 to 27 characters.

        Those nodes make 40-character names of it for their broker. Raises InvalidInput.
        """
        name = super().parse(value, where)
        if name in cls.reserved:
            raise InvalidInput(f"{where or cls.noun}: {name!r} is reserved")
        if legacy and not 3 <= len(name) <= 27:
            raise InvalidInput(
                f"{where or cls.noun}: expected 3 to 27 characters, got {len(name)}",
                hint="nodes of 2021 can join no channel with a shorter or longer name",
            )
        return name


class NodeLabel(_Name):
    """The name that people gave a node."""

    __slots__ = ()
    noun = "nodeLabel"
    expected = "1 to 20 characters in dot-separated parts of A-Z a-z 0-9 @, with - inside a part"
    pattern = re.compile(
        r"(?=.{1,20}\Z)[A-Za-z0-9@]([A-Za-z0-9@-]*[A-Za-z0-9@])?(\.[A-Za-z0-9@]([A-Za-z0-9@-]*[A-Za-z0-9@])?)*"
    )


class UserName(_Name):
    """A user in this server's own table; the e-mail addresses of older owners fit."""

    __slots__ = ()
    noun = "user"
    expected = "1 to 80 printable ASCII characters without space, / and :"
    pattern = re.compile("[!-.0-9;-~]{1,80}")


class FeedName(_Name):
    """The local name of a feed: any text that UTF-8 can hold."""

    __slots__ = ()
    noun = "feedName"
    expected = "1 to 100 characters"
    pattern = re.compile("[^\ud800-\udfff]{1,100}")


class TaskFunctionId(_Name):
    """The name under which a backend offers a function."""

    __slots__ = ()
    noun = "taskFunctionId"
    expected = "1 to 400 characters in dot-separated parts of A-Z a-z 0-9 @ _ -"
    pattern = re.compile(r"(?=.{1,400}\Z)[A-Za-z0-9@_-]+(\.[A-Za-z0-9@_-]+)*")


class RequestId(_Name):
    """A name that a client gives to a request, so that repeating it has no second effect."""

    __slots__ = ()
    noun = "requestId"
    expected = "1 to 64 printable ASCII characters"
    pattern = re.compile("[ -~]{1,64}")


def parse_whole_number(value: object, where: str) -> int:
    """A JSON number from 0 to 2^53 without a fraction, as an int (`1.0` is 1, as in JavaScript).

    Raises InvalidInput.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SAFE_INTEGER:
        return value
    shown = "a number outside that range or with a fraction" if isinstance(value, int | float) else shorten(value)
    raise InvalidInput(f"{where}: expected a whole number from 0 to 2^53, got {shown}")


def parse_fields(value: object, where: str, required: frozenset[str], optional: frozenset[str]) -> dict[str, object]:
    """A JSON object that has all `required` fields and no others but `optional` ones. Raises InvalidInput."""
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: expected an object, got {shorten(value)}")
    for name in required:
        if name not in value:
            raise InvalidInput(f"{where}: field {name} is missing")
    for name in value:
        if name not in required and name not in optional:
            raise InvalidInput(f"{where}: unknown field {shorten(name)}")
    return value


@dataclass(frozen=True, slots=True)
class ChunkOf:
    """Where a chunk lies in its file: bytes `start_byte` (inclusive) to `end_byte` (exclusive)."""

    file_key: FileKey
    start_byte: int
    end_byte: int

    @classmethod
    def parse(cls, value: object, where: str = "chunkOf") -> Self:
        """Strict: exactly three fields, whole numbers, start not after end. Raises InvalidInput."""
        fields = parse_fields(value, where, frozenset({"fileKey", "startByte", "endByte"}), frozenset())
        start = parse_whole_number(fields["startByte"], f"{where}.startByte")
        end = parse_whole_number(fields["endByte"], f"{where}.endByte")
        if start > end:
            raise InvalidInput(f"{where}: startByte {start} is after endByte {end}")
        return cls(FileKey.parse(fields["fileKey"], f"{where}.fileKey"), start, end)


@dataclass(frozen=True, slots=True)
class FileKey:
    """How nodes of 2021 name a file to one another: its SHA-1, with its manifest or its place in a larger file if
    known.
    """

    sha1: Sha1
    manifest_sha1: Sha1 | None = None
    chunk_of: ChunkOf | None = None

    @classmethod
    def parse(cls, value: object, where: str = "fileKey") -> Self:
        """Strict: unknown fields and null are refused, an optional field is absent instead. Raises InvalidInput."""
        try:
            fields = parse_fields(value, where, frozenset({"sha1"}), frozenset({"manifestSha1", "chunkOf"}))
            sha1 = Sha1.parse(fields["sha1"], f"{where}.sha1")
            manifest, chunk_of = None, None
            if "manifestSha1" in fields:
                manifest = Sha1.parse(fields["manifestSha1"], f"{where}.manifestSha1")
            if "chunkOf" in fields:
                chunk_of = ChunkOf.parse(fields["chunkOf"], f"{where}.chunkOf")
        except RecursionError:
            raise InvalidInput("fileKey: nested too deeply") from None
        return cls(sha1, manifest, chunk_of)

    def to_json(self) -> dict[str, object]:
        """The JSON object that `parse` reads."""
        result: dict[str, object] = {"sha1": str(self.sha1)}
        if self.manifest_sha1 is not None:
            result["manifestSha1"] = str(self.manifest_sha1)
        if self.chunk_of is not None:
            chunk = self.chunk_of
            result["chunkOf"] = {
                "fileKey": chunk.file_key.to_json(),
                "startByte": chunk.start_byte,
                "endByte": chunk.end_byte,
            }
        return result

    def hash(self) -> Sha1:
        """SHA-1 of the canonical JSON; an upload status names its request by it (spec/signing.md section 4)."""
        text = canonical_2021(self.to_json())
        return Sha1(hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest())
