"""Signed append-only logs: messages, chains, rolling heads and checkpoints.

Messages are signed in the 2021 dialect, which older nodes verify (spec/signing.md section 3). The rolling head is
ours and fixes the whole history with SHA-256:

    head(0)     32 zero bytes
    head(n+1)   SHA-256(head(n) || SHA-256(canonical body n) || the 64 signature bytes n)

A checkpoint is a head signed with the feed's key; it also names the feed and the subfeed, which a message does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from kachery_lab.core.canonical_json import canonical_2021, loads_2021, python_form
from kachery_lab.core.ids import FeedId, Sha256, SubfeedHash, parse_fields, parse_whole_number
from kachery_lab.core.keys import PrivateKey, PublicKey
from kachery_lab.core.signables import checkpoint_bytes
from kachery_lab.core.signatures import parse_signature, sign_2021, verify_2021
from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import InvalidInput

HEAD_0 = bytes(32)

Reason = Literal["bad-signature", "wrong-previous-signature", "wrong-message-number", "gap"]

_BODY_FIELDS = frozenset({"message", "messageNumber", "timestamp"})
_OPTIONAL_BODY_FIELDS = frozenset({"previousSignature", "metaData"})


class ChainRefused(InvalidInput):
    """A batch of messages does not continue the chain. `reason` says how, `position` which message number was
    expected.
    """

    def __init__(self, reason: Reason, position: int) -> None:
        super().__init__(f"message {position} does not continue the subfeed: {reason}")
        self.reason: Reason = reason
        self.position = position


def subfeed_hash(name: object) -> SubfeedHash:
    """The hash that clients compute from a subfeed's name (spec/signing.md section 4).

    `~<hash>` is that hash; another string hashes as its UTF-8; any other JSON value as the Python client's text.
    Raises InvalidInput for a malformed hash after `~`, half of a surrogate pair, and what is not JSON.
    """
    if isinstance(name, str) and name.startswith("~"):
        return SubfeedHash.parse(name[1:], "subfeed name")
    text = name if isinstance(name, str) else python_form(name)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInput("subfeed name: half of a surrogate pair") from None
    return SubfeedHash(hashlib.sha1(data, usedforsecurity=False).hexdigest())


def next_head(head: bytes, body_sha256: bytes, signature_hex: str) -> bytes:
    """The rolling head after one more message."""
    return hashlib.sha256(head + body_sha256 + bytes.fromhex(signature_hex)).digest()


@dataclass(frozen=True, slots=True)
class SubfeedHead:
    """Where a subfeed ends: how many messages it has, the signature of the last (None without messages), the
    rolling head.
    """

    num_messages: int = 0
    signature: str | None = None
    head: bytes = HEAD_0

    def extended(self, messages: Iterable[SignedMessage]) -> SubfeedHead:
        """The head after these messages, which must continue it (as `accept_chain` and `sign_messages` return them)."""
        count, signature, head = self.num_messages, self.signature, self.head
        for message in messages:
            count += 1
            signature = message.signature
            head = next_head(head, message.body_sha256, signature)
        return SubfeedHead(count, signature, head)


@dataclass(frozen=True, slots=True)
class SignedMessage:
    """A verified message without what its neighbour tells: the previous signature.

    `message` and `meta_data` are canonical JSON texts, `timestamp` is in milliseconds since 1970, `signature` is 128
    lower-case hex digits, `body_sha256` is 32 bytes.
    """

    position: int
    message: str
    timestamp: int
    signature: str
    body_sha256: bytes
    meta_data: str | None = None

    def canonical_body(self, previous_signature: str | None) -> str:
        """The text that was signed."""
        return _canonical_body(self._body_text(previous_signature))

    def envelope_text(self, previous_signature: str | None) -> str:
        """The message as it goes over the wire. Canonical too, unless it has a key `__proto__`."""
        return f'{{"body":{self._body_text(previous_signature)},"signature":"{self.signature}"}}'

    def _body_text(self, previous_signature: str | None) -> str:
        return _body_text(self.message, self.position, self.meta_data, previous_signature, self.timestamp)


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A message of the right shape, not verified. `canonical_body` is the text that its signature should cover."""

    position: int
    message: str
    timestamp: int
    signature: str
    previous_signature: str | None
    meta_data: str | None
    canonical_body: str


def _body_text(
    message: str, position: int, meta_data: str | None, previous_signature: str | None, timestamp: int
) -> str:
    # The keys stand in canonical order.
    meta = "" if meta_data is None else f',"metaData":{meta_data}'
    previous = "" if previous_signature is None else f',"previousSignature":"{previous_signature}"'
    return f'{{"message":{message},"messageNumber":{position}{meta}{previous},"timestamp":{timestamp}}}'


def _canonical_body(body_text: str) -> str:
    # The 2021 dialect spreads this key to the enclosing objects, so canonical parts do not make a canonical whole.
    return canonical_2021(loads_2021(body_text)) if '"__proto__"' in body_text else body_text


