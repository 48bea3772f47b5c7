"""swupdate: an archive that hands the signed package to slm-install on the device.

https://sbabic.github.io/swupdate/sw-description.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs7

from slmtvm.errors import SlmError
from slmtvm.packaging.certificate import read_private_key
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options, given
from slmtvm.packaging.tarball import write_tarball

_SCRIPT = b"""#!/bin/sh
# SLM_INSTALL_OPTIONS are those of slm-install (--root, --keys, --health).
[ "$1" = postinst ] || exit 0
${SLM_INSTALL:-slm-install} ${SLM_INSTALL_OPTIONS:-} install %s
code=$?
rm -f %s
exit $code
"""


def write_swupdate(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The archive (cpio with checksums), its description signed as CMS.

    Raises SlmError where the Ed25519 key, the certificate or its key is missing or no such thing.
    """
    (contents,) = several
    if options.signer is None:
        raise SlmError("must be given: slm-install takes what is signed", where="--key")
    package = output.with_name("package.tar.gz")
    write_tarball(several, package, options)
    name = f"slm-{contents.name}.tar.gz"
    place = f"/var/tmp/{name}"
    script = _SCRIPT % (place.encode(), place.encode())
    digests = [hashlib.sha256(content).hexdigest() for content in (package.read_bytes(), script)]
    description = (
        "software = {\n"
        f'  version = "{contents.version}";\n'
        f'  description = "{contents.name}, counter {contents.counter}, for {contents.target}";\n'
        f'  hardware-compatibility: [ "{options.compatible or "1.0"}" ];\n'
        f'  files: ( {{ filename = "{name}"; path = "{place}"; name = "slm-{contents.name}";\n'
        f'             version = "{contents.version}"; sha256 = "{digests[0]}"; }} );\n'
        '  scripts: ( { filename = "slm-install.sh"; type = "shellscript";\n'
        f'               sha256 = "{digests[1]}"; }} );\n'
        "}\n"
    ).encode()
    signature = _sign(description, options)
    with output.open("wb") as archive:
        for number, (path, content) in enumerate(
            (
                ("sw-description", description),
                ("sw-description.sig", signature),
                (name, package.read_bytes()),
                ("slm-install.sh", script),
            ),
            1,
        ):
            archive.write(_entry(number, path, content))
        archive.write(_entry(0, "TRAILER!!!", b""))


def _sign(content: bytes, options: Options) -> bytes:
    certificate = given(options.certificate, "--certificate", "what devices trust")
    key = given(options.certificate_key, "--certificate-key", "the certificate's private key")
    try:
        signed_by = x509.load_pem_x509_certificate(certificate.read_bytes())
    except ValueError as error:
        raise SlmError("holds no certificate in PEM", where=f"{certificate}") from error
    private = read_private_key(key)
    if private.public_key() != signed_by.public_key():
        raise SlmError(f"is not the key of {certificate}", where=f"{key}")
    pieces = pkcs7.PKCS7SignatureBuilder().set_data(content)
    kinds = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.Binary,
             pkcs7.PKCS7Options.NoCapabilities]  # fmt: skip
    return pieces.add_signer(signed_by, private, hashes.SHA256()).sign(
        serialization.Encoding.DER, kinds
    )


def _entry(inode: int, name: str, content: bytes) -> bytes:
    """A file of a cpio archive of the kind "crc": the sum of its bytes goes with it."""
    path = name.encode() + b"\0"
    mode = 0o100644 if inode else 0
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path),
              sum(content) & 0xFFFFFFFF)  # fmt: skip
    head = b"070702" + b"".join(b"%08x" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
