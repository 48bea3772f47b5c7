"""What the formats need to know besides the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmtvm.bundle.signature import Signer
from slmtvm.errors import SlmError


@dataclass(frozen=True)
class Options:
    """Each format reads what it needs, and says what is missing.

    signer: signs what a format has to sign with Ed25519 itself. maintainer: "Name <mail>", of a
    "deb". certificate, certificate_key: PEM files with which an updater's own format is signed; a
    mender artifact has no certificate. compatible: the devices that it is for, as the updater names
    them. into: the image that "image" puts the model into a copy of. base: an OCI layout, a folder
    or an archive, whose images those of "oci" begin with.
    """

    signer: Signer | None = None
    maintainer: str | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None
    compatible: str | None = None
    into: Path | None = None
    base: Path | None = None


def given(path: Path | None, option: str, what: str) -> Path:
    """``path``, absolute; raises SlmError, saying ``what`` it is for, where it is not there."""
    if path is None:
        raise SlmError(f"must be given: {what}", where=option)
    if not path.is_file():
        raise SlmError(f"no such file, which is {what}", where=f"{path}")
    return path.absolute()