def parse_signed_message(value: object, where: str = "message") -> ReceivedMessage:
    """Check the shape of a signed message; the signature is not verified. Raises InvalidInput.

    Exactly the known fields; optional ones absent rather than null; whole numbers from 0 to 2^53 (`1.0` is 1). The
    signature is taken in either case and kept in lower case, so that nobody on the way can change its text;
    `previousSignature` is part of what is signed and must be lower case.
    """
    envelope = parse_fields(value, where, frozenset({"body", "signature"}), frozenset())
    signature = parse_signature(envelope["signature"], f"{where}.signature")
    body = parse_fields(envelope["body"], f"{where}.body", _BODY_FIELDS, _OPTIONAL_BODY_FIELDS)
    if not isinstance(body["message"], dict | list):
        raise InvalidInput(f"{where}.body.message: expected an object or array, got {shorten(body['message'])}")
    meta_data = None
    if "metaData" in body:
        if not isinstance(body["metaData"], dict):
            raise InvalidInput(f"{where}.body.metaData: expected an object")
        meta_data = canonical_2021(body["metaData"])
    previous = None
    if "previousSignature" in body:
        previous = parse_signature(body["previousSignature"], f"{where}.body.previousSignature")
        if previous != body["previousSignature"]:
            raise InvalidInput(f"{where}.body.previousSignature: upper-case hex digits are refused")
    message = canonical_2021(body["message"])
    position = parse_whole_number(body["messageNumber"], f"{where}.body.messageNumber")
    timestamp = parse_whole_number(body["timestamp"], f"{where}.body.timestamp")
    canonical_body = _canonical_body(_body_text(message, position, meta_data, previous, timestamp))
    return ReceivedMessage(position, message, timestamp, signature, previous, meta_data, canonical_body)


def accept_chain(
    feed_id: FeedId, have: int, previous_signature: str | None, messages: Sequence[ReceivedMessage]
) -> list[SignedMessage]:
    """The messages of a batch that continue a subfeed of `have` messages, all of them verified (spec/signing.md
    section 3).

    Leading messages that are known already are dropped unread; nothing left is an empty list, not an error. Raises
    ChainRefused, and nothing of the batch counts, for a gap, a bad signature, a wrong previous signature or a wrong
    number; InvalidInput for a feed id that is no safe key.
    """
    key = PublicKey.parse(feed_id, "feedId")
    first = next((index for index, message in enumerate(messages) if message.position >= have), len(messages))
    accepted: list[SignedMessage] = []
    for expected, message in enumerate(messages[first:], start=have):
        if expected == have and message.position > have:
            raise ChainRefused("gap", have)
        if not verify_2021(key, message.canonical_body, message.signature):
            raise ChainRefused("bad-signature", expected)
        if message.previous_signature != previous_signature:
            raise ChainRefused("wrong-previous-signature", expected)
        if message.position != expected:
            raise ChainRefused("wrong-message-number", expected)
        previous_signature = message.signature
        accepted.append(
            SignedMessage(
                message.position,
                message.message,
                message.timestamp,
                message.signature,
                hashlib.sha256(message.canonical_body.encode("utf-8")).digest(),
                message.meta_data,
            )
        )
    return accepted


def sign_messages(
    private_key: PrivateKey, start: SubfeedHead, message_texts: Sequence[str], timestamp_ms: int
) -> tuple[list[SignedMessage], SubfeedHead]:
    """Sign messages that continue a subfeed, and the head after them. An empty list gives the start again.

    Each text is the `canonical_2021` of an object or array that passed `check_signable`; that is the caller's
    promise. Raises InvalidInput for a text of another type.
    """
    signed: list[SignedMessage] = []
    count, previous, head = start.num_messages, start.signature, start.head
    for text in message_texts:
        if not text.startswith(("{", "[")):
            raise InvalidInput(f"message {len(signed)} of {len(message_texts)}: expected an object or array")
        body = _canonical_body(_body_text(text, count, None, previous, timestamp_ms))
        previous = sign_2021(private_key, body)
        body_sha256 = hashlib.sha256(body.encode("utf-8")).digest()
        head = next_head(head, body_sha256, previous)
        signed.append(SignedMessage(count, text, timestamp_ms, previous, body_sha256))
        count += 1
    return signed, SubfeedHead(count, previous, head)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The feed's word that its subfeed's first `count` messages have this rolling head (32 bytes)."""

    feed_id: FeedId
    subfeed_hash: SubfeedHash
    count: int
    head: bytes
    signature: str

    @classmethod
    def sign(cls, private_key: PrivateKey, subfeed: SubfeedHash, end: SubfeedHead) -> Self:
        """Make the checkpoint of where a subfeed ends, with the feed's own key."""
        feed_id = FeedId(private_key.public_hex)
        data = checkpoint_bytes(feed_id, subfeed, end.num_messages, end.head)
        return cls(feed_id, subfeed, end.num_messages, end.head, private_key.sign(data).hex())

    def verify(self) -> bool:
        """Whether the feed's key signed it. A feed id that is no safe key verifies as False."""
        try:
            key = PublicKey.parse(self.feed_id)
        except InvalidInput:
            return False
        data = checkpoint_bytes(self.feed_id, self.subfeed_hash, self.count, self.head)
        return key.verify(bytes.fromhex(self.signature), data)

    def to_json(self) -> dict[str, object]:
        """The JSON object that `parse` reads."""
        return {
            "feedId": str(self.feed_id),
            "subfeedHash": str(self.subfeed_hash),
            "count": self.count,
            "head": self.head.hex(),
            "signature": self.signature,
        }

    @classmethod
    def parse(cls, value: object, where: str = "checkpoint") -> Self:
        """Check the shape of a checkpoint; the signature is not verified. Raises InvalidInput."""
        names = frozenset({"feedId", "subfeedHash", "count", "head", "signature"})
        fields = parse_fields(value, where, names, frozenset())
        return cls(
            FeedId.parse(fields["feedId"], f"{where}.feedId"),
            SubfeedHash.parse(fields["subfeedHash"], f"{where}.subfeedHash"),
            parse_whole_number(fields["count"], f"{where}.count"),
            bytes.fromhex(Sha256.parse(fields["head"], f"{where}.head")),
            parse_signature(fields["signature"], f"{where}.signature"),
        )
