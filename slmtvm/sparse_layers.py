"""What becomes of layers with zeros on each target: what ``slmtvm inspect`` says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmtvm.ir.model import LayerReport
from slmtvm.passes.lower_kernels.sparse import LIMIT
from slmtvm.schedules import isa
from slmtvm.schedules.isa import PAIRS
from slmtvm.schedules.linear import (
    LinearShape,
    blocks,
    columns,
    listed_blocks,
    listed_weights,
    pairs,
    rows_in_lanes,
    windows,
)
from slmtvm.target import Target, known_targets

_INT4_BITS, _PRUNED_BITS = 4.5, 6  # a weight of int4 in groups of 32; of int8 with places, 2:4
_ROWS = (1, 64)  # of a step that decodes, and of one that reads a prompt


def sparse_lines(layers: Sequence[LayerReport]) -> list[str]:
    """A line for all layers that have the same pattern, format and fate."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.sparsity and layer.kind == "linear":
            groups.setdefault(f"{_described(layer)}: {_fate(layer)}", []).append(layer)
    return [
        f"{len(found)} layers of {text}" if len(found) > 1 else f"{found[0].name}: {text}"
        for text, found in groups.items()
    ]


def _described(layer: LayerReport) -> str:
    return f"{layer.format}, {layer.sparsity}, {layer.zeros:.0%} zeros"


def expected_times(layer: LayerReport) -> dict[str, float]:
    """For each target what skipping zeros would take of the dense kernel's time, for one token or
    for several, whichever is more; empty where no kernel of the layer's format skips any."""
    if PAIRS.name in layer.windows:
        return _of_pairs(layer)
    if layer.format != "int8" or layer.group_size or layer.group_channels:
        return {}
    n, k = layer.shape
    found = {}
    for name in known_targets():
        primitives = isa.get(Target.load(name).isa)
        size = f"{primitives.for_blocks.block_channels}x{primitives.k_step}"
        used = layer.blocks_used[size]
        found[name] = min(
            max(_of_blocks(m, n, k, primitives, used) for m in _ROWS),
            max(_of_columns(m, n, k, primitives, layer.blocks_used) for m in _ROWS),
            *(
                max(windows.relative_time(window, primitives, m) for m in _ROWS)
                for window in layer.windows
                if window in primitives.window_times
            ),
        )
    return found


def _times_of_many_rows(layer: LayerReport) -> dict[str, float]:
    """The same for steps of many rows alone, the others computing the zeros."""
    n, k = layer.shape
    found = {}
    for name in known_targets():
        primitives = isa.get(Target.load(name).isa)
        shape = LinearShape(rows_in_lanes.MIN_ROWS, n, k, "int8", "row_u8")
        if primitives.listed_blocks is not None:
            used = layer.blocks_used[f"1x{primitives.k_step}"]
            found[name] = listed_blocks.relative_time(shape, primitives, used)
        if primitives.listed_weights is not None and k <= listed_weights.MAX_K:
            used = (1 - layer.zeros) / listed_weights.USUAL_FILL
            time = listed_weights.relative_time(shape, primitives, used)
            found[name] = min(time, found.get(name, time))
    return found


def _of_pairs(layer: LayerReport) -> dict[str, float]:
    n, k = layer.shape
    found = {}
    for name in known_targets():
        primitives = isa.get(Target.load(name).isa)
        if primitives.pair_times is None:
            found[name] = float("inf")
        else:
            shapes = (LinearShape(m, n, k, "int4", "block", layer.group_size) for m in _ROWS)
            found[name] = max(pairs.relative_time(shape, primitives) for shape in shapes)
    return found


def _of_blocks(m: int, n: int, k: int, primitives: isa.Isa, used: float) -> float:
    return blocks.relative_time(LinearShape(m, n, k, "int8", "row_u8"), primitives, used)


def _of_columns(m: int, n: int, k: int, primitives: isa.Isa, used: Mapping[str, float]) -> float:
    if primitives.column_costs is None or k > columns.MAX_K:
        return float("inf")
    shape = LinearShape(m, n, k, "int8", "row_u8")
    return columns.relative_time(shape, primitives, used[f"{columns.CHANNELS}x1"])


def _fate(layer: LayerReport) -> str:
    times = expected_times(layer)
    skipping = [f"{name} ({time:.2f})" for name, time in times.items() if time <= LIMIT]
    said = []
    if skipping:
        said.append(
            f"zeros are skipped on {', '.join(skipping)} (of the dense kernel's time, modelled)"
        )
    dense = [name for name in times if times[name] > LIMIT]
    if dense and PAIRS.name in layer.windows:
        said.append(f"computed as dense on {', '.join(dense)}; --sparse {PAIRS.name} skips zeros")
    elif dense:
        said.append(f"too few zeros that {', '.join(dense)} could skip: computed as dense")
        many = _times_of_many_rows(layer)
        skipping = [f"{name} ({many[name]:.2f})" for name in dense if many.get(name, 1) <= LIMIT]
        if skipping:
            said.append(
                f"but for steps of {rows_in_lanes.MIN_ROWS} rows and more on {', '.join(skipping)}"
            )
    if not times and layer.sparsity in ("2:4", "1:4") and layer.format == "int4":
        said.append(
            "computed as dense: kernels take groups of 32 or more whose weights, less their zero "
            "points, are -8 to 7 (quantize with --symmetric)"
        )
    elif not times:
        said.append("no kernel skips zeros of this format: computed as dense")
    if layer.sparsity == "2:4" and layer.format == "int8":
        said.append(
            f"int4 in groups reads less from memory: {_INT4_BITS} bits a weight, where 2:4 in int8 "
            f"takes {_PRUNED_BITS}"
        )
    return "; ".join(said)
