"""Tensors of an ONNX file as numpy views; every declared size is checked before it is believed."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import SparseTensorProto, TensorProto

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.read.hub import hub_blobs

MAX_CONSTANT_BYTES = 4 << 30
_MAX_RANK = 64  # numpy's own limit

_FOUR_BITS = {TensorProto.INT4: True, TensorProto.UINT4: False}  # -> signed

_SUB_BYTE = (
    TensorProto.INT2, TensorProto.UINT2, TensorProto.FLOAT4E2M1, TensorProto.FLOAT6E2M3,
    TensorProto.FLOAT6E3M2,
)  # fmt: skip

# Where a typed tensor keeps its values when it has no raw bytes, as onnx.proto lists them.
_TYPED_FIELDS = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    **dict.fromkeys(
        (
            TensorProto.INT32,
            TensorProto.INT16,
            TensorProto.INT8,
            TensorProto.UINT16,
            TensorProto.UINT8,
            TensorProto.BOOL,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
            TensorProto.INT4,
            TensorProto.UINT4,
            TensorProto.FLOAT8E4M3FN,
            TensorProto.FLOAT8E4M3FNUZ,
            TensorProto.FLOAT8E5M2,
            TensorProto.FLOAT8E5M2FNUZ,
        ),
        "int32_data",
    ),
}


@dataclass
class TensorReader:
    """Reads the tensors of the file ``path``; keeps count of the bytes they claim."""

    path: Path
    claimed_bytes: int = 0

    def read(self, tensor: TensorProto, name: str) -> Constant:
        """The constant ``name`` that ``tensor`` holds, zero-copy for raw and external data.

        Raises InvalidModelError where dims, type and data disagree, where external data leaves the
        model's folder (but for the blobs of a hub's cache) or its file is too short, or where all
        constants together pass 4 GB.
        """
        where = f"{self.path}: tensor {name!r}"
        dims = tuple(tensor.dims)
        if any(d < 0 for d in dims) or len(dims) > _MAX_RANK:
            raise InvalidModelError(f"impossible dims {list(dims)[:8]}", where=where)
        elements = math.prod(dims)
        four_bits = tensor.data_type in _FOUR_BITS
        dtype = np.dtype(np.uint8) if four_bits else _dtype(tensor.data_type, where)
        size = (elements + 1) // 2 if four_bits else elements * dtype.itemsize
        self.claimed_bytes += size
        if self.claimed_bytes > MAX_CONSTANT_BYTES:
            raise InvalidModelError("constants add up to more than 4 GB", where=where)
        if tensor.data_location == TensorProto.EXTERNAL:
            flat = self._external(tensor, size, where).view(dtype)
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
            if len(raw) != size:
                raise InvalidModelError(
                    f"holds {len(raw)} bytes where dims {list(dims)} need {size}", where=where
                )
            flat = np.frombuffer(raw, dtype)
        else:
            flat = _typed(tensor, size // dtype.itemsize, dtype, where)
        if four_bits:
            logical = np.dtype(np.int8 if _FOUR_BITS[tensor.data_type] else np.uint8)
            return Constant(name, flat, logical, packed=dims, signed=_FOUR_BITS[tensor.data_type])
        return Constant.of(name, flat.reshape(dims))

    def read_sparse(self, sparse: SparseTensorProto) -> Constant:
        """The constant, named as its values are, that ``sparse`` lists what is not zero of.

        Raises what ``read`` does, and InvalidModelError where indices leave the tensor, do not
        ascend or are not as many as the values.
        """
        name = sparse.values.name
        where = f"{self.path}: sparse tensor {name!r}"
        dims = tuple(sparse.dims)
        if any(d < 0 for d in dims) or not 0 < len(dims) <= _MAX_RANK:
            raise InvalidModelError(f"impossible dims {list(dims)[:8]}", where=where)
        if sparse.values.data_type in _FOUR_BITS:
            raise UnsupportedOpError("sparse tensors of 4 bits are not supported", where=where)
        values = self.read(sparse.values, name).values()
        indices = self.read(sparse.indices, f"indices of {name}").values()
        elements = math.prod(dims)
        self.claimed_bytes += elements * values.itemsize
        if self.claimed_bytes > MAX_CONSTANT_BYTES:
            raise InvalidModelError("constants add up to more than 4 GB", where=where)
        if values.ndim != 1 or indices.dtype != np.int64:
            raise InvalidModelError(
                f"values have dims {list(values.shape)} and indices are {indices.dtype}; values "
                "in a row and int64 indices are needed",
                where=where,
            )
        count = len(values)
        if indices.shape == (count, len(dims)):
            if bool(((indices < 0) | (indices >= dims)).any()):
                raise InvalidModelError(f"an index lies outside of dims {list(dims)}", where=where)
            places = np.ravel_multi_index(tuple(indices.T), dims) if count else indices[:, 0]
        elif indices.shape == (count,):
            places = indices
        else:
            raise InvalidModelError(
                f"{count} values have indices of dims {list(indices.shape)}; [{count}] or "
                f"[{count}, {len(dims)}] are needed",
                where=where,
            )
        if count and (
            places[0] < 0 or places[-1] >= elements or bool((np.diff(places) <= 0).any())
        ):
            raise InvalidModelError(
                f"indices do not ascend within the {elements} elements of dims {list(dims)}",
                where=where,
            )
        whole = np.zeros(elements, values.dtype)
        whole[places] = values
        return Constant.of(name, whole.reshape(dims))

    def _external(self, tensor: TensorProto, size: int, where: str) -> Array:
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        folder = self.path.parent.resolve()
        relative = Path(location)
        if not location or relative.is_absolute() or ".." in relative.parts or "\0" in location:
            raise InvalidModelError(
                f"external data path {location!r} leaves the model's folder; it must be a name in "
                "that folder: save the model with its data beside it",
                where=where,
            )
        try:
            target = (folder / relative).resolve()
            blobs = hub_blobs(folder)
            inside = target.is_relative_to(folder) or (
                blobs is not None and target.is_relative_to(blobs)
            )
            status = target.stat() if inside else None
        except (OSError, RuntimeError) as error:
            raise InvalidModelError(
                f"external data file {location!r} cannot be read: {error}", where=where
            ) from error
        if status is None:
            raise InvalidModelError(
                f"external data path {location!r} is a link that leaves the model's folder, to "
                f"{target}; put a copy of the file in its place",
                where=where,
            )
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelError(f"external data {location!r} is not a file", where=where)
        offset = _count(entries.get("offset", "0"), "offset", where)
        length = _count(entries.get("length", str(size)), "length", where)
        if length != size:
            raise InvalidModelError(
                f"external data has length {length} where dims need {size} bytes", where=where
            )
        if offset + length > status.st_size:
            raise InvalidModelError(
                f"external data {offset}..{offset + length} is past the end of {location!r}, "
                f"which has {status.st_size} bytes",
                where=where,
            )
        if size == 0:
            return np.empty(0, np.uint8)
        return np.memmap(target, np.uint8, mode="r", offset=offset, shape=(size,))


def _count(text: str, field: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidModelError(f"external data {field} {text!r} is not a number", where=where)
    return int(text)


def _dtype(elem_type: int, where: str) -> np.dtype[Any]:
    if elem_type == TensorProto.STRING:
        raise UnsupportedOpError("string tensors are not supported", where=where)
    if elem_type in _SUB_BYTE:
        raise UnsupportedOpError(
            f"tensors of {TensorProto.DataType.Name(elem_type)} are not supported; of those with "
            "less than a byte INT4 and UINT4 are, and 2 bits in MatMulNBits",
            where=where,
        )
    if elem_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        raise UnsupportedOpError("complex tensors are not supported", where=where)
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidModelError(f"unknown element type {elem_type}", where=where) from error


def _typed(tensor: TensorProto, elements: int, dtype: np.dtype[Any], where: str) -> Array:
    field = _TYPED_FIELDS.get(tensor.data_type)
    if field is None:
        if elements:
            raise InvalidModelError(f"has no data of type {dtype}", where=where)
        return np.empty(0, dtype)
    data = getattr(tensor, field)
    if len(data) != elements:
        raise InvalidModelError(
            f"holds {len(data)} values where dims {list(tensor.dims)} need {elements}", where=where
        )
    if field != "int32_data" or dtype == np.int32:
        return np.array(data, dtype)
    wide = np.array(data, np.int64)
    if dtype == np.bool_:
        return wide != 0
    if dtype.kind in "iu":
        return wide.astype(dtype)
    bits = np.uint8 if dtype.itemsize == 1 else np.uint16
    return wide.astype(bits).view(dtype)  # small floats are stored as their bits
