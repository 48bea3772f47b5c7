"""buildroot: a package of an external tree (BR2_EXTERNAL), its source beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options
from slmtvm.packaging.recipes import pack

_ARCHITECTURES = {"x86_64": "BR2_x86_64", "aarch64": "BR2_aarch64", "riscv64": "BR2_RISCV_64"}


def write_buildroot(several: Sequence[Contents], output: Path, options: Options) -> None:
    """A folder package/slm-NAME: Config.in, slm-NAME.mk, slm-NAME.hash and the tar.gz."""
    (contents,) = several
    output.mkdir()
    packed = pack(several, output, options)
    name = f"slm-{contents.name}"
    variable = name.upper().replace("-", "_")
    external = f"$({variable}_PKGDIR)"
    (output / "Config.in").write_text(
        f"config BR2_PACKAGE_{variable}\n"
        f'\tbool "{name}"\n'
        f"\tdepends on {_ARCHITECTURES[contents.entry.arch]}\n"
        "\thelp\n"
        f"\t  Compiled language model {contents.name} for\n"
        f"\t  {contents.target}.\n",
        encoding="utf-8",
    )
    (output / f"{name}.hash").write_text(
        "# Locally calculated\n"
        f"sha256  {packed.sha256}  {packed.file}\n"
        f"sha256  {packed.license_sha256}  share/licenses.txt\n",
        encoding="utf-8",
    )
    rule = "#" * 80
    (output / f"{name}.mk").write_text(
        f"{rule}\n#\n# {name}\n#\n{rule}\n\n"
        f"{variable}_VERSION = {contents.version}\n"
        f"{variable}_SOURCE = {packed.file}\n"
        f"{variable}_SITE = {external}\n"
        f"{variable}_SITE_METHOD = file\n"
        f"{variable}_LICENSE = {packed.license}\n"
        f"{variable}_LICENSE_FILES = share/licenses.txt\n\n"
        f"define {variable}_INSTALL_TARGET_CMDS\n"
        f"\tmkdir -p $(TARGET_DIR)/usr/lib/slm/{contents.name}\n"
        f"\tcp -R $(@D)/bin $(@D)/bundle $(@D)/include $(@D)/share \\\n"
        f"\t\t$(TARGET_DIR)/usr/lib/slm/{contents.name}/\n"
        "endef\n\n"
        "$(eval $(generic-package))\n",
        encoding="utf-8",
    )
