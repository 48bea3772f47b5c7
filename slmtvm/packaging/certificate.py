"""The private keys that updaters' own formats are signed with."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from slmtvm.errors import SlmError


def read_private_key(path: Path) -> RSAPrivateKey | EllipticCurvePrivateKey:
    """The key of a PEM file; raises SlmError where it is none of RSA or ECDSA.

    The password of an encrypted one is taken from the variable SLMTVM_KEY_PASSWORD.
    """
    password = os.environ.get("SLMTVM_KEY_PASSWORD")
    try:
        key = serialization.load_pem_private_key(
            path.read_bytes(), password.encode() if password else None
        )
    except (ValueError, TypeError) as error:
        raise SlmError(
            "holds no private key in PEM, or SLMTVM_KEY_PASSWORD is not its password",
            where=f"{path}",
        ) from error
    if not isinstance(key, (RSAPrivateKey, EllipticCurvePrivateKey)):
        raise SlmError("must be a key of RSA or ECDSA: updaters take no others", where=f"{path}")
    return key
