"""Files as a squashfs image, whose bytes follow from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from slmtvm.packaging.command import run
from slmtvm.packaging.file import File


def write_squashfs(files: Iterable[File], folder: Path, output: Path) -> None:
    """``files`` by their paths, all root's; ``folder`` is for a tree of them and then empty."""
    tree = folder / "tree"
    tree.mkdir()
    for file in files:
        place = tree / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.source, place)
        place.chmod(file.mode)
    for path in (tree, *tree.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    # Not by the time of now: SOURCE_DATE_EPOCH of ``run`` stands for that of all files. Weights
    # hardly shrink, and whoever maps them reads them faster so.
    run("mksquashfs", "squashfs-tools", tree, output, "-quiet", "-no-progress", "-all-root",
        "-noappend", "-no-xattrs", "-processors", "1", "-noD", "-noF")  # fmt: skip
    shutil.rmtree(tree)
