"""Programs with a model's code linked in: static, against musl, so that they need no loader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import SlmError

_LINK_FLAGS = ("-static", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-lm")


def build_program(
    bundle: Bundle,
    target: str,
    name: str,
    path: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Link the program of ``codegen/programs/NAME.c`` with the code of ``target`` into ``path``.

    It reads its weights and manifest from a bundle that is named when it runs. Equal bundles give
    equal bytes. Raises BundleError where the bundle has no object of ``target``, SlmError where
    linking fails or ``path`` cannot be written.
    """
    model = bundle.object(target)
    arch = bundle.manifest.targets[target].arch
    triple = f"{arch}-linux-musl"
    package = resources.files("slmtvm.codegen")
    with (
        resources.as_file(package / "runtime") as runtime,
        resources.as_file(package / "programs") as programs,
    ):
        try:
            with tempfile.TemporaryDirectory(prefix=".program-", dir=path.parent) as made:
                folder = Path(made)
                built = runtime_object(triple, runtime, folder, progress=progress)
                zig_cc(
                    triple,
                    [
                        *C_FLAGS, f"-I{runtime}", f"-I{programs}", "-o", path.name,
                        str(programs / f"{name}.c"), str(model.absolute()), str(built.absolute()),
                        *_LINK_FLAGS,
                    ],
                    folder=folder,
                    progress=progress,
                )  # fmt: skip
                (folder / path.name).chmod(0o755)
                (folder / path.name).replace(path)
        except OSError as error:
            raise SlmError(f"cannot be written: {error.strerror}", where=f"{path}") from error
