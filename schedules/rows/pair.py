"""The sum or the product of two integers that stand for floats, rounded as onnxruntime does it.

QLinearAdd and QLinearMul do not restore floats: they scale the integers themselves, which rounds
what lies half-way between two steps of the result otherwise. The formulas are those of MLAS on
x86-64, in float32: of sums with AVX2 (qladd_avx2.cpp), since without it MLAS does not fuse products
and sums, and on Arm it adds numbers in fixed point; of products (qlmul.cpp) with any instructions.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FUNCTIONS = ("add", "multiply")
FARTHEST = float(1 << 20)
"""Steps at which a result is clipped: outside of every integer type, and exact in float32."""


@dataclass(frozen=True)
class Pair:
    """What an operator makes of two integers x and y: ``function`` of what these stand for.

    An integer q stands for (q - zero) * scale; ``scale`` and ``zero`` are the result's. ``first``:
    whether x is the operator's first operand, which is added last.
    """

    function: str
    x_scale: float
    x_zero: int
    y_scale: float
    y_zero: int
    scale: float
    zero: int
    first: bool = True

    def __post_init__(self) -> None:
        assert self.function in FUNCTIONS, self.function

    def __str__(self) -> str:
        """As the attributes of ops have it."""
        function, *numbers, first = astuple(self)
        return ":".join([function, *map(repr, numbers), str(int(first))])

    @staticmethod
    def parse(text: str) -> Pair:
        """The inverse of ``str``."""
        function, *numbers, first = text.split(":")
        x_scale, y_scale, scale = map(float, numbers[::2])
        x_zero, y_zero, zero = map(int, numbers[1::2])
        return Pair(function, x_scale, x_zero, y_scale, y_zero, scale, zero, first == "1")

    @property
    def turned(self) -> Pair:
        """The same with x and y exchanged."""
        return Pair(
            self.function, self.y_scale, self.y_zero, self.x_scale, self.x_zero, self.scale,
            self.zero, not self.first,
        )  # fmt: skip

    @property
    def numbers(self) -> dict[str, float]:
        """What a kernel reads: reciprocals of the operands' scales, and what its formula has."""
        own = {"result_scale": self.scale, "result_zero": self.zero}
        own |= {"x_reciprocal": 1.0 / self.x_scale, "y_reciprocal": 1.0 / self.y_scale}
        if self.function == "multiply":
            return {**own, "factor": float(self.factor)}
        x_factor, y_factor = map(float, self.factors)
        own |= {"x_factor": x_factor, "y_factor": y_factor, "offset": float(self.offset)}
        return {**own, "x_zero": self.x_zero, "y_zero": self.y_zero}

    @property
    def factors(self) -> tuple[Array, Array]:
        """Of a sum: the steps of the result in one step of x, and in one of y. Float32 scalars."""
        x, y, own = _float32(self.x_scale, self.y_scale, self.scale)
        return x / own, y / own

    @property
    def offset(self) -> Array:
        """Of a sum: what is added to x and y, each times its factor. A float32 scalar."""
        x, y = self.factors
        x_zero, y_zero, zero = _float32(self.x_zero, self.y_zero, self.zero)
        a, b = ((x, x_zero), (y, y_zero)) if self.first else ((y, y_zero), (x, x_zero))
        return np.asarray(zero - fused_multiply_add(*a, b[0] * b[1]))

    @property
    def factor(self) -> Array:
        """Of a product: the steps of the result in one step of x times one of y."""
        x, y, own = _float32(self.x_scale, self.y_scale, self.scale)
        return np.asarray(x * y / own)


def _float32(*numbers: float) -> list[Array]:
    return [np.asarray(number, np.float32) for number in numbers]


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32 arrays, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # What float64 cannot hold goes to the odd neighbour: then float32 is rounded to as from the
    # exact sum (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums").
    even = (total.view(np.int64) & 1) == 0
    beyond = np.nextafter(total, np.copysign(np.inf, error))
    return np.asarray(np.where((error != 0) & even, beyond, total).astype(np.float32))


def reference(pair: Pair, x: Array, y: Array) -> Array:
    """``pair`` of float32 values that integers stand for; x and y broadcast.

    Whole steps of the result's scale, as float32, not yet bounded by its integer type.
    """
    x, y = np.rint(x / np.float32(pair.x_scale)), np.rint(y / np.float32(pair.y_scale))
    if pair.function == "add":
        of_x, of_y = pair.factors
        x, y = x + np.float32(pair.x_zero), y + np.float32(pair.y_zero)
        a, b = ((x, of_x), (y, of_y)) if pair.first else ((y, of_y), (x, of_x))
        total = fused_multiply_add(*a, fused_multiply_add(*b, pair.offset))
        ideal = np.clip(total, -FARTHEST, FARTHEST)
    else:
        product = np.clip(x * y * pair.factor, -FARTHEST, FARTHEST)
        ideal = product + np.float32(pair.zero)
    steps = np.rint(ideal) - np.float32(pair.zero)
    return np.asarray(steps * np.float32(pair.scale), np.float32)
