"""What every package holds: the bundle of one target, programs, the header, papers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.bundle.manifest import TargetEntry
from slmtvm.bundle.read import MANIFEST, SIGNATURE
from slmtvm.codegen.program import build_program
from slmtvm.errors import SlmError
from slmtvm.packaging.file import File
from slmtvm.packaging.papers import write_papers

Progress = Callable[[str], None]
# Of codegen/programs: they become slm-selftest and so on.
PROGRAMS = ("selftest", "verify", "run", "serve")
SCRIPTS = ("slm-install", "slm-mender")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Contents:
    """A package before it has a format; files of it lie in a folder that its maker removes."""

    name: str
    version: str
    counter: int
    target: str
    entry: TargetEntry
    bundle: Bundle
    license: str | None
    bundle_files: tuple[File, ...]  # under bundle/
    programs: tuple[File, ...]  # under bin/
    header: File
    papers: tuple[File, ...]  # under share/

    @property
    def files(self) -> tuple[File, ...]:
        """All files, by their paths."""
        found = (*self.bundle_files, *self.programs, self.header, *self.papers)
        return tuple(sorted(found, key=lambda file: file.path))

    @property
    def bytes(self) -> int:
        """What the files take when they are unpacked."""
        return sum(file.bytes for file in self.files)


def gather(
    bundle: Bundle,
    target: str | None,
    folder: Path,
    *,
    name: str | None = None,
    license: str | None = None,
    progress: Progress = lambda _: None,
) -> Contents:
    """The contents of a package of ``bundle`` for ``target``, the only one where None.

    ``folder``: where what is made for it lies. ``name``: the model's, by default that of the
    bundle's folder. ``license``: the weights' own, an SPDX expression. Raises BundleError where a
    file of the bundle is damaged, SlmError where ``name`` suits no package.
    """
    chosen = _target(bundle, target)
    given = name or re.sub(r"[^a-z0-9]+", "-", bundle.path.resolve().stem.lower()).strip("-")
    if not _NAME.fullmatch(given):
        raise SlmError(f"{given!r} must be lower-case letters, digits and -", where="--name")
    bundle.verify()
    release = bundle.manifest.release
    version = release.version or f"0.{release.counter}"
    bundle_files = tuple(
        File(f"bundle/{n}", bundle.path / n) for n in _bundle_names(bundle, chosen)
    )
    return Contents(
        name=given,
        version=version,
        counter=release.counter,
        target=chosen,
        entry=bundle.manifest.targets[chosen],
        bundle=bundle,
        license=license,
        bundle_files=bundle_files,
        programs=_programs(bundle, chosen, folder, progress),
        header=File("include/slm.h", _resource("runtime/slm.h", folder)),
        papers=write_papers(bundle, chosen, given, version, license, bundle_files, folder),
    )


def _target(bundle: Bundle, target: str | None) -> str:
    if target is None and len(bundle.targets) == 1:
        return bundle.targets[0]
    if target is None or target not in bundle.targets:
        what = "must be named" if target is None else f"is {target!r}, which is not there"
        raise SlmError(
            f"the target {what}: there are {', '.join(bundle.targets)}", where=f"{bundle.path}"
        )
    return target


def _bundle_names(bundle: Bundle, target: str) -> list[str]:
    """All of the bundle but libraries of other targets, and objects, which are to be linked."""
    targets = bundle.manifest.targets
    left_out = {entry.object.file for entry in targets.values()}
    left_out |= {entry.library.file for name, entry in targets.items() if name != target}
    names = {MANIFEST, *(entry.file for entry in bundle.files())} - left_out
    if (bundle.path / SIGNATURE).is_file():
        names.add(SIGNATURE)
    return sorted(names)


def _programs(bundle: Bundle, target: str, folder: Path, progress: Progress) -> tuple[File, ...]:
    made = []
    for name in PROGRAMS:
        path = folder / f"slm-{name}"
        progress(f"{path.name} for {target}")
        build_program(bundle, target, name, path, progress=progress)
        made.append(File(f"bin/{path.name}", path, program=True))
    for name in SCRIPTS:
        made.append(File(f"bin/{name}", _resource(f"programs/{name}.sh", folder), program=True))
    return tuple(made)


def _resource(name: str, folder: Path) -> Path:
    """A file of slmtvm.codegen, which may lie in an archive, in ``folder``."""
    path = folder / Path(name).name
    path.write_bytes((resources.files("slmtvm.codegen") / name).read_bytes())
    return path


def scratch_folder(output: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside ``output``, so that one disk only must have room."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".package-", dir=output.parent)
