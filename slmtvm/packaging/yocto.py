"""yocto: a recipe with its source, to be put into a layer (recipes-*/slm-NAME)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options
from slmtvm.packaging.recipes import pack

_HOSTS = {"x86_64": "x86_64.*-linux", "aarch64": "aarch64.*-linux", "riscv64": "riscv64.*-linux"}


def write_yocto(several: Sequence[Contents], output: Path, options: Options) -> None:
    """A folder: slm-NAME_VERSION.bb, and files/ with the package that it unpacks."""
    (contents,) = several
    (output / "files").mkdir(parents=True)
    packed = pack(several, output / "files", options)
    name = f"slm-{contents.name}"
    terms = packed.license.replace(" AND ", " & ").replace(" OR ", " | ")
    (output / f"{name}_{contents.version}.bb").write_text(
        f'SUMMARY = "Compiled language model {contents.name}"\n'
        f'DESCRIPTION = "{contents.name} for {contents.target}, counter {contents.counter}"\n'
        "# Where the model comes from, which is not known here: a .bbappend may say it.\n"
        'HOMEPAGE ?= "https://example.org/"\n'
        'SECTION = "libs"\n'
        f'LICENSE = "{terms}"\n'
        f'LIC_FILES_CHKSUM = "file://share/licenses.txt;md5={packed.license_md5}"\n\n'
        f'SRC_URI = "file://{packed.file}"\n'
        f'SRC_URI[sha256sum] = "{packed.sha256}"\n'
        f'S = "${{WORKDIR}}/{packed.folder}"\n\n'
        f'COMPATIBLE_HOST = "{_HOSTS[contents.entry.arch]}"\n\n'
        "do_configure[noexec] = \"1\"\n"
        "do_compile[noexec] = \"1\"\n\n"
        "do_install() {\n"
        f"    install -d ${{D}}${{libdir}}/slm/{contents.name}\n"
        "    cp -R --no-preserve=ownership \\\n"
        "        ${S}/bin ${S}/bundle ${S}/include ${S}/share \\\n"
        f"        ${{D}}${{libdir}}/slm/{contents.name}/\n"
        "}\n\n"
        f'FILES:${{PN}} += "${{libdir}}/slm/{contents.name}"\n'
        '# They are linked and stripped, and must stay the bytes that were signed.\n'
        'INHIBIT_PACKAGE_DEBUG_SPLIT = "1"\n'
        'INHIBIT_PACKAGE_STRIP = "1"\n'
        'INHIBIT_SYSROOT_STRIP = "1"\n', encoding="utf-8"
    )  # fmt: skip
