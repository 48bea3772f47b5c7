"""Numbers that the cost model sees of a setting: its knobs, and what follows from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape, packed_weights
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES

_KNOBS = ("mr", "nv", "ku", "gu", "pf", "ps", "rt")


def features(kind: str, shape: Any, isa: Isa, knobs: Knobs) -> np.ndarray:
    """One float32 vector, of the same length for all tasks of a kind.

    The knobs; those of the default; the sizes; and of a tile: registers, how much of the last
    ones is padding, bytes of weights, how often activations are read.
    """
    if isinstance(shape, AttentionShape):
        return _of_attention(shape, isa, knobs)
    default = TEMPLATES[kind].default_knobs(shape, isa)
    layer: LinearShape = getattr(shape, "layer", shape)
    m = int(shape.m)
    mr, nv = knobs["mr"], knobs["nv"]
    width = nv * isa.lanes
    row_tiles, column_tiles = -(-m // mr), -(-layer.n // width)
    weight_bytes = sum(
        math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in packed_weights(layer, isa)
    )
    cells = mr * nv
    values: list[float] = [
        *(float(knobs.get(name, 0)) for name in _KNOBS),
        *(_log(knobs, name) - _log(default, name) for name in _KNOBS),
        math.log2(m), math.log2(layer.n), math.log2(layer.k), float(layer.bits),
        float(layer.group_size), float(layer.has_zero_points), float(layer.has_residual),
        float(isa.lanes), float(isa.registers),
        float(cells), cells / isa.registers, max(0.0, 2 * cells + mr + nv - isa.registers),
        float(row_tiles), float(column_tiles), float(row_tiles * column_tiles),
        row_tiles * mr / m, column_tiles * width / layer.n,
        weight_bytes / layer.n * width, math.log2(weight_bytes),
        (mr + nv) / cells,
        knobs["ku"] * cells,  # instructions of the innermost loop, about
        (layer.group_size or layer.padded_k) / knobs["ku"],
    ]  # fmt: skip
    return np.array(values, np.float32)


def _of_attention(shape: AttentionShape, isa: Isa, knobs: Knobs) -> np.ndarray:
    """Accumulators and queries, also for each head of a group; sizes."""
    accumulators, queries = knobs["accumulators"], knobs["queries"]
    values = [
        queries, queries / shape.group,
        accumulators, accumulators / shape.group, accumulators // shape.group,
        accumulators / isa.registers, math.log2(shape.m), shape.group, shape.head_dim,
        shape.num_kv_heads, isa.lanes, isa.registers,
    ]  # fmt: skip
    return np.array(values, np.float32)


def _log(knobs: Knobs, name: str) -> float:
    return math.log2(1 + knobs.get(name, 0))
