"""Packed linear layers, used by some of their features only, become a linear layer for each use.

Exporters pack queries, keys and values, or a gate and its factor, into one product, one after the
other or head by head. In the canonical model they are layers of their own, whatever the export; the
passes pack what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from slmtvm.importer.emit import resolve
from slmtvm.importer.graph import Array
from slmtvm.importer.steps import Columns, Linear, Param, Reordered, Step, Weights


def split_packed(steps: Mapping[str, Step]) -> dict[str, Step]:
    """``steps`` with features of a linear layer as a layer of these outputs.

    Weights are views where the features follow each other, else copies in their order.
    """
    result = dict(steps)
    for rows, step in steps.items():
        if not isinstance(step, Columns | Reordered):
            continue
        source = steps[resolve(steps, step.x)]
        if isinstance(source, Linear):
            if isinstance(step, Columns):
                label = f"{step.begin}:{step.end}"
                result[rows] = _part(source, slice(step.begin, step.end), label)
            else:
                features = step.features.array
                result[rows] = _part(source, features, f"{features[0]},...")
    return result


def _part(linear: Linear, features: slice | Array, label: str) -> Linear:
    def cut(param: Param | None) -> Param | None:
        if param is None or (param.array.shape == (1,) and linear.n != 1):
            return param  # one number for all outputs
        return Param(f"{param.name}[{label}]", param.array[features])

    old = linear.weights
    weight = cut(old.weight)
    assert weight is not None
    weights = Weights(old.format, weight, cut(old.scales), cut(old.zero_points), old.group_size)
    n = len(weight.array)
    return replace(linear, weights=weights, bias=cut(linear.bias), n=n)
