"""Programs with a model's code linked in: static, against musl, so that they need no loader."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.codegen.c_runtime import C_FLAGS, kept_object, runtime_object
from slmtvm.codegen.zig import cache_folder, zig_cc
from slmtvm.errors import SlmError

_LINK_FLAGS = ("-static", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-lm")
PROGRAMS = ("run", "serve")
_SHARED = "shared_*.c"  # beside NAME_*.c; a program keeps what it calls of them

Progress = Callable[[str], None]


def build_programs(
    bundle: str | Path,
    targets: Sequence[str] | None = None,
    output: str | Path = ".",
    *,
    names: Sequence[str] = PROGRAMS,
    progress: Progress | None = None,
) -> list[Path]:
    """Link programs, ``names`` of PROGRAMS, for ``targets`` of the bundle (None: all).

    The files in the folder ``output`` are called slm-NAME.TARGET, and run where that target's
    library does; they are returned in the order of the targets. Raises BundleError where the bundle
    lacks a target, SlmError where linking fails or ``output`` cannot be written.
    """
    opened = Bundle.open(bundle)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlmError(f"cannot be made: {error.strerror}", where=f"{folder}") from error
    made = []
    for target in opened.targets if targets is None else targets:
        for name in names:
            path = folder / f"slm-{name}.{target}"
            build_program(opened, target, name, path, progress=progress)
            made.append(path)
    return made


def kept_program(
    bundle: Bundle, target: str, name: str, *, progress: Progress | None = None
) -> Path:
    """``build_program`` into the cache, unless it is there from before; where it lies.

    Raises BundleError and SlmError as ``build_program`` does.
    """
    digest = hashlib.sha256(repr((name, target, C_FLAGS, _LINK_FLAGS, version("ziglang"))).encode())
    digest.update(bundle.manifest.targets[target].object.sha256.encode())
    package = resources.files("slmtvm.codegen")
    for folder in ("runtime", "programs"):
        with resources.as_file(package / folder) as path:
            for file in sorted(path.iterdir()):
                if file.suffix in (".c", ".h"):
                    digest.update(f"{file.name} ".encode() + file.read_bytes())
    kept = cache_folder().parent / "programs" / f"slm-{name}-{digest.hexdigest()[:32]}"
    if not kept.is_file():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SlmError(f"cannot be made: {error.strerror}", where=f"{kept.parent}") from error
        build_program(bundle, target, name, kept, progress=progress)
    return kept


def build_program(
    bundle: Bundle,
    target: str,
    name: str,
    path: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Link ``codegen/programs/NAME.c`` and NAME_*.c with the code of ``target`` into ``path``.

    It reads its weights, tokenizer and manifest from a bundle that is named when it runs. Equal
    bundles give equal bytes. Raises BundleError where the bundle has no object of ``target``,
    SlmError where linking fails or ``path`` cannot be written.
    """
    model = bundle.object(target)
    arch = bundle.manifest.targets[target].arch
    triple = f"{arch}-linux-musl"
    if progress:
        progress(f"{target}: linking slm-{name}")
    package = resources.files("slmtvm.codegen")
    with (
        resources.as_file(package / "runtime") as runtime,
        resources.as_file(package / "programs") as programs,
    ):
        try:
            with tempfile.TemporaryDirectory(prefix=".program-", dir=path.parent) as made:
                folder = Path(made)
                built = runtime_object(triple, runtime, folder, progress=progress)
                sources = [programs / f"{name}.c", *sorted(programs.glob(f"{name}_*.c"))]
                if name in PROGRAMS:
                    sources += sorted(programs.glob(_SHARED))
                own = kept_object(
                    triple, f"slm-{name}", sources, folder,
                    headers=[runtime, programs], progress=progress,
                )  # fmt: skip
                zig_cc(
                    triple,
                    [
                        *C_FLAGS, "-o", path.name, str(own.absolute()), str(model.absolute()),
                        str(built.absolute()), *_LINK_FLAGS,
                    ],
                    folder=folder,
                    progress=progress,
                )  # fmt: skip
                (folder / path.name).chmod(0o755)
                (folder / path.name).replace(path)
        except OSError as error:
            raise SlmError(f"cannot be written: {error.strerror}", where=f"{path}") from error
