"""Elementwise ONNX operators as expressions of standard Relax ops, for what no recogniser takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeAlias

from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.steps import Elementwise, Param, Rows, Same, Step

# Rows, a feature vector, a number, or (name of a Relax op, expressions...).
Expression: TypeAlias = Any
_Formula: TypeAlias = Callable[..., Expression]

_QUICK_GELU_ALPHA = 1.702
_SIMPLE = {
    "Abs": "abs",
    "Add": "add",
    "Cos": "cos",
    "Div": "divide",
    "Erf": "erf",
    "Exp": "exp",
    "Log": "log",
    "Mul": "multiply",
    "Neg": "negative",
    "Pow": "power",
    "Relu": "nn.relu",
    "Sigmoid": "sigmoid",
    "Sin": "sin",
    "Softplus": "nn.softplus",
    "Sqrt": "sqrt",
    "Sub": "subtract",
    "Tanh": "tanh",
}


def _fold(name: str) -> _Formula:
    return lambda _, *x: reduce(lambda a, b: (name, a, b), x)


def _clip(x: Expression, low: Expression | None, high: Expression | None) -> Expression:
    x = x if low is None else ("maximum", x, low)
    return x if high is None else ("minimum", x, high)


def _clip_operator(attrs: Mapping[str, Any], x: Expression, *bounds: Expression) -> Expression:
    low, high = (*bounds, None, None)[:2]
    return _clip(x, attrs.get("min", low), attrs.get("max", high))


def _swish(x: Expression, alpha: float) -> Expression:
    return ("multiply", x, ("sigmoid", ("multiply", x, alpha)))


def _sloped(x: Expression, slope: Expression) -> Expression:
    """x where it is positive, slope * x elsewhere."""
    return ("add", ("nn.relu", x), ("multiply", ("minimum", x, 0.0), slope))


def _hard_sigmoid(x: Expression, alpha: float, beta: float) -> Expression:
    return _clip(("add", ("multiply", x, alpha), beta), 0.0, 1.0)


def _elu(attrs: Mapping[str, Any], x: Expression) -> Expression:
    below = ("subtract", ("exp", ("minimum", x, 0.0)), 1.0)
    return ("add", ("nn.relu", x), ("multiply", below, attrs.get("alpha", 1.0)))


_FORMULAS: dict[tuple[str, str], _Formula] = {
    **{("", op): (lambda _, *x, name=name: (name, *x)) for op, name in _SIMPLE.items()},
    ("", "Clip"): _clip_operator,
    ("", "Elu"): _elu,
    ("", "HardSigmoid"): lambda a, x: _hard_sigmoid(x, a.get("alpha", 0.2), a.get("beta", 0.5)),
    ("", "HardSwish"): lambda _, x: ("multiply", x, _hard_sigmoid(x, 1 / 6, 0.5)),
    ("", "LeakyRelu"): lambda a, x: _sloped(x, a.get("alpha", 0.01)),
    ("", "Max"): _fold("maximum"),
    ("", "Mean"): lambda a, *x: ("multiply", _fold("add")(a, *x), 1 / len(x)),
    ("", "Min"): _fold("minimum"),
    ("", "Mish"): lambda _, x: ("multiply", x, ("tanh", ("nn.softplus", x))),
    ("", "PRelu"): lambda _, x, slope: _sloped(x, slope),
    ("", "Reciprocal"): lambda _, x: ("divide", 1.0, x),
    ("", "Softsign"): lambda _, x: ("divide", x, ("add", ("abs", x), 1.0)),
    ("", "Sum"): _fold("add"),
    ("", "Swish"): lambda a, x: _swish(x, a.get("alpha", 1.0)),
    ("com.microsoft", "BiasGelu"): lambda _, x, bias: ("nn.gelu", ("add", x, bias)),
    ("com.microsoft", "FastGelu"): lambda a, *x: ("nn.gelu_tanh", _fold("add")(a, *x)),
    ("com.microsoft", "QuickGelu"): lambda a, x: _swish(x, a.get("alpha", _QUICK_GELU_ALPHA)),
}


def formula(domain: str, op_type: str) -> _Formula | None:
    """``formula(attrs, *operands)`` of an operator, an Expression; None where there is none."""
    return _FORMULAS.get((domain, op_type))


def emit(cover: Cover, value: str, expression: Expression) -> Step:
    """``expression`` as the step of ``value``; steps for its parts are added."""
    if isinstance(expression, Rows):
        return Same(expression)
    name, *parts = expression
    operands: list[Rows | Param | float] = []
    for place, part in enumerate(parts):
        if isinstance(part, tuple):
            inner = emit(cover, f"{value}.{place}", part)
            operands.append(cover.add(f"{value}.{place}#part", inner))
        else:
            operands.append(part)
    return Elementwise(name, tuple(operands))
