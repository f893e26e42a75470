"""Signing and verifying in the 2021 dialect (spec/signing.md section 2)."""

from __future__ import annotations

import re

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.keys import PrivateKey, PublicKey
from kachery_lab.core.signables import legacy_2021, prehash_2021
from kachery_lab.errors import InvalidInput

_SIGNATURE = re.compile("[0-9a-fA-F]{128}")


def sign_2021(private_key: PrivateKey, canonical_text: str) -> str:
    """The signature of a canonical text, as 128 lower-case hex digits."""
    return private_key.sign(prehash_2021(canonical_text)).hex()


def parse_signature(value: object, where: str = "signature") -> str:
    """128 hex digits, in lower case (older nodes accept both cases). Raises InvalidInput."""
    if not isinstance(value, str) or not _SIGNATURE.fullmatch(value):
        raise InvalidInput(f"{where}: expected 128 hex digits")
    return value.lower()


def verify_2021(
    public_hex: str | PublicKey,
    value_or_canonical: object,
    signature_hex: object,
    *,
    python_form_text: str | None = None,
) -> bool:
    """Whether the key signed this canonical text (a `str`) or the canonical form of this value (anything else).

    Accepted forms: the 2021 prehash; the legacy form without prehash; and, if `python_form_text` is given
    (`python_form` of the value with its ints and floats kept apart), the prehash of that text, which the Python
    client signs. A key that `PublicKey.parse` refuses, a signature that is not 128 hex digits, and a value that has
    no canonical form verify as False; nothing is raised.
    """
    try:
        key = public_hex if isinstance(public_hex, PublicKey) else PublicKey.parse(public_hex)
        signature = bytes.fromhex(parse_signature(signature_hex))
        text = value_or_canonical if isinstance(value_or_canonical, str) else canonical_2021(value_or_canonical)
        return (
            key.verify(signature, prehash_2021(text))
            or key.verify(signature, legacy_2021(text))
            or (python_form_text is not None and key.verify(signature, prehash_2021(python_form_text)))
        )
    except (InvalidInput, UnicodeEncodeError):
        return False
