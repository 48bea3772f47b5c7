"""mender: an artifact whose payload is the signed package, for the update module "slm"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from slmtvm.errors import SlmError
from slmtvm.packaging.certificate import read_private_key
from slmtvm.packaging.command import run
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options, given
from slmtvm.packaging.tarball import write_tarball

MODULE = "slm"  # bin/slm-mender of packages, as /usr/share/mender/modules/v3/slm of devices


def write_mender(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The artifact, made by mender-artifact and signed by ``options.certificate_key``.

    Raises SlmError where that, the Ed25519 key or the devices' type is not given.
    """
    (contents,) = several
    if options.signer is None:
        raise SlmError("must be given: slm-install takes what is signed", where="--key")
    key = given(
        options.certificate_key, "--certificate-key", "the key that artifacts are signed by"
    )
    if not options.compatible:
        raise SlmError("must be given: the type of the devices", where="--compatible")
    payload = output.with_name(f"slm-{contents.name}.tar.gz")
    write_tarball(several, payload, options)
    made = output.with_name("made.mender")
    plain = output.with_name("key")
    _write_plain(key, plain)
    run(
        "mender-artifact", "mender-artifact", "write", "module-image", "-T", MODULE,
        "-n", f"slm-{contents.name}-{contents.version}", "-t", options.compatible,
        "-f", payload.name, "-o", made.name, "-k", plain.name,
        "--software-name", f"slm-{contents.name}", "--software-version", contents.version,
        folder=output.parent,
    )  # fmt: skip
    plain.unlink()
    made.rename(output)


def _write_plain(key: Path, output: Path) -> None:
    """The private key in the only form of PEM that mender-artifact reads; only its owner may."""
    private = read_private_key(key)
    content = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )  # fmt: skip
    output.touch(mode=0o600)
    output.write_bytes(content)
