"""Sums and products that onnxruntime computes on integers: QLinearAdd and QLinearMul.

They are written out as float operators between roundings, which recognisers look through as through
others. The node between the roundings carries the scales of the integers.
"""

from __future__ import annotations

import numpy as np

from slmtvm.importer.graph import Node
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.rows.pointwise import operand
from slmtvm.importer.recognise.steps import IntegerPair, Param, Reordered, Rows, Step
from slmtvm.schedules.rows import Pair


def match_integer_pair(cover: Cover, node: Node, value: str) -> Step | None:
    """``value`` as a sum or product of two rounded values; None for any other operator."""
    pair = node.attrs.get("pair")
    if not isinstance(pair, Pair):
        return None
    width = cover.frame.features(value)
    sides = [(operand(cover, name, value), name, pair) for name in node.inputs]
    sides[1] = (*sides[1][:2], pair.turned)
    # The side with a feature for each of the result's, and rows of its own, comes first.
    sides.sort(key=lambda side: (not isinstance(side[0], Rows), _is_number(cover, side[1], width)))
    (x, _, pair), (y, name, _) = sides
    assert isinstance(x, Rows), node.label  # one side depends on the tokens
    if _is_number(cover, sides[0][1], width):
        order = Param(f"{value}.order", np.zeros(width, np.int32))
        x = cover.add(f"{value}#spread", Reordered(x, order))
    if isinstance(y, float):
        y = Param(f"{name}.row", np.full(width, y, np.float32))
    return IntegerPair(x, y, pair)


def _is_number(cover: Cover, name: str, width: int) -> bool:
    """Whether each token has one number where the result has several features."""
    return name in cover.frame.small.shapes and cover.frame.features(name) == 1 < width
