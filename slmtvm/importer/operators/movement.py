"""Operators that only move elements, and those that make constants out of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.operators.elementwise import constant_attribute
from slmtvm.importer.operators.registry import Attrs, Kind, as_scalar, ints, register

_INT64 = np.dtype(np.int64)


def _int64(_dtypes: Any, _attrs: Attrs) -> Any:
    return _INT64


@register("Shape", 1, Kind.SHAPE, result=_int64)
def shape(_attrs: Attrs, x: Array) -> Any:
    return np.array(x.shape, np.int64)


@register("Shape", 15, Kind.SHAPE, result=_int64)
def shape_slice(attrs: Attrs, x: Array) -> Any:
    return np.array(x.shape[attrs.get("start", 0) : attrs.get("end", None)], np.int64)


@register("Size", 1, Kind.SHAPE, result=_int64)
def size(_attrs: Attrs, x: Array) -> Any:
    return np.array(math.prod(x.shape), np.int64)


@register("Constant", 1, Kind.GENERATE)
def constant(attrs: Attrs) -> Any:
    value = constant_attribute(attrs)
    return value.values() if isinstance(value, Constant) else value


@register("Range", 11, Kind.GENERATE, size=lambda _, x: _range_length(*x))
def arange(_attrs: Attrs, start: Array, limit: Array, delta: Array) -> Any:
    count = _range_length(start, limit, delta)
    return (as_scalar(start) + np.arange(count) * as_scalar(delta)).astype(start.dtype)


def _range_length(start: Array, limit: Array, delta: Array) -> int:
    span = as_scalar(limit) - as_scalar(start)
    return max(math.ceil(span / as_scalar(delta)), 0)


@register("ConstantOfShape", 9, Kind.GENERATE, size=lambda _, x: _volume(ints(x[0])))
def constant_of_shape(attrs: Attrs, dims: Array) -> Any:
    fill: Constant | None = attrs.get("value")
    value = np.zeros(1, np.float32) if fill is None else fill.values()
    # A view of one element: a shape is all that most users of it want.
    return np.broadcast_to(value.reshape(()), ints(dims))


def _volume(dims: Sequence[int]) -> int:
    if any(d < 0 for d in dims):
        raise ValueError(f"negative dimension in {list(dims)}")
    return math.prod(dims)


@register("EyeLike", 9, Kind.GENERATE)
def eye_like(attrs: Attrs, x: Array) -> Any:
    rows, columns = x.shape
    return np.eye(rows, columns, attrs.get("k", 0), dtype=x.dtype)


@register("Trilu", 14, Kind.GENERATE)
def trilu(attrs: Attrs, x: Array, k: Array | None = None) -> Any:
    diagonal = 0 if k is None else int(as_scalar(k))
    return np.triu(x, diagonal) if attrs.get("upper", 1) else np.tril(x, diagonal)


@register("OneHot", 9, Kind.GENERATE, size=lambda _, x: np.size(x[0]) * int(as_scalar(x[1])))
def one_hot(attrs: Attrs, indices: Array, depth: Array, values: Array) -> Any:
    classes = int(as_scalar(depth))
    hot = np.expand_dims(indices.astype(np.int64) % classes, -1) == np.arange(classes)
    return np.moveaxis(np.where(hot, values[1], values[0]), -1, attrs.get("axis", -1))


@register("NonZero", 9, Kind.GENERATE)
def non_zero(_attrs: Attrs, x: Array) -> Any:
    return np.array(np.nonzero(x), np.int64)


@register("GatherND", 12, Kind.MOVE)
def gather_nd(attrs: Attrs, x: Array, indices: Array) -> Any:
    if attrs.get("batch_dims", 0):
        raise ValueError("GatherND with batch_dims is not supported")
    return x[tuple(np.moveaxis(indices, -1, 0))]


@register("Identity", 1, Kind.MOVE)
def identity(_attrs: Attrs, x: Array) -> Any:
    return x


@register("Reshape", 5, Kind.MOVE)
def reshape(attrs: Attrs, x: Array, dims: Array) -> Any:
    keep_zero = attrs.get("allowzero", 0)
    target = [x.shape[i] if d == 0 and not keep_zero else d for i, d in enumerate(ints(dims))]
    return x.reshape(target)


@register("Flatten", 1, Kind.MOVE)
def flatten(attrs: Attrs, x: Array) -> Any:
    axis = attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@register("Transpose", 1, Kind.MOVE)
def transpose(attrs: Attrs, x: Array) -> Any:
    return x.transpose(attrs.get("perm"))


@register("Unsqueeze", 1, Kind.MOVE)
def unsqueeze_attribute(attrs: Attrs, x: Array) -> Any:
    return np.expand_dims(x, tuple(attrs["axes"]))


@register("Unsqueeze", 13, Kind.MOVE)
def unsqueeze(_attrs: Attrs, x: Array, axes: Array) -> Any:
    return np.expand_dims(x, tuple(ints(axes)))


@register("Squeeze", 1, Kind.MOVE)
def squeeze_attribute(attrs: Attrs, x: Array) -> Any:
    return np.squeeze(x, attrs.get("axes"))


@register("Squeeze", 13, Kind.MOVE)
def squeeze(_attrs: Attrs, x: Array, axes: Array | None = None) -> Any:
    return np.squeeze(x, None if axes is None else tuple(ints(axes)))


@register("Slice", 1, Kind.MOVE)
def slice_attributes(attrs: Attrs, x: Array) -> Any:
    return _slice(x, attrs["starts"], attrs["ends"], attrs.get("axes"), None)


@register("Slice", 10, Kind.MOVE)
def slice_inputs(
    _attrs: Attrs,
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Any:
    return _slice(x, starts, ends, axes, steps)


def _slice(x: Array, starts: Any, ends: Any, axes: Any, steps: Any) -> Array:
    first, last = ints(starts), ints(ends)
    along = list(range(len(first))) if axes is None else ints(axes)
    stride = [1] * len(first) if steps is None else ints(steps)
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(along, first, last, stride, strict=True):
        extent = x.shape[axis]
        if step < 0:
            # Python spells "down to the first element" as None; ONNX as anything below -extent.
            end = None if end < -extent else end  # type: ignore[assignment]
        cut[axis] = slice(start, end, step)
    return x[tuple(cut)]


@register("Concat", 4, Kind.MOVE, data=None)
def concat(attrs: Attrs, *x: Array) -> Any:
    axis = attrs["axis"]
    # An empty past may have heads of a size that its graph input does not tell.
    whole = [part for part in x if part.size or part.shape[axis]] or list(x[:1])
    return np.concatenate(whole, axis=axis)


@register("Split", 2, Kind.MOVE)
def split_attribute(attrs: Attrs, x: Array) -> Any:
    return _split(x, attrs.get("split"), attrs["num_outputs"], attrs.get("axis", 0))


@register("Split", 13, Kind.MOVE)
def split(attrs: Attrs, x: Array, parts: Array | None = None) -> Any:
    return _split(x, parts, attrs["num_outputs"], attrs.get("axis", 0))


def _split(x: Array, parts: Any, outputs: int, axis: int) -> tuple[Array, ...]:
    if parts is None:
        size = -(-x.shape[axis] // outputs)  # the last part may be smaller
        lengths = [size] * (outputs - 1) + [x.shape[axis] - size * (outputs - 1)]
    else:
        lengths = ints(parts)
    if sum(lengths) != x.shape[axis] or min(lengths) < 0:
        raise ValueError(f"parts {lengths} of an axis of {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(lengths)[:-1], axis=axis))


@register("Expand", 8, Kind.MOVE, size=lambda _, x: _volume(_expanded(x[0], x[1])))
def expand(_attrs: Attrs, x: Array, dims: Array) -> Any:
    return np.broadcast_to(x, _expanded(x, dims))


def _expanded(x: Array, dims: Array) -> tuple[int, ...]:
    return np.broadcast_shapes(x.shape, tuple(ints(dims)))


@register("Tile", 6, Kind.MOVE, size=lambda _, x: np.size(x[0]) * _volume(ints(x[1])))
def tile(_attrs: Attrs, x: Array, repeats: Array) -> Any:
    return np.tile(x, ints(repeats))


def _gathered(attrs: Attrs, x: Sequence[Array]) -> int:
    axis = attrs.get("axis", 0)
    return int(np.size(x[0]) // max(x[0].shape[axis], 1) * np.size(x[1]))


@register("Gather", 1, Kind.MOVE, size=_gathered)
def gather(attrs: Attrs, x: Array, indices: Array) -> Any:
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices are {indices.dtype}")
    axis = attrs.get("axis", 0)
    run = _consecutive(indices)
    if run is not None and axis == 0 and run[1] <= x.shape[0]:
        return x[run[0] : run[1]].reshape(indices.shape + x.shape[1:])
    return np.take(x, indices, axis=axis)


def _consecutive(indices: Array) -> tuple[int, int] | None:
    """(first, last + 1) where indices count up one by one: then the rows are a view, not a copy."""
    flat = indices.reshape(-1)
    if flat.size < 2 or flat[0] < 0 or flat[-1] - flat[0] != flat.size - 1:
        return None
    return (int(flat[0]), int(flat[-1]) + 1) if (np.diff(flat) == 1).all() else None


@register("GatherElements", 11, Kind.MOVE)
def gather_elements(attrs: Attrs, x: Array, indices: Array) -> Any:
    return np.take_along_axis(x, indices, axis=attrs.get("axis", 0))


def _padded_shape(attrs: Attrs, shapes: Sequence[Any], constants: Sequence[Any]) -> Any:
    values = [None if c is None else c.values() for c in constants]
    if len(values) > 1 and values[1] is None:
        raise ValueError("it pads by a number that depends on the tokens")
    return [pad_of(attrs, np.broadcast_to(np.uint8(0), shapes[0]), *values[1:]).shape]


def pad_of(
    attrs: Attrs,
    x: Array,
    pads: Array | None = None,
    fill: Array | None = None,
    axes: Array | None = None,
) -> Array:
    """``x`` with what Pad puts around it; negative pads cut off."""
    mode = attrs.get("mode", "constant")
    around = ints(attrs["pads"] if pads is None else pads)
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in ints(axes)]
    widths = [(0, 0)] * x.ndim
    cut = [slice(None)] * x.ndim
    for i, axis in enumerate(along):
        before, after = around[i], around[len(along) + i]
        widths[axis] = (max(before, 0), max(after, 0))
        cut[axis] = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
    if mode != "constant":
        return np.pad(x[tuple(cut)], widths, mode=mode)
    value = attrs.get("value", 0) if fill is None or not fill.size else as_scalar(fill)
    return np.pad(x[tuple(cut)], widths, constant_values=value)


# No movement: what is padded is of no token, and is known to vanish where attention is written out.
@register("Pad", 2, Kind.GENERATE, shapes=_padded_shape)
def pad_attribute(attrs: Attrs, x: Array) -> Any:
    return pad_of(attrs, x)


@register("Pad", 11, Kind.GENERATE, shapes=_padded_shape)
def pad(
    attrs: Attrs, x: Array, pads: Array, fill: Array | None = None, axes: Array | None = None
) -> Any:
    return pad_of(attrs, x, pads, fill, axes)
