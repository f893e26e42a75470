"""Ed25519 keys of nodes and feeds, and encryption of secrets under a key derived from one.

The library's verification is strict about the scalar (S < L), but it takes public keys of small order, for which one
signature fits every message. Such keys, encodings with y >= p, and encodings of no point are refused here when a key
is parsed.
"""

from __future__ import annotations

import base64
import os
import re
from functools import lru_cache
from typing import Final, Self

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import ContentMismatch, InvalidInput

_P: Final = 2**255 - 19
_D: Final = -121665 * pow(121666, -1, _P) % _P
# The y coordinates of the eight points whose order divides 8: (0, 1); (0, -1); y = 0 twice; and two values twice each.
_SMALL_ORDER_Y: Final = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    }
)

_PRIVATE_DER: Final = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC_DER: Final = bytes.fromhex("302a300506032b6570032100")
_HEX_64: Final = re.compile("[0-9a-f]{64}")
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16


class PublicKey:
    """An Ed25519 public key that is safe to verify with."""

    __slots__ = ("_key", "hex")

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.hex: str = key.public_bytes_raw().hex()

    @classmethod
    def parse(cls, value: object, where: str = "public key") -> PublicKey:
        """Read 64 lower-case hex digits. Raises InvalidInput for another form and for weak or non-canonical keys."""
        if not isinstance(value, str) or not _HEX_64.fullmatch(value):
            raise InvalidInput(f"{where}: expected 64 lower-case hex digits, got {shorten(value)}")
        try:
            return _load_public_key(str(value))
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error.message}") from None

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether these 64 bytes are this key's signature of the data. Any other length is simply no signature."""
        try:
            self._key.verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True

    def to_pem(self) -> str:
        """The text of `public.pem`, with its final newline (spec/storage-layout.md section 6)."""
        return _pem("PUBLIC", _PUBLIC_DER + bytes.fromhex(self.hex))

    @classmethod
    def from_pem(cls, text: str) -> PublicKey:
        """Read the text of `public.pem`, with or without its final newline. Raises InvalidInput."""
        return cls.parse(_from_pem("PUBLIC", _PUBLIC_DER, text).hex())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.hex == self.hex

    def __hash__(self) -> int:
        return hash(self.hex)

    def __repr__(self) -> str:
        return f"PublicKey({self.hex})"


@lru_cache(maxsize=4096)
def _load_public_key(text: str) -> PublicKey:
    encoded = bytes.fromhex(text)
    number = int.from_bytes(encoded, "little")
    y = number & ((1 << 255) - 1)
    if y >= _P:
        raise InvalidInput("not the canonical encoding of a point (y >= p)")
    if y in _SMALL_ORDER_Y:
        raise InvalidInput("a point of small order, for which one signature fits every message")
    # x^2 = (y^2 - 1) / (d y^2 + 1) needs a root: the fraction is a square if and only if n * d is.
    x_squared = (y * y - 1) * (_D * y * y + 1) % _P
    if pow(x_squared, (_P - 1) // 2, _P) != 1:
        raise InvalidInput("not the encoding of a point on the curve")
    return PublicKey(Ed25519PublicKey.from_public_bytes(encoded))


class PrivateKey:
    """An Ed25519 private key. Its secret shows in no repr and in no error."""

    __slots__ = ("_key", "_seed", "public_hex")

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_hex: str = self._key.public_key().public_bytes_raw().hex()

    @classmethod
    def from_seed(cls, value: object) -> Self:
        """Read the 32-byte seed as 64 lower-case hex digits. Raises InvalidInput."""
        if not isinstance(value, str) or not _HEX_64.fullmatch(value):
            raise InvalidInput("private key: expected 64 lower-case hex digits")
        return cls(bytes.fromhex(value))

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's random numbers."""
        return cls(os.urandom(32))

    @classmethod
    def from_pem(cls, text: str) -> Self:
        """Read the text of `private.pem`, with or without its final newline. Raises InvalidInput."""
        return cls(_from_pem("PRIVATE", _PRIVATE_DER, text))

    def to_pem(self) -> str:
        """The text of `private.pem`, with its final newline (spec/storage-layout.md section 6)."""
        return _pem("PRIVATE", _PRIVATE_DER + self._seed)

    def seed_hex(self) -> str:
        """The 32-byte seed as hex: the form in which older databases keep feed keys. A secret."""
        return self._seed.hex()

    def public_key(self) -> PublicKey:
        """The public half."""
        return PublicKey(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature; the same data always has the same one."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"PrivateKey(public={self.public_hex})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a private key is not pickled")


def derive_key(private: PrivateKey, purpose: str) -> bytes:
    """32 bytes for one named purpose: HKDF-SHA256 of the seed. Different purposes give unrelated keys."""
    seed = bytes.fromhex(private.seed_hex())
    return HKDF(hashes.SHA256(), length=32, salt=None, info=purpose.encode("utf-8")).derive(seed)


def seal(key: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """Encrypt with AES-256-GCM: 12 random nonce bytes, the ciphertext, 16 tag bytes. `aad` says what it is for, and
    binds it to that.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def unseal(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext of `seal`. Raises ContentMismatch for another key, other `aad` or changed bytes."""
    if len(sealed) < _NONCE_BYTES + _TAG_BYTES:
        raise ContentMismatch("the encrypted secret is cut short")
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], aad)
    except InvalidTag:
        raise ContentMismatch("the encrypted secret does not open with this key") from None


def _pem(kind: str, der: bytes) -> str:
    return f"-----BEGIN {kind} KEY-----\n{base64.b64encode(der).decode('ascii')}\n-----END {kind} KEY-----\n"


def _from_pem(kind: str, prefix: bytes, text: str) -> bytes:
    lines = text.removesuffix("\n").split("\n")
    wrong = InvalidInput(f"not an Ed25519 {kind.lower()} key: expected the three lines of a PEM file")
    if len(lines) != 3:
        raise wrong
    try:
        der = base64.b64decode(lines[1], validate=True)
    except ValueError:
        raise wrong from None
    # Only one text is a given key: what differs in case, spaces or base64 padding bits was not written by a key writer.
    if len(der) != len(prefix) + 32 or not der.startswith(prefix) or _pem(kind, der) != text.removesuffix("\n") + "\n":
        raise wrong
    return der[len(prefix) :]
