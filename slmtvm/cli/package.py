"""Put a bundle into a package for devices."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import add_signer, signer

_FORMATS = (
    "tar.gz", "deb", "oci", "modelpack", "wheel", "image", "rauc", "swupdate", "mender", "sysext",
    "yocto", "buildroot", "greengrass", "android",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument("--format", choices=_FORMATS, default="tar.gz", help="default: tar.gz")
    parser.add_argument(
        "--target", action="append", metavar="NAME",
        help="one of the bundle's targets (default: the only one); for oci, modelpack, "
        "greengrass and android it may be given several times, and the default is all",
    )  # fmt: skip
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="the file; for wheel, sysext, yocto, buildroot, greengrass and android a folder",
    )
    parser.add_argument(
        "--name",
        dest="model_name",
        help="the model's name on devices (default: that of the bundle's folder)",
    )
    parser.add_argument(
        "--license", metavar="SPDX", help="the weights' licence, such as Apache-2.0"
    )
    parser.add_argument(
        "--maintainer", metavar="NAME", help="who answers for a deb: 'Your Name <you@example.org>'"
    )
    parser.add_argument(
        "--compatible", metavar="NAME",
        help="the devices that an update is for, as rauc, swupdate or mender name them",
    )  # fmt: skip
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE",
        help="the certificate (PEM) whose holders' updates rauc or swupdate take",
    )  # fmt: skip
    parser.add_argument(
        "--certificate-key", type=Path, metavar="FILE",
        help="its private key; of mender, the key that artifacts are signed with",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, metavar="IMAGE",
        help="the root file system, an ext4 image or a tar archive, in a copy of which image puts "
        "the model",
    )  # fmt: skip
    parser.add_argument(
        "--base", type=Path, metavar="LAYOUT",
        help="an OCI layout (a folder or an archive) whose images those of oci begin with "
        "(default: nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--pub", type=Path, action="append", metavar="FILE",
        help="public keys, by one of which the bundle must be signed",
    )  # fmt: skip
    add_signer(parser, required=False)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.bundle.signature import PublicKeys
    from slmtvm.packaging import Options, package

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        path = package(
            options.bundle,
            options.format,
            options.output,
            target=options.target,
            name=options.model_name,
            license=options.license,
            options=Options(
                signer=signer(options),
                maintainer=options.maintainer,
                certificate=options.certificate,
                certificate_key=options.certificate_key,
                compatible=options.compatible,
                into=options.into,
                base=options.base,
            ),
            pub=PublicKeys.read(options.pub) if options.pub else None,
            progress=bar.set_description_str,
        )
    if not options.quiet:
        print(f"{path}: {options.format}")
    return 0
