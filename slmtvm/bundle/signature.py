"""Ed25519 keys and signatures (RFC 8032) of manifests and packages.

A signature is a file of 64 bytes beside what it signs, made over that file's bytes: ``openssl
pkeyutl -verify -rawin`` checks it without anything of slmtvm.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from slmtvm.errors import SignatureError, SlmError
from slmtvm.files import read_file

SIGNATURE_BYTES = 64
_MAX_PEM_BYTES = 1 << 16
_BEGIN = b"-----BEGIN PUBLIC KEY-----"
_END = b"-----END PUBLIC KEY-----"
_COMMAND_SECONDS = 300  # somebody may have to press a token's button

Signer = Callable[[bytes], bytes]  # what is signed -> its signature, 64 bytes


@dataclass(frozen=True)
class PublicKeys:
    """The Ed25519 public keys that are trusted; ``pem`` has all of them, as C takes them."""

    keys: tuple[Ed25519PublicKey, ...]
    pem: str

    @staticmethod
    def read(files: str | Path | Sequence[str | Path]) -> PublicKeys:
        """The keys of PEM ``files``, one or more in each; SlmError where one is something else."""
        given = [files] if isinstance(files, (str, Path)) else list(files)
        keys: list[Ed25519PublicKey] = []
        for file in given:
            keys += _parse_public(read_file(file, _MAX_PEM_BYTES), f"{file}")
        if not keys:
            raise SlmError("no public key is given: nothing can be trusted", where="pub")
        return PublicKeys(tuple(keys), "".join(map(_public_pem, keys)))

    def check(self, content: bytes, signature: Path, where: str) -> None:
        """SignatureError unless the file ``signature`` signs ``content``; ``where`` names that."""
        if not signature.exists():
            raise SignatureError("no such file: this is not signed", where=f"{signature}")
        signed = read_file(signature, SIGNATURE_BYTES, SignatureError)
        if len(signed) != SIGNATURE_BYTES:
            raise SignatureError(
                f"{len(signed)} bytes; an Ed25519 signature has {SIGNATURE_BYTES}",
                where=f"{signature}",
            )
        if not any(_signs(key, signed, content) for key in self.keys):
            count = f"the {len(self.keys)} public keys" if len(self.keys) > 1 else "the public key"
            raise SignatureError(
                f"not signed by {count} that {'are' if len(self.keys) > 1 else 'is'} trusted, or "
                "changed since",
                where=where,
            )


def generate_keys(private: Path, public: Path) -> None:
    """Write a new private key, which only its owner may read, and its public key, both in PEM.

    Raises SlmError where one of the files is there already or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    if os.path.lexists(public):
        raise SlmError("exists, and is left alone; choose another name", where=f"{public}")
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, _public_pem(key.public_key()).encode(), 0o644)
    except SlmError:
        private.unlink()
        raise


def key_signer(file: str | Path) -> Signer:
    """Signs with the private key of a PEM ``file``; SlmError where it is none of Ed25519."""
    content = read_file(file, _MAX_PEM_BYTES)
    password = os.environ.get("SLMTVM_KEY_PASSWORD")
    try:
        key = serialization.load_pem_private_key(content, password.encode() if password else None)
    except TypeError as error:
        raise SlmError(
            "is encrypted: its password is taken from the variable SLMTVM_KEY_PASSWORD"
            if password is None
            else "is not encrypted, but SLMTVM_KEY_PASSWORD is set; unset it",
            where=f"{file}",
        ) from error
    except ValueError as error:
        raise SlmError(
            "holds no private key in PEM, or SLMTVM_KEY_PASSWORD is not its password",
            where=f"{file}",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SlmError("is no Ed25519 key; `slmtvm keygen` makes one", where=f"{file}")
    return key.sign


def command_signer(command: str) -> Signer:
    """Signs by a shell ``command``, such as one that asks a hardware token.

    ``{}`` in it stands for a file with the bytes to sign; it writes the signature, 64 bytes, to its
    standard output. SlmError where it fails or writes something else.
    """
    if "{}" not in command:
        raise SlmError("must have {}, the file to sign, in it", where="--sign-with")

    def sign(content: bytes) -> bytes:
        with tempfile.NamedTemporaryFile(prefix="slmtvm-sign-") as file:
            file.write(content)
            file.flush()
            try:
                done = subprocess.run(
                    command.replace("{}", shlex.quote(file.name)),
                    shell=True, stdin=subprocess.DEVNULL, capture_output=True,
                    timeout=_COMMAND_SECONDS,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise SlmError(
                    f"no signature after {_COMMAND_SECONDS} seconds", where=command
                ) from error
        if done.returncode != 0 or len(done.stdout) != SIGNATURE_BYTES:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise SlmError(
                f"exit code {done.returncode} and {len(done.stdout)} bytes on standard output, "
                f"where {SIGNATURE_BYTES} of a signature were to be"
                + (f": {words[-1]}" if words else ""),
                where=command,
            )
        return done.stdout

    return sign


def _parse_public(content: bytes, where: str) -> list[Ed25519PublicKey]:
    keys: list[Ed25519PublicKey] = []
    for block in content.split(_BEGIN)[1:]:
        try:
            pem = _BEGIN + block.partition(_END)[0] + _END + b"\n"
            key = serialization.load_pem_public_key(pem)
        except ValueError as error:
            raise SlmError("holds a damaged public key", where=where) from error
        if not isinstance(key, Ed25519PublicKey):
            raise SlmError("holds a public key that is not one of Ed25519", where=where)
        keys.append(key)
    if not keys:
        raise SlmError("holds no public key in PEM", where=where)
    return keys


def _public_pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def _signs(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise SlmError("exists, and is left alone; choose another name", where=f"{path}") from error
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=f"{path}") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise SlmError(f"cannot be written: {error.strerror}", where=f"{path}") from error
