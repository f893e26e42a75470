"""2021 signatures against the recorded ones, and what is signed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kachery_lab.core.canonical_json import canonical_2021, loads_2021, python_form
from kachery_lab.core.keys import PrivateKey, PublicKey
from kachery_lab.core.signables import checkpoint_bytes, prehash_2021
from kachery_lab.core.signatures import parse_signature, sign_2021, verify_2021
from kachery_lab.errors import InvalidInput

VECTORS = Path(__file__).parents[1] / "vectors"
RECORDED = json.loads((VECTORS / "signatures.json").read_text("utf-8"))
CLIENT = json.loads((VECTORS / "signatures_python_client.json").read_text("utf-8"))
KEYS = json.loads((VECTORS / "keys.json").read_text("utf-8"))["keys"]
NODE = PrivateKey.from_seed(KEYS["node"]["privateKeyHex"])


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["json"][:60])
def test_recorded_signatures(case):
    text = canonical_2021(loads_2021(case["json"]))
    assert text == case["canonical"]
    assert prehash_2021(text).hex() == case["sha1"]
    assert sign_2021(NODE, text) == case["signature"]
    assert verify_2021(case["publicKeyHex"], text, case["signature"])


@pytest.mark.parametrize("case", RECORDED["verification"], ids=lambda case: case["name"])
def test_recorded_verifications(case):
    value = loads_2021(case["json"])
    expected = case["result"] is True
    if "non-canonical" in case["name"]:
        expected = False  # stricter than the recorded verifier; nothing legitimate has S + L
    assert verify_2021(case["publicKeyHex"], value, case["signature"]) is expected
    assert verify_2021(case["publicKeyHex"], canonical_2021(value), case["signature"]) is expected


@pytest.mark.parametrize("case", CLIENT["cases"], ids=lambda case: case["textSignedByClient"][:60])
def test_the_python_clients_form(case):
    body = json.loads(case["bodyAsSentJson"])
    text = python_form(body)
    assert text == case["textSignedByClient"]
    assert canonical_2021(body) == case["canonical"]
    key = CLIENT["publicKeyHex"]
    assert verify_2021(key, body, case["signature"]) is case["verifiesUnderCanonicalForm"]
    assert verify_2021(key, body, case["signature"], python_form_text=text)
    assert (
        not verify_2021(key, body, case["signature"], python_form_text=text + " ") or case["verifiesUnderCanonicalForm"]
    )


def test_verify_never_raises():
    signature = sign_2021(NODE, "{}")
    assert verify_2021(NODE.public_hex, {}, signature)
    assert verify_2021(PublicKey.parse(NODE.public_hex), "{}", signature.upper())
    assert not verify_2021("x", {}, signature)
    assert not verify_2021("01" + "00" * 31, {}, "01" + "00" * 63)
    assert not verify_2021(NODE.public_hex, object(), signature)
    assert not verify_2021(NODE.public_hex, "\ud800", signature)
    for wrong in (None, 5, signature[:-1], signature + "0", "g" * 128, signature + "\n"):
        assert not verify_2021(NODE.public_hex, {}, wrong)
        with pytest.raises(InvalidInput):
            parse_signature(wrong)


def test_checkpoint_bytes():
    data = checkpoint_bytes("f" * 64, "a" * 40, 3, bytes(32))
    head = "0" * 64
    assert data == (
        b'kachery-lab/checkpoint/1\n{"count":3,"feedId":"' + b"f" * 64 + b'","head":"' + head.encode()
        + b'","subfeedHash":"' + b"a" * 40 + b'"}'
    )  # fmt: skip
    assert hashlib.sha1(b"{}").digest() == prehash_2021("{}")
