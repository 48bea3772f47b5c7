"""What a model's numbers stand for: what the settings beside its ONNX file say of it.

An ONNX file names its outputs, not its labels. transformers writes them into config.json, and
sentence-transformers how rows of tokens become an embedding into modules.json and the folder of its
pooling. Files of the hub's ``onnx`` folder have these one folder up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError

TASKS = ("generate", "classify", "entities", "answer", "fill", "embed")
POOLINGS = ("mean", "first", "last", "max")
# Of 1_Pooling/config.json, in the order in which one is taken.
_POOLING_FIELDS = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_INDEPENDENT = "multi_label_classification"


@dataclass(frozen=True)
class TaskSettings:
    """What is said beside a model; empty where it is not.

    ``labels``: by number, of a classifier or a tagger. ``independent``: each holds or not, whatever
    the others do. ``pooling``: how rows of tokens become an embedding, one of POOLINGS, where the
    graph does not do it; ``normalize``: its length is made 1. ``missing``: what else is done to it,
    and nobody does here.
    """

    labels: tuple[str, ...] = ()
    independent: bool = False
    pooling: str = ""
    normalize: bool = False
    missing: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
        }  # fmt: skip


def task_settings(model: str | Path) -> TaskSettings:
    """What is said beside the ONNX file ``model``.

    Raises InvalidModelError, naming the file, where one of them is no JSON or its labels are none.
    """
    config = _first(model, "config.json")
    fields = {} if config is None else _object(config)
    modules = _first(model, "modules.json")
    pooling, normalize, missing = "", False, []
    for kind, folder in () if modules is None else _modules(modules):
        if kind == "Pooling":
            pooling = _pooling(folder / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            missing.append(kind)
    return TaskSettings(
        labels=() if config is None else _labels(fields, config),
        independent=fields.get("problem_type") == _INDEPENDENT,
        pooling=pooling,
        normalize=normalize,
        missing=tuple(missing),
    )


def _first(model: str | Path, name: str) -> Path | None:
    """The file of this name beside ``model``, or above a folder that is called onnx."""
    folder = Path(model).parent
    folders = [folder, folder.parent] if folder.name == "onnx" else [folder]
    return next((f / name for f in folders if (f / name).is_file()), None)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"is no JSON: {error}; mend it, or take it out of the model's folder", where=str(path)
        ) from error


def _object(path: Path) -> dict[str, Any]:
    fields = _read(path)
    return fields if isinstance(fields, dict) else {}


def _labels(fields: dict[str, Any], path: Path) -> tuple[str, ...]:
    given = fields.get("id2label")
    if not isinstance(given, dict):
        return ()
    names = {str(number): name for number, name in given.items()}
    labels = [names.get(str(number)) for number in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise InvalidModelError(
            f"id2label must name labels 0 to {len(names) - 1}: mend it, or take the file out of "
            "the model's folder",
            where=str(path),
        )
    return tuple(str(label) for label in labels)


def _modules(path: Path) -> Iterator[tuple[str, Path]]:
    """The kinds of a sentence-transformer's modules and their folders."""
    entries = _read(path)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            kind, folder = str(entry.get("type", "")), str(entry.get("path", ""))
            yield kind.rpartition(".")[2], path.parent / folder


def _pooling(path: Path) -> str:
    """The pooling that a file asks for; "" for one that is none of POOLINGS, or several at once."""
    fields = _object(path) if path.is_file() else {}
    asked = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value]
    return _POOLING_FIELDS.get(asked[0], "") if len(asked) == 1 else ""
