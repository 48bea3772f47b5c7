"""What packages of updaters are made with: certificates, their tools, slm-install."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmtvm.packaging import FORMATS, Options
from slmtvm.packaging.contents import Contents
from tests.packaging.devices import Device, tool


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate as updaters trust it, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begin = datetime.datetime(2020, 1, 1)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(7).not_valid_before(begin).not_valid_after(begin.replace(year=2090))
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    files = (folder / f"{name}.pem", folder / f"{name}.key")
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return files


# What a format is made with: the program and its Debian package.
NEEDS = {
    "sysext": [("mksquashfs", "squashfs-tools"), ("veritysetup", "cryptsetup-bin")],
    "rauc": [("mksquashfs", "squashfs-tools"), ("rauc", "rauc")],
    "mender": [("mender-artifact", "mender-artifact")],
}


def write(format: str, contents: Contents, options: Options, output: Path) -> Path:
    """The package; skips where what makes it is not here."""
    for needed in NEEDS.get(format, ()):
        tool(*needed)
    output.parent.mkdir(exist_ok=True)
    FORMATS[format]([contents], output, options)
    return output


def calling(device: Device) -> dict[str, str]:
    """The environment in which an updater's script finds slm-install of ``device``."""
    return {
        **os.environ,
        "SLM_INSTALL": f"sh {device.programs / 'slm-install'}",
        "SLM_INSTALL_OPTIONS": f"--root {device.root} --keys {device.keys}",
    }
