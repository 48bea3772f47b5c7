"""What a model's numbers stand for: what the settings beside its ONNX file say of it.

An ONNX file names its outputs, not its labels. transformers writes them into config.json, and
sentence-transformers how rows of tokens become an embedding into modules.json and the folder of its
pooling. Files of the hub's ``onnx`` folder have these one folder up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError

TASKS = ("generate", "classify", "entities", "answer", "fill", "embed")
POOLINGS = ("mean", "weightedmean", "first", "last", "max")
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


def task_settings(model: str | Path, outputs: Collection[str] = ()) -> TaskSettings:
    """What is said beside the ONNX file ``model``, of which ``outputs`` are compiled.

    Raises InvalidModelError, naming the file, where one of them is no JSON or its labels are none.
    """
    # Whoever wants the names above needs no numpy.
    from slmtvm.embedding_modules import EMBEDDING, beside, embedding_modules, read_object

    config = beside(model, "config.json")
    fields = {} if config is None else read_object(config)
    modules = embedding_modules(model)
    left = () if EMBEDDING in outputs else modules.layers
    return TaskSettings(
        labels=() if config is None else _labels(fields, config),
        independent=fields.get("problem_type") == _INDEPENDENT,
        pooling=modules.pooling,
        normalize=modules.normalize,
        missing=(*modules.missing, *(type(layer).__name__ for layer in left)),
    )


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
