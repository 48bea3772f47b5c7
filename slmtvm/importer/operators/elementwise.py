"""Operators that compute each element on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx

from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.operators.registry import Attrs, Kind, register

_erf = np.vectorize(math.erf, otypes=[np.float64])


def erf(x: Array) -> Array:
    """The error function, in the dtype of ``x``."""
    return np.asarray(_erf(x) if x.size else x).astype(x.dtype)


def sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))  # never overflows, and is exact at both ends
    return np.asarray(np.where(x < 0, small, 1) / (1 + small)).astype(x.dtype, copy=False)


def softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(np.zeros_like(x), x))


def gelu_erf(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))))


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _bool(_dtypes: Any, _attrs: Attrs) -> Any:
    return np.dtype(np.bool_)


_UNARY: dict[str, tuple[int, Callable[[Array], Any]]] = {
    "Abs": (6, np.abs),
    "Ceil": (6, np.ceil),
    "Cos": (7, np.cos),
    "Erf": (9, erf),
    "Exp": (6, np.exp),
    "Floor": (6, np.floor),
    "HardSwish": (14, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Log": (6, np.log),
    "Mish": (18, lambda x: x * np.tanh(softplus(x))),
    "Neg": (6, np.negative),
    "Reciprocal": (6, lambda x: 1 / x),
    "Relu": (6, lambda x: np.maximum(x, 0)),
    "Round": (11, np.rint),
    "Sigmoid": (6, sigmoid),
    "Sign": (9, np.sign),
    "Sin": (7, np.sin),
    "Softplus": (1, softplus),
    "Softsign": (1, lambda x: x / (1 + np.abs(x))),
    "Sqrt": (6, np.sqrt),
    "Tan": (7, np.tan),
    "Tanh": (6, np.tanh),
}
for _name, (_since, _function) in _UNARY.items():
    register(_name, _since, Kind.ELEMENTWISE)(lambda attrs, x, f=_function: f(x))

_TESTS: dict[str, tuple[int, Callable[..., Any]]] = {
    "And": (7, np.logical_and),
    "Equal": (7, np.equal),
    "Greater": (7, np.greater),
    "GreaterOrEqual": (12, np.greater_equal),
    "IsNaN": (9, np.isnan),
    "Less": (7, np.less),
    "LessOrEqual": (12, np.less_equal),
    "Not": (1, np.logical_not),
    "Or": (7, np.logical_or),
    "Xor": (7, np.logical_xor),
}
for _name, (_since, _function) in _TESTS.items():
    register(_name, _since, Kind.ELEMENTWISE, result=_bool)(lambda attrs, *x, f=_function: f(*x))


@register("IsInf", 10, Kind.ELEMENTWISE, result=_bool)
def is_infinite(attrs: Attrs, x: Array) -> Any:
    positive = np.isposinf(x) & bool(attrs.get("detect_positive", 1))
    return positive | (np.isneginf(x) & bool(attrs.get("detect_negative", 1)))


_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add,
    "Mul": np.multiply,
    "Sub": np.subtract,
}
for _name, _pair in _BINARY.items():
    register(_name, 7, Kind.ELEMENTWISE)(lambda attrs, a, b, f=_pair: f(a, b))


@register("Div", 7, Kind.ELEMENTWISE)
def divide(_attrs: Attrs, a: Array, b: Array) -> Any:
    """Integers round towards zero, as in C."""
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        if np.any(b == 0):
            raise ZeroDivisionError("integer division by zero")
        return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    return a / b


@register("Mod", 10, Kind.ELEMENTWISE)
def modulo(attrs: Attrs, a: Array, b: Array) -> Any:
    if b.dtype.kind in "iu" and np.any(b == 0):
        raise ZeroDivisionError("integer modulo by zero")
    return np.fmod(a, b) if attrs.get("fmod", 0) else np.mod(a, b)


@register("Pow", 7, Kind.ELEMENTWISE)
def power(_attrs: Attrs, a: Array, b: Array) -> Any:
    wide = np.power(a.astype(np.float64), b) if a.dtype.kind in "iu" else np.power(a, b)
    return wide.astype(a.dtype) if wide.dtype != np.float64 or a.dtype.kind in "iu" else wide


@register("Where", 9, Kind.ELEMENTWISE, result=lambda dtypes, _: dtypes[1])
def where(_attrs: Attrs, condition: Array, a: Array, b: Array) -> Any:
    return np.where(condition.astype(np.bool_), a, b)


@register("Max", 8, Kind.ELEMENTWISE)
def maximum(_attrs: Attrs, *x: Array) -> Any:
    return reduce(np.maximum, x)


@register("Min", 8, Kind.ELEMENTWISE)
def minimum(_attrs: Attrs, *x: Array) -> Any:
    return reduce(np.minimum, x)


@register("Sum", 8, Kind.ELEMENTWISE)
def total(_attrs: Attrs, *x: Array) -> Any:
    return reduce(np.add, x)


@register("Mean", 8, Kind.ELEMENTWISE)
def mean(_attrs: Attrs, *x: Array) -> Any:
    return reduce(np.add, x) / len(x)


@register("Clip", 6, Kind.ELEMENTWISE)
def clip_attributes(attrs: Attrs, x: Array) -> Any:
    return np.clip(x, attrs.get("min", -math.inf), attrs.get("max", math.inf))


@register("Clip", 11, Kind.ELEMENTWISE)
def clip(_attrs: Attrs, x: Array, low: Array | None = None, high: Array | None = None) -> Any:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


@register("LeakyRelu", 6, Kind.ELEMENTWISE)
def leaky_relu(attrs: Attrs, x: Array) -> Any:
    return np.where(x < 0, x * attrs.get("alpha", 0.01), x)


@register("Elu", 6, Kind.ELEMENTWISE)
def elu(attrs: Attrs, x: Array) -> Any:
    return np.where(x < 0, attrs.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x)


@register("HardSigmoid", 6, Kind.ELEMENTWISE)
def hard_sigmoid(attrs: Attrs, x: Array) -> Any:
    return np.clip(x * attrs.get("alpha", 0.2) + attrs.get("beta", 0.5), 0, 1)


@register("PRelu", 7, Kind.ELEMENTWISE)
def prelu(_attrs: Attrs, x: Array, slope: Array) -> Any:
    return np.where(x < 0, x * slope, x)


@register("Gelu", 20, Kind.ELEMENTWISE)
def gelu(attrs: Attrs, x: Array) -> Any:
    return gelu_tanh(x) if attrs.get("approximate", "none") == "tanh" else gelu_erf(x)


@register("Gelu", 1, Kind.ELEMENTWISE, "com.microsoft")
def ort_gelu(_attrs: Attrs, x: Array) -> Any:
    return gelu_erf(x)


@register("Swish", 24, Kind.ELEMENTWISE)
def swish(attrs: Attrs, x: Array) -> Any:
    return x * sigmoid(attrs.get("alpha", 1.0) * x)


FLOAT_TYPES = (1, 10, 11, 16)  # FLOAT, FLOAT16, DOUBLE, BFLOAT16: a Cast to them keeps numbers


def cast_dtype(attrs: Attrs) -> np.dtype[Any]:
    """The dtype a Cast asks for."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(attrs["to"]))
    if dtype.kind in "cO":
        raise TypeError(f"a cast to {dtype} is not supported")
    return dtype


@register("Cast", 6, Kind.ELEMENTWISE, result=lambda _, attrs: cast_dtype(attrs))
def cast(attrs: Attrs, x: Array) -> Any:
    return x.astype(cast_dtype(attrs))


@register(
    "CastLike",
    15,
    Kind.ELEMENTWISE,
    shapes=lambda _, shapes, constants: [shapes[0]],
    result=lambda dtypes, _: dtypes[1],
)
def cast_like(_attrs: Attrs, x: Array, like: Array) -> Any:
    return x.astype(like.dtype)


@register("Dropout", 7, Kind.ELEMENTWISE)
def dropout(
    _attrs: Attrs, x: Array, ratio: Array | None = None, training: Array | None = None
) -> Any:
    """At inference nothing is dropped."""
    if training is not None and training.any() and (ratio is None or ratio.any()):
        raise ValueError("it drops at random; export the model in evaluation mode")
    return x, np.ones(x.shape, np.bool_)


def constant_attribute(attrs: Attrs) -> Constant | Array:
    """What a Constant node holds; ``value`` stays as the file has it."""
    if "value" in attrs:
        value: Constant = attrs["value"]
        return value
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in attrs:
            return np.array(attrs[name], dtype)
    raise ValueError("a Constant node holds no tensor or number")
