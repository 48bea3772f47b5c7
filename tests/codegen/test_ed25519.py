"""The runtime's own SHA-2 and Ed25519, against hashlib, OpenSSL (cryptography) and RFC 8032."""

from __future__ import annotations

import ctypes
import hashlib
import random
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
# RFC 8032, section 7.1: public key, message, signature.
VECTORS = {
    "test 1": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b4"
        "6bd25bf5f0595bbe24655141438e7a100b",
    ),
    "test 2": (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d"
        "8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "test 3": (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6"
        "594a7c15e9716ed28dc027beceea1ec40a",
    ),
    "test SHA(abc)": (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feeb"
        "bd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0"
        "303dca179c138ac17ad9bef1177331a704",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """sha256.c, sha512.c and ed25519.c as a library of their own."""
    path = tmp_path_factory.mktemp("signatures") / "signatures.so"
    files = [str(RUNTIME / f"{name}.c") for name in ("sha256", "sha512", "ed25519", "cpu")]
    zig_cc(Target.load("host").link, ["-O2", "-shared", "-fPIC", *files, "-o", str(path)])
    return ctypes.CDLL(str(path))


def digest(runtime: ctypes.CDLL, name: str, pieces: list[bytes], *, fast: bool = True) -> bytes:
    size = hashlib.new(name).digest_size
    state, found = ctypes.create_string_buffer(512), ctypes.create_string_buffer(size)
    getattr(runtime, f"slm_{name}_init")(state)
    if not fast:
        ctypes.c_int.from_buffer(state, 40).value = 0  # slm_sha256.fast
    for piece in pieces:
        getattr(runtime, f"slm_{name}_update")(state, piece, ctypes.c_size_t(len(piece)))
    getattr(runtime, f"slm_{name}_final")(state, found)
    return found.raw


def accepts(runtime: ctypes.CDLL, key: bytes, message: bytes, signature: bytes) -> bool:
    assert len(key) == 32 and len(signature) == 64
    result: int = runtime.slm_ed25519_verify(signature, message, ctypes.c_size_t(len(message)), key)
    return result == 1


def openssl_accepts(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize(("name", "fast"), [("sha256", True), ("sha256", False), ("sha512", True)])
def test_digests_are_those_of_hashlib_however_a_message_is_cut(
    runtime: ctypes.CDLL, name: str, fast: bool
) -> None:
    rng = random.Random(0)
    for length in [*range(300), 4096, 100003]:
        message = rng.randbytes(length)
        cuts = sorted(rng.randrange(length + 1) for _ in range(rng.randrange(4)))
        pieces = [message[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        wanted = hashlib.new(name, message).digest()
        assert digest(runtime, name, pieces, fast=fast) == wanted, length


@pytest.mark.parametrize("vector", VECTORS)
def test_the_signatures_of_the_rfc_are_accepted(runtime: ctypes.CDLL, vector: str) -> None:
    key, message, signature = map(bytes.fromhex, VECTORS[vector])
    assert openssl_accepts(key, message, signature)
    assert accepts(runtime, key, message, signature)
    assert not accepts(runtime, key, message + b"\0", signature)


def test_signatures_of_any_key_are_accepted_and_changed_ones_are_not(
    runtime: ctypes.CDLL,
) -> None:
    rng = random.Random(1)
    for _ in range(300):
        private = Ed25519PrivateKey.from_private_bytes(rng.randbytes(32))
        message = rng.randbytes(rng.randrange(300))
        key, signature = private.public_key().public_bytes_raw(), private.sign(message)
        assert accepts(runtime, key, message, signature)
        assert not accepts(runtime, key, flipped(rng, message or b"x"), signature)
        assert not accepts(runtime, key, message, flipped(rng, signature))
        changed = flipped(rng, key)
        assert accepts(runtime, changed, message, signature) == openssl_accepts(
            changed, message, signature
        )


def flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_signature_has_one_form_only(runtime: ctypes.CDLL) -> None:
    """S + L signs the same message, to who does not look at S."""
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    key, signature = private.public_key().public_bytes_raw(), private.sign(b"message")
    number = int.from_bytes(signature[32:], "little")
    for more in range(1, 16):
        if number + more * ORDER < 2**256:
            other = signature[:32] + (number + more * ORDER).to_bytes(32, "little")
            assert not accepts(runtime, key, b"message", other)
    for s in (ORDER - 1, ORDER, ORDER + 1, 2**252, 2**253 - 1, 2**256 - 1):
        other = signature[:32] + s.to_bytes(32, "little")
        assert not accepts(runtime, key, b"message", other)


def test_keys_that_encode_no_point_or_not_canonically_are_refused(runtime: ctypes.CDLL) -> None:
    zero = bytes(64)
    for y in range(P, 2**255):  # 19 of them, which stand for y - p
        for odd in (0, 1):
            key = (y | odd << 255).to_bytes(32, "little")
            neutral = (1).to_bytes(32, "little") + bytes(32)
            for signature in (zero, neutral, key + bytes(32)):
                assert not accepts(runtime, key, b"message", signature)
    # x = 0 has no odd twin.
    assert not accepts(
        runtime, (1 | 1 << 255).to_bytes(32, "little"), b"", (1).to_bytes(32, "little") + bytes(32)
    )


def test_any_bytes_are_answered_as_openssl_answers(runtime: ctypes.CDLL) -> None:
    rng = random.Random(2)
    special = [bytes(32), b"\xff" * 32, (1).to_bytes(32, "little"), (P - 1).to_bytes(32, "little"),
               (2**255).to_bytes(32, "little"), ORDER.to_bytes(32, "little")]  # fmt: skip
    for _ in range(500):
        key, r = (rng.choice([*special, rng.randbytes(32)]) for _ in range(2))
        s = rng.choice([*special, rng.randbytes(31) + b"\0"])
        message = rng.randbytes(rng.randrange(3))
        if int.from_bytes(key, "little") % 2**255 >= P:
            continue  # OpenSSL takes these, RFC 8032 does not
        assert accepts(runtime, key, message, r + s) == openssl_accepts(key, message, r + s)
