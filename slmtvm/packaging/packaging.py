"""Bundle to package: chooses the format, writes it beside its place and moves it there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.bundle.signature import PublicKeys, Signer
from slmtvm.errors import SlmError
from slmtvm.packaging.contents import Contents, Progress, gather, scratch_folder
from slmtvm.packaging.tarball import write_tarball

Writer = Callable[[Contents, Path, Signer | None], None]
FORMATS: dict[str, Writer] = {"tar.gz": write_tarball}


def package(
    bundle: str | Path,
    format: str,
    output: str | Path,
    *,
    target: str | None = None,
    name: str | None = None,
    license: str | None = None,
    signer: Signer | None = None,
    pub: PublicKeys | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Write ``bundle`` as a package of ``format`` for ``target`` to ``output``; returns that.

    target: one of the bundle's, by default the only one. name: the model's name on devices, by
    default that of the bundle's folder. license: the weights' own, an SPDX expression. signer:
    signs what a format has to sign besides the bundle. pub: with these keys the bundle must be
    signed. The package appears whole or not at all, and its bytes follow from the arguments.
    Raises SlmError.
    """
    if format not in FORMATS:
        raise SlmError(f"{format!r} must be one of {', '.join(FORMATS)}", where="--format")
    output = Path(output)
    opened = Bundle.open(bundle, pub)
    try:
        with scratch_folder(output) as made:
            folder = Path(made)
            contents = gather(opened, target, folder, name=name, license=license, progress=progress)
            progress(format)
            written = folder / "written"
            FORMATS[format](contents, written, signer)
            written.chmod(0o755 if written.is_dir() else 0o644)
            os.replace(written, output)
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=f"{output}") from error
    return output
