"""What a sentence-transformer does to rows of tokens behind its graph: modules.json, its folders.

Its ONNX file ends with rows of tokens. Behind it come a pooling and often dense layers, norms and a
division by the length, each with its settings and its weights in a folder: model.safetensors, or
pytorch_model.bin in older ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from slmtvm.errors import InvalidModelError
from slmtvm.torch_archive import read_torch_archive

Array = npt.NDArray[np.float32]

EMBEDDING = "sentence_embedding"  # what the output is called
ROWS = ("token_embeddings", "last_hidden_state")  # what they read, the first that a file has
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")  # torch's, of dense layers
_READERS: dict[str, Callable[[Path], dict[str, npt.NDArray[Any]]]] = {
    "model.safetensors": load_file,
    "pytorch_model.bin": read_torch_archive,
}
_EPS = 1e-5  # of torch's layer norms
# Of 1_Pooling/config.json, in the order in which one is taken.
_POOLING_FIELDS = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, eq=False)
class Dense:
    """``activation(x @ weight.T + bias)``; weight float32 (out, in), bias (out,)."""

    weight: Array
    bias: Array
    activation: str  # one of ACTIVATIONS


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """weight and bias float32 (features,)."""

    weight: Array
    bias: Array
    eps: float = _EPS


@dataclass(frozen=True)
class Modules:
    """``pooling``: one of ``task.POOLINGS``, "" for none of them or several; ``layers`` after it in
    order; ``normalize``: the embedding's length is made 1. ``missing``: the kinds of others, which
    nobody applies here."""

    pooling: str = ""
    layers: tuple[Dense | LayerNorm, ...] = ()
    normalize: bool = False
    missing: tuple[str, ...] = ()

    @property
    def compiled(self) -> bool:
        """Whether they become part of what is compiled: layers need their weights with them."""
        return bool(self.layers and self.pooling and not self.missing)


def embedding_modules(model: str | Path) -> Modules:
    """The modules beside the ONNX file ``model``, or above its folder ``onnx``.

    Raises InvalidModelError, naming the file, for one that is damaged or contradicts the others.
    """
    path = beside(model, "modules.json")
    pooling, normalize = "", False
    layers: list[Dense | LayerNorm] = []
    missing: list[str] = []
    for kind, folder in () if path is None else _entries(path):
        if kind == "Pooling":
            pooling = _pooling(folder / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind in ("Dense", "LayerNorm"):
            layer = None if normalize else _layer(kind, folder)
            if layer is None:
                missing.append(kind)
            else:
                layers.append(layer)
        elif kind not in ("Transformer", "Dropout"):
            missing.append(kind)
    return Modules(pooling, tuple(layers), normalize, tuple(missing))


def beside(model: str | Path, name: str) -> Path | None:
    """The file of this name beside ``model``, or above a folder that is called onnx."""
    folder = Path(model).parent
    folders = [folder, folder.parent] if folder.name == "onnx" else [folder]
    return next((f / name for f in folders if (f / name).is_file()), None)


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises InvalidModelError naming it where that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"is no JSON: {error}; mend it, or take it out of the model's folder", where=str(path)
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where it holds something else."""
    fields = read_json(path)
    return fields if isinstance(fields, dict) else {}


def _entries(path: Path) -> Iterator[tuple[str, Path]]:
    """The kinds of modules and their folders."""
    entries = read_json(path)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            kind, folder = str(entry.get("type", "")), str(entry.get("path", ""))
            yield kind.rpartition(".")[2], path.parent / folder


def _pooling(path: Path) -> str:
    """The pooling that a file asks for; "" for one that is none of them, or several at once."""
    fields = read_object(path) if path.is_file() else {}
    asked = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value]
    return _POOLING_FIELDS.get(asked[0], "") if len(asked) == 1 else ""


def _layer(kind: str, folder: Path) -> Dense | LayerNorm | None:
    """A layer; None where its weights are in another form, or its activation is another one."""
    settings = folder / "config.json"
    path = next((folder / name for name in _READERS if (folder / name).is_file()), None)
    if path is None or not settings.is_file():
        return None
    fields, name = read_object(settings), "linear" if kind == "Dense" else "norm"
    try:
        found = _READERS[path.name](path)
        tensors = {key: value.astype(np.float32) for key, value in found.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidModelError(
            f"cannot be read: {error}; download it again", where=str(path)
        ) from error
    weight = tensors.get(f"{name}.weight")
    rank = 2 if kind == "Dense" else 1
    if weight is None or weight.ndim != rank or not weight.size:
        names = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
        raise InvalidModelError(
            f"holds {names or 'nothing'}, where {name}.weight of {rank} dimensions is needed",
            where=str(path),
        )
    bias = tensors.get(f"{name}.bias", np.zeros(len(weight), np.float32))
    if bias.shape != (len(weight),):
        raise InvalidModelError(
            f"{name}.bias has shape {list(bias.shape)}, where [{len(weight)}] is needed",
            where=str(path),
        )
    if kind == "LayerNorm":
        return LayerNorm(weight, bias)
    activation = str(fields.get("activation_function", "")).rpartition(".")[2] or "Tanh"
    return Dense(weight, bias, activation) if activation in ACTIVATIONS else None
