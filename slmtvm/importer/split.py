"""Packed linear layers, used by columns only, become a linear layer for each use.

Exporters pack queries, keys and values, or a gate and its factor, into one product. In the
canonical model they are layers of their own, whatever the export; the passes pack what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from slmtvm.importer.emit import resolve
from slmtvm.importer.steps import Columns, Linear, Param, Step, Weights


def split_packed(steps: Mapping[str, Step]) -> dict[str, Step]:
    """``steps`` with columns of a linear layer as a layer of these outputs, weights as views."""
    result = dict(steps)
    for rows, step in steps.items():
        if isinstance(step, Columns):
            linear = steps[resolve(steps, step.x)]
            if isinstance(linear, Linear):
                result[rows] = _slice(linear, step.begin, step.end)
    return result


def _slice(linear: Linear, begin: int, end: int) -> Linear:
    def cut(param: Param | None) -> Param | None:
        if param is None or (param.array.shape == (1,) and linear.n != 1):
            return param  # one number for all outputs
        return Param(f"{param.name}[{begin}:{end}]", param.array[begin:end])

    old = linear.weights
    weight = cut(old.weight)
    assert weight is not None
    weights = Weights(old.format, weight, cut(old.scales), cut(old.zero_points), old.group_size)
    return replace(linear, weights=weights, bias=cut(linear.bias), n=end - begin)
