"""Keys for a farm of one's own: a certificate authority, and a certificate for each role.

    DIR/ca.key                the authority's key: whoever has it can make more; keep it offline
    DIR/tuner, DIR/tracker    folders of ca.pem, cert.pem and key.pem, for their machines
    DIR/runner                the same for boards; more by name, one for each board

A certificate's names (subjectAltName) are its role and, of a runner, its own name. So the key of a
board, which may be stolen, makes nobody a tuner.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from slmtvm.errors import RpcError

ROLES = ("tuner", "tracker", "runner")
_DAYS = 3650
_LONGEST_NAME = 64


def keygen(folder: Path, runners: list[str] | None = None) -> list[Path]:
    """Make what is missing in ``folder``: the authority, the three roles', and runners of names.

    Returns the folders that were made; those that are there stay as they are. Raises RpcError where
    ``cryptography`` is not installed or a name is none, OSError where nothing can be written.
    """
    x509, ec, serialization, hashes, oid = _cryptography()
    for name in runners or []:
        if not name.replace("-", "").isalnum() or name in ROLES[:2] or len(name) > _LONGEST_NAME:
            raise RpcError(f"{name!r} is no name for a runner: letters, digits and -")
    folder.mkdir(parents=True, exist_ok=True)
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    end = start + datetime.timedelta(days=_DAYS)

    def named(name: str) -> Any:
        return x509.Name([x509.NameAttribute(oid.NameOID.COMMON_NAME, name)])

    def builder(subject: str, key: Any) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("slmtvm farm"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )

    def pem(key: Any) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def usage(*, signs_certificates: bool) -> Any:
        return x509.KeyUsage(
            digital_signature=not signs_certificates, key_cert_sign=signs_certificates,
            crl_sign=signs_certificates, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip

    if not (folder / "ca.key").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        made = (
            builder("slmtvm farm", key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        _write_secret(folder / "ca.key", pem(key))
    authority = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    certificate = (folder / "ca.pem").read_bytes()

    written = []
    for name in [*ROLES, *(runners or [])]:
        own = folder / name
        if (own / "key.pem").exists():
            continue
        own.mkdir(mode=0o700, exist_ok=True)
        role = name if name in ROLES else "runner"
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(n) for n in dict.fromkeys((role, name))]
        uses = [oid.ExtendedKeyUsageOID.CLIENT_AUTH, oid.ExtendedKeyUsageOID.SERVER_AUTH]
        made = (
            builder(name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
                critical=False,
            )
            .sign(authority, hashes.SHA256())
        )
        (own / "ca.pem").write_bytes(certificate)
        (own / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        _write_secret(own / "key.pem", pem(key))
        written.append(own)
    return written


def role_folder(tls: Path, role: str) -> Path:
    """Of the keys of ``role``: ``tls`` itself, or the folder of that name in what keygen wrote."""
    return tls if (tls / "cert.pem").exists() else tls / role


def _cryptography() -> tuple[Any, Any, Any, Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509 import oid
    except ImportError as error:
        raise RpcError(
            "making keys needs cryptography: pip install 'slmtvm[rpc]'", where="slmtvm rpc keygen"
        ) from error
    return x509, ec, serialization, hashes, oid


def _write_secret(path: Path, content: bytes) -> None:
    """For this user's eyes only, from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
