"""rauc: a bundle in the verity format with the package as the image of a slot (rauc.io)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmtvm.errors import SlmError
from slmtvm.packaging.command import run
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options, given
from slmtvm.packaging.squashfs import write_squashfs

SLOT = "model"  # the slot's class in the device's system.conf


def write_rauc(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The bundle, signed by rauc. Its signature holds the time, all else follows from the input.

    Raises SlmError where the certificate, its key or the devices' name is not given.
    """
    (contents,) = several
    certificate = given(options.certificate, "--certificate", "what devices trust (their keyring)")
    key = given(options.certificate_key, "--certificate-key", "the certificate's private key")
    if not options.compatible:
        raise SlmError("must be given: what system.conf of devices says", where="--compatible")
    folder = output.with_name("rauc")
    folder.mkdir()
    write_squashfs(contents.files, output.parent, folder / "model.squashfs")
    (folder / "manifest.raucm").write_text(
        "[update]\n"
        f"compatible={options.compatible}\n"
        f"version={contents.version}\n"
        f"description={contents.name}, counter {contents.counter}, for {contents.target}\n\n"
        "[bundle]\n"
        "format=verity\n\n"
        f"[image.{SLOT}]\n"
        "filename=model.squashfs\n",
        encoding="utf-8",
    )
    run("rauc", "rauc", "--cert", certificate, "--key", key, "bundle", folder, output)
