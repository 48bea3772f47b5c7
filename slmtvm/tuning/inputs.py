"""What a measured kernel reads: random values in the packed layout, finite and of equal cost.

Times do not depend on the values; results are compared between settings, so that what one buffer
says of another (sums of activations) must hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.schedules.experts import RoutedShape
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.schedules.linear import LinearShape, listed_weights
from slmtvm.schedules.linear.columns import pieces
from slmtvm.schedules.linear.shape import COLUMNS, ROW_ALIGNMENT

# The kinds of measure.h, by number.
OUTPUT, BYTES, INT32, F32, F16, SUMS, GIVEN, STARTS, PLACES = range(9)
_CYCLED = ("weight", "scales", "zero_points", "column_sums")

_LISTED = 0.3
"""Part of the weights that lists hold, which no task says."""


@dataclass(frozen=True)
class Fill:
    """How the program fills a buffer of ``size`` bytes; the fields are those of measure.h."""

    size: int
    kind: int
    low: float = 0
    high: float = 0
    of: int = 0
    cycled: bool = False
    result: bool = False
    given: bytes = b""


def fills_of(kernel: Kernel) -> list[Fill]:
    """A fill for each tensor of a tunable kernel but ``scratch``, in order."""
    assert kernel.tunable is not None
    shape, knobs = kernel.tunable.shape, dict(kernel.tunable.knobs)
    tensors = [t for t in kernel.tensors if t.name != "scratch"]
    state = {*kernel.state, *(t.name for t in getattr(shape, "cache", ()))}
    given = _routes(shape, knobs) if isinstance(shape, RoutedShape) else {}
    layer = shape.layer if isinstance(shape, RoutedShape) else shape
    listed = _lists(tensors, layer) if isinstance(layer, LinearShape) else {}
    names = [t.name for t in tensors]
    found = []
    for tensor in tensors:
        if tensor.name in given:
            found.append(Fill(_bytes(tensor), GIVEN, given=given[tensor.name].tobytes()))
        elif tensor.name in listed:
            found.append(listed[tensor.name])
        elif tensor.name in kernel.outputs:
            found.append(Fill(_bytes(tensor), OUTPUT, result=True))
        elif tensor.name == "xsum":
            assert isinstance(layer, LinearShape)
            size = layer.group_size
            found.append(Fill(_bytes(tensor), SUMS, size, of=names.index("xq")))
        elif tensor.name in state:
            written = tensor.name in kernel.state
            found.append(replace(_random(tensor), cycled=True, result=written))
        else:
            found.append(_random(tensor))
    return found


def _random(tensor: Tensor) -> Fill:
    size, cycled = _bytes(tensor), tensor.name in _CYCLED
    if tensor.name == "xz":
        return Fill(size, INT32, 0, 255)
    match tensor.dtype:
        case "uint8" | "int8":
            # -128 is no activation of a group; of weights, any byte will do.
            low = -127 if tensor.name == "xq" and tensor.dtype == "int8" else -128
            return Fill(size, BYTES, low, 127, cycled=cycled)
        case "int32":
            return Fill(size, INT32, -1000, 1000, cycled=cycled)
        case "float16":
            return Fill(size, F16, cycled=cycled)
        case "float32":
            return Fill(size, F32, -0.03, 0.03, cycled=cycled)
        case "uint16" | "int16":  # bfloat16 as its bits, among others
            return Fill(size, F16, cycled=cycled)
    raise AssertionError(tensor)


def _lists(tensors: Sequence[Tensor], layer: LinearShape) -> dict[str, Fill]:
    """What sparse weights list, if they do, by name: lists of one length, at equal distances."""
    shapes = {t.name: t.shape for t in tensors}
    if "starts" not in shapes:
        return {}
    if layer.window == COLUMNS:
        return _columns(tensors, layer)
    lists, most = shapes["starts"][0] - 1, shapes["places"][0]
    group = shapes["places"][1] if len(shapes["places"]) > 1 else 1  # places of an entry
    each = layer.padded_k // group if group > 1 else most // lists
    used = max(1, round(_LISTED * each))
    unit = 1 if layer.in_lists else layer.padded_k // each  # of a place, in k or in blocks of it
    unit = listed_weights.PLACE if group > 1 else unit
    found = {"starts": Fill(4 * (lists + 1), STARTS, used)}
    if "halved" in shapes:  # all groups are
        found["halved"] = Fill(4 * lists, STARTS, used)
    for tensor in tensors:
        if tensor.at_most:
            size = _bytes(tensor) // most * lists * used
            found[tensor.name] = replace(_random(tensor), size=size, cycled=True)
    places = used * group
    low = unit * (each * group // places)
    found["places"] = replace(found["places"], kind=PLACES, low=low, high=places)
    return found


def _columns(tensors: Sequence[Tensor], layer: LinearShape) -> dict[str, Fill]:
    """The same of columns: lists of the first k of each word of a mask."""
    named = {t.name: t for t in tensors}
    lists, words = named["masks"].shape
    each = round(_LISTED * ROW_ALIGNMENT)
    halves = -(-words * each // named["columns"].shape[2])
    starts = np.arange(lists + 1, dtype=np.int32) * halves
    masks = np.full((lists, words), (1 << each) - 1, np.uint16)
    before = [at // ROW_ALIGNMENT * each for at, _ in pieces(layer)]
    fills = np.tile(np.array(before, np.uint16), (lists, 1))
    given: dict[str, np.ndarray] = {"starts": starts, "masks": masks, "fills": fills}
    found = {
        name: Fill(array.nbytes, GIVEN, given=array.tobytes()) for name, array in given.items()
    }
    listed = named["columns"]
    size = _bytes(listed) // listed.shape[0] * lists * halves
    return found | {"columns": replace(_random(listed), size=size, cycled=True)}


def _routes(shape: RoutedShape, knobs: dict[str, int]) -> dict[str, np.ndarray]:
    """Pairs of tokens and experts as evenly as can be, in tiles as the grouping kernel has them."""
    experts = np.arange(shape.pairs, dtype=np.int32) % shape.experts
    grouping = shape.grouping(knobs)
    if grouping is None:
        return {"experts": experts}
    tile_expert = np.full(grouping.tiles, -1, np.int32)
    tile_pairs = np.zeros((grouping.tiles, grouping.rows), np.int32)
    tile = 0
    for expert in range(shape.experts):
        pairs = np.flatnonzero(experts == expert).astype(np.int32)
        for at in range(0, len(pairs), grouping.rows):
            part = pairs[at : at + grouping.rows]
            tile_expert[tile] = expert
            tile_pairs[tile] = np.pad(part, (0, grouping.rows - len(part)), "edge")
            tile += 1
    return {"tile_expert": tile_expert, "tile_pairs": tile_pairs}


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
