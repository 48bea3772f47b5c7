"""Operators on integers that stand for floats: each is the float operator between a
DequantizeLinear of its inputs and a QuantizeLinear of its result.

onnxruntime computes some of them in integers or by tables; results differ by a rounding at most.
Sums and products carry a ``Pair``, which says how it rounds them, and what rounds sums of products
carries their step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site
from slmtvm.importer.graph import Constant
from slmtvm.importer.operators.registry import FLOAT, INT
from slmtvm.schedules.rows import Pair

_ONE_INPUT = 5  # x, its scale and zero point, those of y
_TWO_INPUTS = 8
_FUNCTIONS = {"Add": "add", "Mul": "multiply"}
_AXIS_ALONE = 13  # the operator set from which on a softmax runs over one axis


def _float(site: Site, first: int, axis: int = 1) -> str:
    """What the integers, scale and zero point at inputs ``first`` to ``first + 2`` stand for."""
    integers = (site.input(first + i) for i in range(3))
    return str(site.op("DequantizeLinear", *integers, axis=axis))


def _integers(site: Site, value: str, first: int, **attrs: Any) -> str:
    """``value`` rounded with the scale and zero point at inputs ``first`` and ``first + 1``."""
    numbers = site.input(first), site.input(first + 1)
    return str(site.op("QuantizeLinear", value, *numbers, **attrs))


def _steps(site: Site) -> dict[str, Constant]:
    """What sums of products of the integers at inputs 0 and 3 are multiples of, one or for each
    column; nothing where it is not known."""
    left, right = site.values(1), site.values(4)
    if left is None or right is None or left.size != 1:
        return {}
    product = left.reshape(()) * right.reshape(-1)
    return {"steps": Constant.of("steps", product.astype(np.float32, copy=False))}


@expansion("QLinearMatMul", 10)
def qlinear_matmul(site: Site) -> Sequence[str]:
    """Scales of the right side may be one for each of its columns."""
    right = _float(site, 3, axis=site.rank(site.input(3)) - 1)
    product = site.op("MatMul", _float(site, 0), right)
    return [_integers(site, product, 6, **_steps(site))]


@expansion(
    "QGemm",
    1,
    MICROSOFT,
    arity=(6, 9),
    attributes={"alpha": (FLOAT, False), "transA": (INT, False), "transB": (INT, False)},
)
def qgemm(site: Site) -> Sequence[str]:
    """The bias is int32, its scale that of the product; without a scale the result is float."""
    turned = site.attrs.get("transB", 0)
    left, right = _float(site, 0), _float(site, 3, axis=0 if turned else 1)
    attrs = {key: site.attrs[key] for key in ("transA", "transB") if key in site.attrs}
    result = site.op("Gemm", left, right, **attrs)
    if site.input(6):
        scale = site.op("Mul", site.input(1), site.input(4))
        result = site.op("Add", result, site.op("DequantizeLinear", site.input(6), scale, axis=0))
    if not site.input(7):
        return [_scaled(site, result)]
    if site.attrs.get("alpha", 1.0) != 1.0:
        return [_integers(site, _scaled(site, result), 7)]
    return [_integers(site, result, 7, **_steps(site))]


def _scaled(site: Site, result: str) -> str:
    alpha = site.attrs.get("alpha", 1.0)
    return result if alpha == 1.0 else str(site.op("Mul", result, site.constant(alpha)))


@expansion("QLinearConv", 10)
def qlinear_conv(site: Site) -> Sequence[str]:
    """Scales of the weight may be one for each output channel; the bias is int32, its scale that of
    the product."""
    operands = [_float(site, 0), _float(site, 3, axis=0)]
    if site.input(8):
        scale = site.op("Mul", site.input(1), site.input(4))
        operands.append(site.op("DequantizeLinear", site.input(8), scale, axis=0))
    return [_integers(site, site.op("Conv", *operands, **site.attrs), 6)]


def _pair(site: Site, op_type: str) -> Sequence[str]:
    left, right, pair = 0, 3, None
    if site.is_shaped(site.input(0)) and site.is_shaped(site.input(3)):
        # Where one number meets many in a run, onnxruntime takes it as the second one.
        left, right = (3, 0) if _repeats(site, 0, 3) else (0, 3)
        pair = _integers_of(site, _FUNCTIONS[op_type], left, right)
    result = site.op(op_type, _float(site, left), _float(site, right), pair=pair)
    return [_integers(site, result, 6)]


def _integers_of(site: Site, function: str, left: int, right: int) -> Pair | None:
    """Scales and zero points of both sides and of the result; None where they are not known."""
    found = [site.values(i) for first in (left + 1, right + 1, 6) for i in (first, first + 1)]
    numbers = [n.item() for n in found if n is not None and n.size == 1]
    if len(numbers) < len(found):
        return None
    x, x_zero, y, y_zero, result, zero = numbers
    return Pair(function, x, x_zero, y, y_zero, result, zero)


def _repeats(site: Site, side: int, other: int) -> bool:
    """Whether each number of input ``side`` meets several of input ``other`` in a row."""
    shapes = [site.shape(site.input(i))[::-1] for i in (side, other)]
    innermost = (pair for pair in zip_longest(*shapes, fillvalue=1) if pair != (1, 1))
    own, _ = next(innermost, (0, 0))
    return own == 1


@expansion("QLinearAdd", 1, MICROSOFT, arity=(7, _TWO_INPUTS))
def qlinear_add(site: Site) -> Sequence[str]:
    return _pair(site, "Add")


@expansion("QLinearMul", 1, MICROSOFT, arity=(7, _TWO_INPUTS))
def qlinear_mul(site: Site) -> Sequence[str]:
    return _pair(site, "Mul")


@expansion("QLinearSigmoid", 1, MICROSOFT, arity=(4, _ONE_INPUT))
def qlinear_sigmoid(site: Site) -> Sequence[str]:
    return [_integers(site, site.op("Sigmoid", _float(site, 0)), 3)]


@expansion(
    "QLinearLeakyRelu", 1, MICROSOFT, arity=(4, _ONE_INPUT), attributes={"alpha": (FLOAT, False)}
)
def qlinear_leaky_relu(site: Site) -> Sequence[str]:
    alpha = site.attrs.get("alpha", 0.01)
    return [_integers(site, site.op("LeakyRelu", _float(site, 0), alpha=alpha), 3)]


@expansion(
    "QLinearSoftmax",
    1,
    MICROSOFT,
    arity=(_ONE_INPUT, _ONE_INPUT),
    attributes={"axis": (INT, False), "opset": (INT, True)},
)
def qlinear_softmax(site: Site) -> Sequence[str]:
    """onnxruntime multiplies by the whole part of 1 / scale where it should divide by the scale."""
    softmax = site.op("Softmax", _float(site, 0), axis=_softmax_axis(site))
    scale = site.input(3)
    steps = site.op("Floor", site.op("Div", site.constant(1.0), scale))
    return [_integers(site, site.op("Mul", softmax, site.op("Mul", steps, scale)), 3)]


def _softmax_axis(site: Site) -> int:
    """Before operator set 13 all axes from this one on are one: refused unless it is the last."""
    last = site.rank(site.input(0)) - 1
    whole = site.attrs["opset"] < _AXIS_ALONE
    axis = int(site.attrs.get("axis", 1 if whole else -1))
    if whole and axis not in (last, -1):
        raise site.refuse(f"a softmax over all axes from {axis} on")
    return axis


@expansion("QLinearConcat", 1, MICROSOFT, arity=(5, 1 << 16), attributes={"axis": (INT, True)})
def qlinear_concat(site: Site) -> Sequence[str]:
    """Inputs: scale and zero point of the result, then three for each part."""
    parts = [_float(site, first) for first in range(2, len(site.node.inputs), 3)]
    return [_integers(site, site.op("Concat", *parts, axis=site.attrs["axis"]), 0)]


@expansion("QLinearWhere", 1, MICROSOFT, arity=(9, 9))
def qlinear_where(site: Site) -> Sequence[str]:
    """Inputs: the condition, three for each choice, scale and zero point of the result."""
    chosen = site.op("Where", site.input(0), _float(site, 1), _float(site, 4))
    return [_integers(site, chosen, 7)]
