"""The runtime's own ChaCha20-Poly1305, against RFC 8439 and OpenSSL (cryptography)."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
# RFC 8439, section 2.8.2 and appendix A.5: key, nonce, associated data, ciphertext, tag, plaintext.
VECTORS = {
    "2.8.2": (
        bytes(range(0x80, 0xA0)),
        bytes.fromhex("070000004041424344454647"),
        bytes.fromhex("50515253c0c1c2c3c4c5c6c7"),
        bytes.fromhex(
            "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da"
            "92728b1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585"
            "808b4831d7bc3ff4def08e4b7a9de576d26586cec64b6116"
        ),
        bytes.fromhex("1ae10b594f09e26a7e902ecbd0600691"),
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it.",
    ),
    "A.5": (
        bytes.fromhex("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"),
        bytes.fromhex("000000000102030405060708"),
        bytes.fromhex("f33388860000000000004e91"),
        bytes.fromhex(
            "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e38"
            "2d26b0bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f9"
            "82b1ff37c8559797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d"
            "46a59b5216cde7a4e99040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04"
            "b3564eea1b422273f548271a0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a1049"
            "e617d91d361094fa68f0ff77987130305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b02709b"
        ),
        bytes.fromhex("eead9d67890cbb22392336fea1851f38"),
        None,
    ),
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("chacha") / "chacha.so"
    source = str(RUNTIME / "chacha20poly1305.c")
    zig_cc(Target.load("host").link, ["-O2", "-shared", "-fPIC", source, "-o", str(path)])
    return ctypes.CDLL(str(path))


def opened(
    runtime: ctypes.CDLL, key: bytes, nonce: bytes, more: bytes, data: bytes, tag: bytes
) -> bytes | None:
    out = ctypes.create_string_buffer(b"\xee" * len(data), len(data) + 1)
    size = ctypes.c_size_t
    taken = runtime.slm_chacha_open(
        key, nonce, more, size(len(more)), data, size(len(data)), tag, out
    )
    if not taken:
        assert out.raw == b"\xee" * len(data) + b"\0"  # nothing of it is written
        return None
    return out.raw[:-1]


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_of_rfc_8439_are_opened(name: str, runtime: ctypes.CDLL) -> None:
    key, nonce, more, data, tag, plain = VECTORS[name]
    found = opened(runtime, key, nonce, more, data, tag)
    assert found == (plain or ChaCha20Poly1305(key).decrypt(nonce, data + tag, more))
    assert plain or found.startswith(b"Internet-Drafts are draft documents valid")


def test_what_openssl_encrypted_is_opened_and_no_change_of_it(runtime: ctypes.CDLL) -> None:
    rng = random.Random(8439)
    for size in (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000, 65536, 65537):
        key, nonce, more = rng.randbytes(32), rng.randbytes(12), rng.randbytes(rng.randrange(70))
        plain = rng.choice([rng.randbytes(size), b"\xff" * size, bytes(size)])
        sealed = ChaCha20Poly1305(key).encrypt(nonce, plain, more)
        data, tag = sealed[:-16], sealed[-16:]
        assert opened(runtime, key, nonce, more, data, tag) == plain
        for part in range(5):
            given = [bytearray(x) for x in (key, nonce, more, data, tag)]
            if given[part]:
                given[part][rng.randrange(len(given[part]))] ^= 1 << rng.randrange(8)
                assert opened(runtime, *map(bytes, given)) is None


def test_extreme_keys_and_data_agree_with_openssl(runtime: ctypes.CDLL) -> None:
    """Sums whose carries run through all limbs, which random data never has."""
    for fill in (0x00, 0xFF, 0xFE, 0x80):
        for size in (16, 48, 1024):
            for number in range(64):
                key, nonce = bytes([fill]) * 32, number.to_bytes(12, "little")
                more = bytes([fill ^ 0xFF]) * (number % 33)
                stream = ChaCha20Poly1305(key).encrypt(nonce, bytes(size), more)[:-16]
                # Ciphertext of all ones.
                plain = bytes(a ^ 0xFF for a in stream)
                sealed = ChaCha20Poly1305(key).encrypt(nonce, plain, more)
                assert opened(runtime, key, nonce, more, sealed[:-16], sealed[-16:]) == plain
