"""Cells on a Ray cluster: their files travel there, their bundles back.

Nodes share no folder with this machine; they have the same slmtvm, and the same Ray and Python.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmtvm.bundle.move import move_into_place
from slmtvm.cluster import connected, first_line
from slmtvm.errors import SlmError
from slmtvm.matrix.cell import run_cell
from slmtvm.matrix.result import CellResult
from slmtvm.matrix.spec import Cell

_FOLDER_BYTES = 8 << 30
Files = Mapping[str, bytes]


def run_on_cluster(cells: Sequence[Cell], address: str) -> Iterator[CellResult]:
    """Results as they come; raises SlmError where the cluster cannot be reached."""
    with connected(address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=2)(compile_files)
        sent = {path: ray.put(_files_beside(path)) for path in {cell.path for cell in cells}}
        running = {}
        for cell in cells:
            files = {option: path.read_bytes() for option, path in cell.files.items()}
            running[remote.remote(cell, sent[cell.path], files)] = cell
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            yield _result(ray, cell, done)


def compile_files(
    cell: Cell, model: Files, files: Files
) -> tuple[CellResult, dict[str, bytes]]:  # fmt: skip
    """On a node: the result, and the files of the bundle by their paths within it."""
    with tempfile.TemporaryDirectory(prefix="slmtvm-cell-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        for file, content in model.items():
            (folder / "model" / file).write_bytes(content)
        for option, content in files.items():
            (folder / f"{option}{cell.files[option].suffix}").write_bytes(content)
        here = replace(
            cell,
            path=folder / "model" / cell.path.name,
            output=folder / "made.slm",
            files={o: folder / f"{o}{p.suffix}" for o, p in cell.files.items()},
        )
        result = run_cell(here)
        made = {
            str(item.relative_to(here.output)): item.read_bytes()
            for item in here.output.rglob("*")
            if item.is_file()
        }
        return result, made


def _result(ray: Any, cell: Cell, done: Any) -> CellResult:
    """What came back of a cell, its bundle in place."""
    try:
        result, made = ray.get(done)
        if result.error is None:
            _put(cell.output, made)
    except (ray.exceptions.RayError, OSError) as error:
        return CellResult(cell.model, cell.target, str(cell.output), 0.0, error=first_line(error))
    return replace(result, bundle=str(cell.output))


def _put(output: Path, made: Files) -> None:
    """Write a bundle, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name, content in made.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755 if path.suffix == ".so" else 0o644)
        for item in (folder, folder / "lib"):
            item.chmod(0o755)
        move_into_place(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _files_beside(model: Path) -> dict[str, bytes]:
    """A model's file and what may belong to it: all in its folder but other models."""
    found = {}
    total = 0
    for item in sorted(model.parent.iterdir()):
        other = item.suffix == ".onnx" and item.name not in (model.name, "encoder_model.onnx")
        if not item.is_file() or other:
            continue
        total += item.stat().st_size
        if total > _FOLDER_BYTES:
            raise SlmError(
                "holds more than 8 GiB, which would all be sent: put the model into a folder of "
                "its own",
                where=f"{model.parent}",
            )
        found[item.name] = item.read_bytes()
    return found
