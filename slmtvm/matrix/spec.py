"""matrix.toml: which models are compiled for which targets, and how."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.files import no_such_file, read_text
from slmtvm.target import Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_OPTIONS: Mapping[str, type] = {
    "context": int, "source_context": int, "kv": str, "activations": str, "mask": str,
    "sparse": str, "outputs": list, "check": bool,
}  # fmt: skip
_FILES = ("records", "tokenizer", "kv_calibration")


@dataclass(frozen=True)
class Cell:
    """A model for a target: ``options`` are those of ``slmtvm.compile``, ``files`` those of them
    that are files."""

    model: str
    path: Path
    target: str
    output: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}.{self.target}"


def read_matrix(path: str | Path, output: str | Path | None = None) -> list[Cell]:
    """The cells of a file, model by model; bundles go into the folder ``output``, by default that
    which the file names.

    Paths are from the folder of the file. Raises SlmError, naming the field, where anything is not
    as it must be, or a model or a target is missing.
    """
    path = Path(path)
    try:
        table = tomllib.loads(read_text(path, _MOST_BYTES))
    except tomllib.TOMLDecodeError as error:
        raise SlmError(f"is no TOML: {error}", where=f"{path}") from error
    unknown = table.keys() - {"model", "targets", "output", *_OPTIONS, *_FILES}
    if unknown:
        raise _wrong(path, f"{sorted(unknown)[0]!r} is no field; fields are model, targets, "
                           f"output, {', '.join((*_OPTIONS, *_FILES))}")  # fmt: skip
    folder = Path(output) if output is not None else path.parent / _text(table, "output", path, ".")
    targets = _targets(table, path)
    models = table.get("model")
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) for m in models):
        raise _wrong(path, "no [[model]] tables: each names the path of an ONNX file")
    cells = [
        cell
        for number, model in enumerate(models, 1)
        for cell in _cells(path, folder, {**table, **model}, targets, f"model {number}")
    ]
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(path, f"{name} is there twice: give the models a name of their own")
    return cells


def _cells(
    path: Path, folder: Path, table: Mapping[str, Any], targets: list[str], where: str
) -> list[Cell]:  # fmt: skip
    known = {"path", "name", "model", "targets", "output", *_OPTIONS, *_FILES}
    for name in table:
        if name not in known:
            raise _wrong(path, f"{where}: {name!r} is no field")
    if "path" not in table:
        raise _wrong(path, f"{where}: has no path")
    model = path.parent / _text(table, "path", path)
    if not model.is_file():
        raise SlmError(f"{where}: {no_such_file(model)}", where=f"{path}: {model}")
    name = _text(table, "name", path, model.stem)
    if not _NAME.fullmatch(name):
        raise _wrong(path, f"{where}: name {name!r} must be letters, digits and . _ + -")
    options = {}
    for option, type_ in _OPTIONS.items():
        if option in table:
            value = table[option]
            if type(value) is not type_:
                raise _wrong(path, f"{where}: {option} must be {type_.__name__}, not {value!r}")
            options[option] = value
    files = {option: path.parent / _text(table, option, path) for option in _FILES
             if option in table}  # fmt: skip
    return [
        Cell(name, model, target, folder / f"{name}.{Path(target).stem}.slm", options, files)
        for target in targets
    ]


def _targets(table: Mapping[str, Any], path: Path) -> list[str]:
    targets = table.get("targets", ["host"])
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise _wrong(path, "targets must be a list of names of `slmtvm targets`")
    return [Target.load(target).name for target in targets]


def _text(table: Mapping[str, Any], name: str, path: Path, default: str | None = None) -> str:
    value = table.get(name, default)
    if not isinstance(value, str):
        raise _wrong(path, f"{name} must be a string, not {value!r}")
    return value


def _wrong(path: Path, message: str) -> SlmError:
    return SlmError(message, where=f"{path}")
