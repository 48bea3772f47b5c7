"""sysext: a system extension, an image that systemd lays over /usr (systemd-sysext(8))."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from slmtvm.packaging.command import run
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.options import Options
from slmtvm.packaging.service import INSTALLERS, placed, service_unit
from slmtvm.packaging.squashfs import write_squashfs

_ARCHITECTURES = {"x86_64": "x86-64", "aarch64": "arm64", "riscv64": "riscv64"}  # systemd's names
_BLOCK = 4096  # bytes


def write_sysext(several: Sequence[Contents], output: Path, options: Options) -> None:
    """A folder: slm-NAME.raw (squashfs), .verity with its hash tree, .roothash with that's root.

    systemd takes the last two from beside the first, and the kernel then checks each block that is
    read; who trusts the root hash trusts the image.
    """
    (contents,) = several
    name = f"slm-{contents.name}"
    folder = output.parent
    made = {
        f"usr/lib/extension-release.d/extension-release.{name}": (
            f"ID=_any\nARCHITECTURE={_ARCHITECTURES[contents.entry.arch]}\n"
            f"SYSEXT_ID={name}\nSYSEXT_VERSION_ID={contents.version}\n"
        ).encode(),
        f"usr/lib/systemd/system/{name}.service": service_unit(contents, name),
    }
    files = [placed(f, contents.name) for f in contents.files if f.path not in INSTALLERS]
    for number, (path, content) in enumerate(made.items()):
        source = folder / f"sysext-{number}"
        source.write_bytes(content)
        files.append(File(path, source))
    output.mkdir()
    image, tree = output / f"{name}.raw", output / f"{name}.verity"
    write_squashfs(files, folder, image)
    salt = hashlib.sha256(image.read_bytes()).hexdigest()  # so that equal images have equal trees
    said = run(
        "veritysetup", "cryptsetup-bin", "format", image, tree, f"--salt={salt}",
        f"--uuid={salt[:8]}-{salt[8:12]}-{salt[12:16]}-{salt[16:20]}-{salt[20:32]}",
        f"--data-block-size={_BLOCK}", f"--hash-block-size={_BLOCK}",
    )  # fmt: skip
    root = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash:"))
    (output / f"{name}.roothash").write_text(root + "\n", encoding="utf-8")
