"""Functions of single elements and of single rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from slmtvm.ir.reference.arrays import Array

_erf = np.vectorize(math.erf, otypes=[np.float32])


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))  # never overflows, and is exact at both ends
    return np.asarray(np.where(x < 0, small, 1) / (1 + small)).astype(x.dtype, copy=False)


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


ROWWISE: dict[str, Callable[..., Any]] = {
    "relax.max": lambda x: x.max(axis=1, keepdims=True),
    "relax.mean": lambda x: x.mean(axis=1, keepdims=True),
    "relax.min": lambda x: x.min(axis=1, keepdims=True),
    "relax.sum": lambda x: x.sum(axis=1, keepdims=True),
    "relax.take": lambda x, order: x[:, order],
}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relax.abs": np.abs,
    "relax.add": np.add,
    "relax.cos": np.cos,
    "relax.divide": np.divide,
    "relax.erf": _erf,
    "relax.exp": np.exp,
    "relax.log": np.log,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.multiply": np.multiply,
    "relax.negative": np.negative,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.relu": lambda x: np.maximum(x, 0),
    "relax.nn.silu": lambda x: x * sigmoid(x),
    "relax.nn.softplus": lambda x: np.logaddexp(np.float32(0), x),
    "relax.power": np.power,
    "relax.sigmoid": sigmoid,
    "relax.sin": np.sin,
    "relax.sqrt": np.sqrt,
    "relax.subtract": np.subtract,
    "relax.tanh": np.tanh,
}
