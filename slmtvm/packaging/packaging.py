"""Bundle to package: chooses the format, writes it beside its place and moves it there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.bundle.signature import PublicKeys
from slmtvm.errors import SlmError
from slmtvm.packaging.android import write_android
from slmtvm.packaging.buildroot import write_buildroot
from slmtvm.packaging.contents import Contents, Progress, gather, scratch_folder
from slmtvm.packaging.deb import write_deb
from slmtvm.packaging.greengrass import write_greengrass
from slmtvm.packaging.image import write_image
from slmtvm.packaging.mender import write_mender
from slmtvm.packaging.modelpack import write_modelpack
from slmtvm.packaging.oci import write_oci
from slmtvm.packaging.options import Options
from slmtvm.packaging.rauc import write_rauc
from slmtvm.packaging.swupdate import write_swupdate
from slmtvm.packaging.sysext import write_sysext
from slmtvm.packaging.tarball import write_tarball
from slmtvm.packaging.wheel import wheel_name, write_wheel
from slmtvm.packaging.yocto import write_yocto

Writer = Callable[[Sequence[Contents], Path, Options], None]
FORMATS: dict[str, Writer] = {
    "tar.gz": write_tarball,
    "deb": write_deb,
    "oci": write_oci,
    "modelpack": write_modelpack,
    "wheel": write_wheel,
    "image": write_image,
    "rauc": write_rauc,
    "swupdate": write_swupdate,
    "mender": write_mender,
    "sysext": write_sysext,
    "yocto": write_yocto,
    "buildroot": write_buildroot,
    "greengrass": write_greengrass,
    "android": write_android,
}
NO_OPTIONS = Options()
_SEVERAL = ("oci", "modelpack", "greengrass", "android")  # take all targets of a bundle


def package(
    bundle: str | Path,
    format: str,
    output: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    name: str | None = None,
    license: str | None = None,
    options: Options = NO_OPTIONS,
    pub: PublicKeys | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Write ``bundle`` as a package of ``format`` for ``target`` to ``output``; returns its path.

    target: one of the bundle's, by default the only one; for "oci", "modelpack", "greengrass" and
    "android" one or more, by default all. output: where the package goes, for "wheel" a folder: pip
    goes by the names of such files. name: the model's name on devices, by default that of the
    bundle's folder.
    license: the weights' own, an SPDX expression. options: what the format needs besides. pub: with
    these keys the bundle must be signed. The package appears whole or not at all, and its bytes
    follow from the arguments, but for signatures of updaters' own. Raises SlmError.
    """
    if format not in FORMATS:
        raise SlmError(f"{format!r} must be one of {', '.join(FORMATS)}", where="--format")
    output = Path(output)
    opened = Bundle.open(bundle, pub)
    targets = _targets(opened, target, format)
    place = output / "wheel" if format == "wheel" else output
    try:
        with scratch_folder(place) as made:
            folder = Path(made)
            several = [
                gather(opened, one, _subfolder(folder, number), name=name, license=license,
                       progress=progress)
                for number, one in enumerate(targets)
            ]  # fmt: skip
            progress(format)
            written = folder / "written"
            FORMATS[format](several, written, options)
            written.chmod(0o755 if written.is_dir() else 0o644)
            if written.is_dir() and os.path.lexists(place):
                raise SlmError("exists, and is left alone; choose another name", where=f"{place}")
            if format == "wheel":
                place = output / wheel_name(several[0])
            os.replace(written, place)
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=f"{output}") from error
    return place


def _targets(
    bundle: Bundle, target: str | Sequence[str] | None, format: str
) -> Sequence[str | None]:
    if target is None:
        return bundle.targets if format in _SEVERAL else [None]
    given = [target] if isinstance(target, str) else list(target)
    if len(given) != 1 and format not in _SEVERAL:
        raise SlmError(f"a package of this format has one, not {len(given)}", where="--target")
    return given


def _subfolder(folder: Path, number: int) -> Path:
    made = folder / f"target-{number}"
    made.mkdir()
    return made
