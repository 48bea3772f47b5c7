"""What the importer knows of an operator: how it computes, and how it moves tokens.

One entry for each (domain, op_type, since version). An entry's ``evaluate(attrs, *inputs)``
computes the operator on numpy arrays; that one function folds constants, probes regions
numerically and, on arrays of indices, follows data movement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from onnx import AttributeProto

from slmtvm.importer.graph import Array

Attrs = Mapping[str, Any]
Evaluate = Callable[..., Any]
Shape = tuple[int, ...]


class Kind(Enum):
    """How an operator's output elements depend on its input elements."""

    SHAPE = "shape"  # only on the shape of its input
    GENERATE = "generate"  # computed from constants only
    MOVE = "move"  # each output element is one input element
    ELEMENTWISE = "elementwise"  # each output element depends on the inputs at its place
    REDUCE = "reduce"  # output elements depend on lines of the first input along some axes
    CONTRACT = "contract"  # matrix products
    LOOKUP = "lookup"  # rows of a constant table, chosen by the second input
    ROUND = "round"  # each output element is the input at its place, rounded to an integer type
    QUANTIZE = "quantize"  # scales computed from the whole input
    BRANCH = "branch"  # an If that stayed, because its condition depends on the tokens
    CONVOLVE = "convolve"  # along the sequence; an element belongs to the newest it reads
    SCATTER = "scatter"  # the first input, some elements replaced or added to
    FUSED = "fused"  # a whole layer; the first ``data`` inputs say which token a line belongs to


@dataclass(frozen=True)
class Operator:
    """One operator from version ``since`` on.

    ``data``: how many leading inputs of a MOVE or FUSED operator are data; None where all are.
    ``axes(attrs, inputs, rank)``: the axes along which a REDUCE operator mixes, and whether its
    output keeps them as 1 (True), drops them (False) or has the input's shape (None).
    ``shapes(attrs, shapes, constants)``: output shapes, where the kind does not imply them.
    ``size(attrs, inputs)``: elements that evaluating needs, where that is not the inputs' size.
    ``result(dtypes, attrs)``: dtype of each output where it is not the first input's.
    ``reach(attrs, constants)``: how many positions the operator has tables for, or None.
    ``arity`` (fewest and most inputs) and ``attributes`` (name -> type and whether it must be
    there) are for operators that onnx has no schema of.
    """

    domain: str
    op_type: str
    since: int
    kind: Kind
    evaluate: Evaluate
    data: int | None = 1
    axes: Callable[[Attrs, Sequence[Any], int], tuple[tuple[int, ...], bool | None]] | None = None
    shapes: Callable[[Attrs, Sequence[Any], Sequence[Any]], list[Shape]] | None = None
    size: Callable[[Attrs, Sequence[Any]], int] | None = None
    result: Callable[[Sequence[Any], Attrs], Any] | None = None
    reach: Callable[[Attrs, Sequence[Any]], int | None] | None = None
    arity: tuple[int, int] = (1, 1)
    attributes: Mapping[str, tuple[int, bool]] = field(default_factory=dict)


INT, FLOAT = int(AttributeProto.INT), int(AttributeProto.FLOAT)

_OPERATORS: dict[tuple[str, str], list[Operator]] = {}


def register(
    op_type: str, since: int, kind: Kind, domain: str = "", **extra: Any
) -> Callable[[Evaluate], Evaluate]:
    """Decorator: the function below evaluates ``op_type`` of ``domain`` from ``since`` on."""

    def add(evaluate: Evaluate) -> Evaluate:
        entries = _OPERATORS.setdefault((domain, op_type), [])
        entries.append(Operator(domain, op_type, since, kind, evaluate, **extra))
        entries.sort(key=lambda e: e.since)
        return evaluate

    return add


def find(domain: str, op_type: str, version: int) -> Operator | None:
    """The newest entry not newer than ``version``, or None."""
    entries = [e for e in _OPERATORS.get((domain, op_type), ()) if e.since <= version]
    return entries[-1] if entries else None


def registered() -> list[Operator]:
    """Every entry, ordered by domain, name and version."""
    return [entry for key in sorted(_OPERATORS) for entry in _OPERATORS[key]]


def ints(value: Any) -> list[int]:
    """A constant input or attribute as a flat list of Python ints."""
    return [int(v) for v in np.asarray(value).reshape(-1)]


def as_scalar(value: Array) -> Any:
    """The only element of ``value``; raises ValueError where it has several."""
    return np.asarray(value).reshape(-1).item() if np.size(value) == 1 else _not_scalar(value)


def _not_scalar(value: Array) -> Any:
    raise ValueError(f"expected one value, found shape {np.shape(value)}")
