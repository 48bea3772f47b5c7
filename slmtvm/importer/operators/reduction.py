"""Operators that combine elements along axes: reductions, softmax, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.operators.registry import FLOAT, INT, Attrs, Kind, as_scalar, ints, register

_Axes = tuple[tuple[int, ...], bool | None]


def _reduce_axes(attrs: Attrs, inputs: Sequence[Any], rank: int) -> _Axes:
    """Axes of Reduce*: an attribute until opset 13 or 18, an optional input from then on."""
    given = attrs.get("axes")
    if given is None and len(inputs) > 1 and inputs[1] is not None:
        given = ints(inputs[1])
    keep = bool(attrs.get("keepdims", 1))
    if given is None or len(given) == 0:
        nothing = attrs.get("noop_with_empty_axes", 0)
        return ((), keep) if nothing else (tuple(range(rank)), keep)
    return _normalized(given, rank), keep


def _normalized(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(f"axes {list(axes)} of a value of rank {rank}")
    return tuple(sorted({a % rank for a in axes}))


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceL1": lambda x, **k: np.sum(np.abs(x), **k),
    "ReduceL2": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "ReduceMax": np.max,
    "ReduceMean": np.mean,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
    "ReduceSumSquare": lambda x, **k: np.sum(x * x, **k),
}


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(attrs: Attrs, x: Array, axes: Array | None = None) -> Any:
        along, keep = _reduce_axes(attrs, (x, axes), x.ndim)
        # numpy would widen sums of small integers
        return function(x, axis=along, keepdims=bool(keep)).astype(x.dtype) if along else x

    return evaluate


for _name, _function in _REDUCTIONS.items():
    register(_name, 1, Kind.REDUCE, axes=_reduce_axes)(_reduce(_function))


def _along(default: int) -> Callable[[Attrs, Sequence[Any], int], _Axes]:
    def axes(attrs: Attrs, _inputs: Sequence[Any], rank: int) -> _Axes:
        return _normalized([attrs.get("axis", default)], rank), None

    return axes


def _trailing(default: int) -> Callable[[Attrs, Sequence[Any], int], _Axes]:
    def axes(attrs: Attrs, _inputs: Sequence[Any], rank: int) -> _Axes:
        (first,) = _normalized([attrs.get("axis", default)], rank)
        return tuple(range(first, rank)), None

    return axes


def softmax_over(x: Array, axes: tuple[int, ...]) -> Array:
    shifted = np.exp(x - np.max(x, axis=axes, keepdims=True))
    return np.asarray(shifted / np.sum(shifted, axis=axes, keepdims=True))


@register("Softmax", 1, Kind.REDUCE, axes=_trailing(1))
def softmax_flattened(attrs: Attrs, x: Array) -> Any:
    """Before version 13: over all axes from ``axis`` on, together."""
    return softmax_over(x, tuple(range(attrs.get("axis", 1) % x.ndim, x.ndim)))


@register("Softmax", 13, Kind.REDUCE, axes=_along(-1))
def softmax(attrs: Attrs, x: Array) -> Any:
    return softmax_over(x, (attrs.get("axis", -1),))


@register("LogSoftmax", 13, Kind.REDUCE, axes=_along(-1))
def log_softmax(attrs: Attrs, x: Array) -> Any:
    return np.log(softmax_over(x, (attrs.get("axis", -1),)))


@register("CumSum", 11, Kind.GENERATE)
def cumsum(attrs: Attrs, x: Array, axis: Array) -> Any:
    along = int(as_scalar(axis))
    source = np.flip(x, along) if attrs.get("reverse", 0) else x
    sums = np.cumsum(source, axis=along, dtype=x.dtype)
    if attrs.get("exclusive", 0):
        sums = sums - source
    return np.flip(sums, along) if attrs.get("reverse", 0) else sums


@register("ArgMax", 1, Kind.GENERATE)
def arg_max(attrs: Attrs, x: Array) -> Any:
    axis = attrs.get("axis", 0) % x.ndim
    if attrs.get("select_last_index", 0):
        places = x.shape[axis] - 1 - np.argmax(np.flip(x, axis), axis=axis, keepdims=True)
    else:
        places = np.argmax(x, axis=axis, keepdims=True)
    return np.asarray(places if attrs.get("keepdims", 1) else places.squeeze(axis), np.int64)


_NORM = {"axis": (INT, False), "epsilon": (FLOAT, False), "stash_type": (INT, False)}


@register("LayerNormalization", 1, Kind.REDUCE, axes=_trailing(-1), arity=(2, 3), attributes=_NORM)
def layer_normalization(attrs: Attrs, x: Array, scale: Array, bias: Array | None = None) -> Any:
    """Registered from version 1 on too: onnxruntime takes it in every operator set."""
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    result = centred / np.sqrt(variance + attrs.get("epsilon", 1e-5)) * scale
    return result if bias is None else result + bias


@register(
    "SimplifiedLayerNormalization",
    1,
    Kind.REDUCE,
    axes=_trailing(-1),
    arity=(2, 2),
    attributes=_NORM,
)
@register("RMSNormalization", 23, Kind.REDUCE, axes=_trailing(-1))
def rms_normalization(attrs: Attrs, x: Array, scale: Array) -> Any:
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    square = np.mean(x * x, axis=axes, keepdims=True)
    return x / np.sqrt(square + attrs.get("epsilon", 1e-5)) * scale


@register("LpNormalization", 1, Kind.REDUCE, axes=_along(-1))
def lp_normalization(attrs: Attrs, x: Array) -> Any:
    axis, p = attrs.get("axis", -1), attrs.get("p", 2)
    size = np.abs(x) if p == 1 else x * x
    total = np.sum(size, axis=axis, keepdims=True)
    return x / (total if p == 1 else np.sqrt(total))
