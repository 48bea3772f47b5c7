"""Tensors of a file that torch.save wrote, without torch, and without running what a pickle says.

Since torch 1.6 such a file is a zip archive: ``NAME/data.pkl`` builds tensors of storages, whose
bytes are ``NAME/data/KEY``. A pickle can name any function: here it may name those of plain tensors
alone.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


def read_torch_archive(path: Path) -> dict[str, Array]:
    """The tensors of a state_dict by name.

    Raises ValueError where the file is of another form, is damaged, or builds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_pickle_of(archive)) as file:
            found = _Unpickler(file, archive).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"is no archive of tensors that torch.save wrote: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, where tensors by name are needed")
    return {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}


def _pickle_of(archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"is an archive with {len(names)} files data.pkl, where one is needed")
    return names[0]


@dataclass(frozen=True)
class _Storage:
    dtype: npt.DTypeLike


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._folder = file.name.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name])
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Array:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        numbers = np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), storage.dtype)
        if len(numbers) != count:
            raise pickle.UnpicklingError(f"storage {key} has {len(numbers)} numbers, not {count}")
        return numbers


def _tensor(
    storage: Array, offset: int, shape: Sequence[int], strides: Sequence[int], *_: object
) -> Array:
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if min([offset, *shape, *strides]) < 0 or (0 not in shape and last >= len(storage)):
        raise pickle.UnpicklingError(f"a tensor of {list(shape)} leaves its storage")
    size = storage.itemsize
    steps = [step * size for step in strides]
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    return np.array(view)


def _parameter(tensor: Array, *_: object) -> Array:
    return tensor
