"""Ed25519 against Wycheproof and speccheck, weak keys, PEM files, and sealed secrets."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core import keys
from kachery_lab.core.keys import PrivateKey, PublicKey, derive_key, seal, unseal
from kachery_lab.errors import ContentMismatch, InvalidInput
from tests.third_party import shared_vectors

VECTORS = Path(__file__).parents[1] / "vectors"
KEYS = json.loads((VECTORS / "keys.json").read_text("utf-8"))["keys"]
P, D = keys._P, keys._D


def refuses_key(text: str) -> bool:
    try:
        PublicKey.parse(text)
    except InvalidInput:
        return True
    return False


@pytest.mark.parametrize("name", KEYS)
def test_recorded_keys(name):
    recorded = KEYS[name]
    key = PrivateKey.from_seed(recorded["privateKeyHex"])
    assert key.public_hex == recorded["publicKeyHex"] == key.public_key().hex
    assert key.to_pem() == recorded["privatePem"]
    assert key.public_key().to_pem() == recorded["publicPem"]
    for ending in ("", "\n"):
        assert PrivateKey.from_pem(recorded["privatePem"].rstrip("\n") + ending).public_hex == key.public_hex
        assert PublicKey.from_pem(recorded["publicPem"].rstrip("\n") + ending) == key.public_key()
    assert key.public_key().verify(key.sign(b"data"), b"data")


@pytest.mark.parametrize(
    "change",
    [
        lambda pem: "",
        lambda pem: pem + "\n",
        lambda pem: pem.replace("\n", "\r\n"),
        lambda pem: " " + pem,
        lambda pem: pem.replace("PRIVATE", "PUBLIC"),
        lambda pem: pem.replace("MC4C", "MC4D"),
        lambda pem: pem.replace("MC4C", "MC4é"),
        lambda pem: pem.replace("MC4C", "\n"),
        lambda pem: KEYS["node"]["publicPem"],
    ],
)
def test_other_pem_texts_are_refused_without_showing_them(change):
    with pytest.raises(InvalidInput) as caught:
        PrivateKey.from_pem(change(KEYS["node"]["privatePem"]))
    assert "AABA" not in caught.value.message


@given(st.text(alphabet=st.characters()))
def test_pem_raises_only_invalid_input(text):
    for parse in (PrivateKey.from_pem, PublicKey.from_pem, PublicKey.parse, PrivateKey.from_seed):
        with pytest.raises(InvalidInput):
            parse(text)


def test_secrets_do_not_show():
    key = PrivateKey.from_seed(KEYS["node"]["privateKeyHex"])
    assert KEYS["node"]["privateKeyHex"] not in repr(key) + str(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)
    assert PrivateKey.generate().public_hex != PrivateKey.generate().public_hex


def test_wycheproof():
    groups = json.loads(shared_vectors("ed25519/wycheproof-ed25519.json").read_text("utf-8"))["testGroups"]
    count = 0
    for group in groups:
        key = PublicKey.parse(group["publicKey"]["pk"])
        for test in group["tests"]:
            result = key.verify(bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"]))
            assert result is (test["result"] == "valid"), test["tcId"]
            count += 1
    assert count == 151


def test_speccheck():
    cases = json.loads(shared_vectors("ed25519/speccheck-cases.json").read_text("utf-8"))
    keys_refused = [index for index, case in enumerate(cases) if refuses_key(case["pub_key"])]
    verified = [
        index
        for index, case in enumerate(cases)
        if index not in keys_refused
        and PublicKey.parse(case["pub_key"]).verify(bytes.fromhex(case["signature"]), bytes.fromhex(case["message"]))
    ]
    assert len(cases) == 12
    # 0 and 1: key of small order; 10 and 11: key with y >= p.
    assert keys_refused == [0, 1, 10, 11]
    # 2: R of small order; 3: key and R of mixed order. Refused by the library: 4 and 5 (valid only with cofactor),
    # 6 and 7 (S >= L), 8 and 9 (R not canonical).
    assert verified == [2, 3]


def test_the_library_accepts_a_key_of_small_order():
    """Positive control: one signature that the library takes for any message under a key that is refused here."""
    identity = b"\x01" + bytes(31)
    library = Ed25519PublicKey.from_public_bytes(identity)
    for message in (b"pay Alice", b"pay Mallory"):
        library.verify(identity + bytes(32), message)
    with pytest.raises(InvalidSignature):
        library.verify(identity + b"\x01" + bytes(31), b"pay Alice")
    assert refuses_key(identity.hex())


def add(first, second):
    (x1, y1), (x2, y2) = first, second
    product = D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, P)
    y = (y1 * y2 + x1 * x2) * pow(1 - product, -1, P)
    return x % P, y % P


def points(y):
    """The points with this y, by brute roots."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    root = pow(square, (P + 3) // 8, P)
    if root * root % P != square:
        root = root * pow(2, (P - 1) // 4, P) % P
    assert root * root % P == square
    return {(root, y), (-root % P, y)}


def test_the_list_of_small_order_is_complete():
    small = {point for y in keys._SMALL_ORDER_Y for point in points(y)}
    assert len(small) == 8
    for point in small:
        eightfold = point
        for _ in range(3):
            eightfold = add(eightfold, eightfold)
        assert eightfold == (0, 1)


def test_every_encoding_of_a_small_order_point_is_refused():
    for y in keys._SMALL_ORDER_Y:
        for value in (y, y + P):
            for sign in (0, 1):
                if value < 2**255:
                    assert refuses_key((value | sign << 255).to_bytes(32, "little").hex())


def test_what_is_no_point_or_not_canonical_is_refused():
    for y in range(P, 2**255):
        assert refuses_key(y.to_bytes(32, "little").hex())
    assert refuses_key((2).to_bytes(32, "little").hex())
    assert refuses_key("A" * 64)
    assert refuses_key("")
    with pytest.raises(InvalidInput, match="nodeId: "):
        PublicKey.parse("00" * 32, "nodeId")


@given(st.binary(min_size=32, max_size=32))
def test_every_real_key_is_accepted(seed):
    key = PrivateKey.from_seed(seed.hex())
    assert PublicKey.parse(key.public_hex) == key.public_key()


def test_verify_takes_any_bytes():
    key = PrivateKey.generate().public_key()
    for length in (0, 1, 63, 64, 65, 1000):
        assert not key.verify(bytes(length), b"data")


def test_sealed_secrets():
    node = PrivateKey.from_seed(KEYS["node"]["privateKeyHex"])
    key = derive_key(node, "feed-keys/1")
    assert len(key) == 32
    assert key == derive_key(node, "feed-keys/1")
    assert key != derive_key(node, "access/1")
    sealed = seal(key, b"secret", b"feed a")
    assert seal(key, b"secret", b"feed a") != sealed
    assert b"secret" not in sealed
    assert unseal(key, sealed, b"feed a") == b"secret"
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    wrong = [
        (derive_key(node, "x"), sealed, b"feed a"),
        (key, sealed, b"feed b"),
        (key, changed, b"feed a"),
        (key, b"", b""),
    ]
    for arguments in wrong:
        with pytest.raises(ContentMismatch):
            unseal(*arguments)


def test_derived_keys_stay_the_same():
    """Secrets on old volumes open only as long as this does not change."""
    node = PrivateKey.from_seed(KEYS["node"]["privateKeyHex"])
    assert derive_key(node, "test/1").hex() == "595c6fca8af0e23127b358f50abde992d9be2ffb0816b9a63a98cd5527a74633"
