"""Encrypting a bundle's weights; ``codegen/runtime/encrypted.c`` reads them.

The file is a header of 64 bytes and then pieces of 64 KiB, the last one shorter, each encrypted by
ChaCha20-Poly1305 (RFC 8439) with its tag behind it. The header (little endian) is an 8-byte magic,
uint32 version, uint32 bytes of a piece, uint64 bytes of the weights, a salt of 32 bytes and 8 bytes
that prove the key. The file's own key is HMAC-SHA256(key, "slmtvm weights" | salt), the nonce of a
piece its number; the header is authenticated with every piece. The salt is HMAC-SHA256(key, "slmtvm
salt" | SHA-256 of the weights): equal weights and keys give equal files, others never share a key.
"""

from __future__ import annotations

import hashlib
import hmac
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from slmtvm.bundle.build_folder import build_folder
from slmtvm.bundle.manifest import FileEntry
from slmtvm.bundle.move import move_into_place
from slmtvm.bundle.read import ENCRYPTED, MANIFEST, Bundle
from slmtvm.bundle.weights_key import KEY_BYTES
from slmtvm.errors import BundleError, SlmError

VERSION = 1
PIECE_BYTES = 1 << 16
_NONCE_BYTES = 12


def encrypt_bundle(path: str | Path, key: bytes, output: str | Path) -> Bundle:
    """Write the bundle ``path`` with its weights encrypted by ``key`` (32 bytes) to ``output``.

    What was signed is not any more: the manifest says the SHA-256 of what lies on the disk, so sign
    afterwards. Equal input gives equal bytes. Raises BundleError where the bundle is damaged or
    encrypted already or ``output`` cannot be written.
    """
    if len(key) != KEY_BYTES:
        raise SlmError(f"a key of weights has {KEY_BYTES} bytes, not {len(key)}")
    bundle, output = Bundle.open(path), Path(output)
    bundle.verify()
    if bundle.encrypted:
        raise BundleError("its weights are encrypted already", where=f"{path}")
    if output.is_symlink() or (output.exists() and not (output / MANIFEST).is_file()):
        raise BundleError(
            "exists and is not a bundle: it is left alone; choose another path", where=f"{output}"
        )
    entry = bundle.manifest.weights
    try:
        with build_folder(output) as folder:
            for item in bundle.files():
                if item != entry:
                    place = folder / item.file
                    place.parent.mkdir(exist_ok=True)
                    shutil.copy2(bundle.path / item.file, place)
            sealed = encrypt_file(bundle.path / entry.file, key, folder / entry.file)
            manifest = replace(bundle.manifest, weights=replace(sealed, file=entry.file))
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            for made in (folder, *folder.rglob("*")):
                made.chmod(0o755 if made.is_dir() or made.suffix == ".so" else 0o644)
            move_into_place(folder, output)
    except OSError as error:
        raise BundleError(f"cannot be written: {error.strerror}", where=f"{output}") from error
    return Bundle(output, manifest)


def encrypt_file(source: Path, key: bytes, output: Path) -> FileEntry:
    """``source`` encrypted into ``output``; what a manifest says of that."""
    plain = hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            plain.update(piece)
    salt = _hmac(key, b"slmtvm salt" + plain.digest())
    own = _hmac(key, b"slmtvm weights" + salt)
    size = source.stat().st_size
    header = struct.pack(
        "<8sIIQ32s8s", ENCRYPTED, VERSION, PIECE_BYTES, size, salt, _hmac(own, b"slmtvm proof")[:8]
    )
    cipher, written = ChaCha20Poly1305(own), hashlib.sha256(header)
    total = len(header)
    with source.open("rb") as file, output.open("wb") as sealed:
        sealed.write(header)
        number = 0
        while piece := file.read(PIECE_BYTES):
            nonce = number.to_bytes(_NONCE_BYTES, "little")
            part = cipher.encrypt(nonce, piece, header)
            sealed.write(part)
            written.update(part)
            total += len(part)
            number += 1
    return FileEntry(output.name, total, written.hexdigest())


def _hmac(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")
