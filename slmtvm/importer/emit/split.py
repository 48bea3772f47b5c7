"""Packed linear layers, used by some of their features only, become a linear layer for each use.

Exporters pack queries, keys and values, or a gate and its factor, into one product, one after the
other or head by head. In the canonical model they are layers of their own, whatever the export; the
passes pack what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.recognise.steps import (
    Columns,
    Linear,
    Param,
    Reordered,
    Step,
    Weights,
    resolve,
)
from slmtvm.schedules.linear.shape import MIN_GROUP_CHANNELS


def split_packed(steps: Mapping[str, Step]) -> dict[str, Step]:
    """``steps`` with features of a linear layer as a layer of these outputs.

    Weights are views where the features follow each other, else copies in their order. A layer
    stays whole where one of its parts would cut blocks of outputs that share scales.
    """
    parts: dict[str, dict[str, Linear | None]] = {}
    for rows, step in steps.items():
        if isinstance(step, Columns | Reordered):
            name = resolve(steps, step.x)
            source = steps[name]
            if isinstance(source, Linear):
                parts.setdefault(name, {})[rows] = _taken(source, step)
    result = dict(steps)
    for found in parts.values():
        whole = {rows: part for rows, part in found.items() if part is not None}
        if len(whole) == len(found):
            result.update(whole)
    return result


def _taken(linear: Linear, step: Columns | Reordered) -> Linear | None:
    if isinstance(step, Columns):
        return taken_outputs(linear, slice(step.begin, step.end), f"{step.begin}:{step.end}")
    features = step.features.array
    return taken_outputs(linear, features, f"{features[0]},...")


def taken_outputs(linear: Linear, features: slice | Array, label: str) -> Linear | None:
    """The layer of some outputs; None where they cut blocks of channels that share scales."""

    def cut(param: Param | None) -> Param | None:
        if param is None or (param.array.shape == (1,) and linear.n != 1):
            return param  # one number for all outputs
        return Param(f"{param.name}[{label}]", param.array[features])

    old = linear.weights
    weight = cut(old.weight)
    assert weight is not None
    n = len(weight.array)
    if old.group_channels:
        channels = np.arange(linear.n)[features]
        blocks = _blocks(channels // old.group_channels, old.group_channels)
        if blocks is None:
            return None
        chosen, size = blocks

        def pick(param: Param | None) -> Param | None:
            return None if param is None else Param(f"{param.name}[{label}]", param.array[chosen])

        weights = Weights(
            old.format, weight, pick(old.scales), pick(old.zero_points), group_channels=size
        )
    else:
        weights = Weights(old.format, weight, cut(old.scales), cut(old.zero_points), old.group_size)
    return replace(linear, weights=weights, bias=cut(linear.bias), n=n)


def _blocks(blocks: Array, size: int) -> tuple[Array, int] | None:
    """Of channels that lie in these ``blocks``, blocks of the largest size up to ``size``: the old
    one that each is of, and that size."""
    while size >= MIN_GROUP_CHANNELS:
        first = blocks[::size]
        if (np.repeat(first, size)[: len(blocks)] == blocks).all():
            return first, size
        size //= 2
    return None
