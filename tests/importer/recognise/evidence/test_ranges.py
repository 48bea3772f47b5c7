"""Ranges of values, whatever finite numbers they come from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Constant, Graph, Node
from slmtvm.importer.operators import find
from slmtvm.importer.recognise.evidence.ranges import (
    ANY,
    FINITE,
    SHARES,
    Range,
    constants_in,
    ranges_of,
)

OPSET = 18


def frozen_with(**constants: object) -> Frozen:
    """A graph of no nodes with these constants, numbers in float32 unless they are arrays."""
    arrays = {
        name: value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)
        for name, value in constants.items()
    }
    known = {name: Constant.of(name, array) for name, array in arrays.items()}
    graph = Graph(Path("model.onnx"), (), (), (), {})
    return Frozen(graph, 3, known)


def node(kind: str, inputs: str, output: str, **attrs: object) -> Node:
    """``inputs`` with spaces between, "-" for one that is left out."""
    names = tuple("" if name == "-" else name for name in inputs.split())
    assert find("", kind, OPSET) is not None
    return Node("", kind, OPSET, "", names, (output,), attrs)


def range_after(*nodes: Node, given: Range = FINITE, **constants: object) -> Range:
    return ranges_of(frozen_with(**constants), nodes, {"x": given})[nodes[-1].outputs[0]]


def test_a_variance_is_not_negative_and_its_root_not_smaller_than_that_of_epsilon():
    nodes = (
        node("ReduceMean", "x axis", "mean"),
        node("Sub", "x mean", "centred"),
        node("Pow", "centred two", "square"),
        node("ReduceMean", "square axis", "variance"),
        node("Add", "variance eps", "sum"),
        node("Sqrt", "sum", "root"),
        node("Reciprocal", "root", "scale"),
    )
    found = range_after(*nodes, axis=np.array([-1]), two=2.0, eps=1e-4)
    assert found.low == 0
    assert found.high == pytest.approx(100, rel=1e-6)


def test_a_product_with_itself_is_not_negative():
    assert range_after(node("Mul", "x x", "y")).low == 0
    assert range_after(node("Mul", "x c", "y"), c=2.0).low < 0


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ((node("Clip", "x low high", "y"),), FINITE, Range(-1.0, 2.0)),
        ((node("Clip", "x - high", "y"),), SHARES, Range(0.0, 1.0)),
        ((node("Clip", "x low", "y"),), Range(-5.0, 5.0), Range(-1.0, 5.0)),
        ((node("Max", "x low", "y"),), Range(-5.0, 5.0), Range(-1.0, 5.0)),
        ((node("Min", "x low", "y"),), Range(-5.0, 5.0), Range(-5.0, -1.0)),
        ((node("Neg", "x", "y"),), Range(1.0, 2.0), Range(-2.0, -1.0)),
        ((node("Abs", "x", "y"),), Range(-3.0, 2.0), Range(0.0, 3.0)),
        ((node("Div", "x low", "y"),), Range(1.0, 2.0), Range(-2.0, -1.0)),
        ((node("Greater", "x high", "y"),), SHARES, Range(0.0, 0.0)),
        ((node("LessOrEqual", "x high", "y"),), SHARES, Range(1.0, 1.0)),
        ((node("IsNaN", "x", "y"),), FINITE, Range(0.0, 0.0)),
        ((node("IsNaN", "x", "t"), node("Where", "t high x", "y")), SHARES, SHARES),
    ],
)
def test_ranges_follow_operators(nodes, given, expected):
    assert range_after(*nodes, given=given, low=-1.0, high=2.0) == expected


def test_what_may_be_infinite_may_be_no_number():
    assert range_after(node("Mul", "x c", "y"), c=4.0).high == math.inf
    doubled = node("Mul", "x c", "y")
    assert range_after(doubled, node("Sub", "y y", "z"), c=4.0) == ANY
    assert range_after(node("Reciprocal", "x", "y")) == ANY


def test_a_bound_of_half_precision_lies_as_far_as_its_type_goes():
    half = np.asarray(65504, np.float16)
    assert (
        range_after(node("Min", "x c", "y"), c=half).high
        == range_after(node("Identity", "x", "y")).high
    )
    assert range_after(node("Min", "x c", "y"), c=65504.0).high == 65504


def test_an_unknown_operator_may_give_anything():
    assert range_after(node("Sin", "x", "y")) == ANY


def test_constants_of_a_graph_are_its_single_numbers():
    frozen = frozen_with(a=2.0, b=[1.0, 3.0], c=np.asarray(True), d=math.inf)
    nodes = [node("Add", "x a", "y"), node("Mul", "y b", "z"), node("Where", "c z d", "w")]
    nodes.append(node("LeakyRelu", "w", "v", alpha=0.25))
    assert constants_in(frozen, nodes) == [2.0, 0.25]
