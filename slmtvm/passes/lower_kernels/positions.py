"""What depends on the positions of tokens."""

from __future__ import annotations

import numpy as np
from tvm import relax

from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import attention, elementwise
from slmtvm.schedules.kernel import Tensor

# Names the state that says of which text each token is.
SEGMENTS = "segments"


def position_table(expr: relax.Expr, rows: int, emitter: KernelEmitter) -> relax.Var:
    """A table with a row for each position that a padded step can reach; the last row repeats."""
    table = emitter.array(expr)
    padding = max(0, rows - len(table))
    return emitter.weight(
        f"{expr.name}:{rows}", np.pad(table, ((0, padding), (0, 0)), "edge")[:rows]
    )


@handles("slm.rope", by_session=True)
def _rope(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, *given = call.args
    m, _ = shape_of(x)
    attrs = call.attrs
    tables = [position_table(table, emitter.capacity, emitter) for table in given]
    rotation = attention.Rotation(
        int(attrs["head_dim"]), 2 * shape_of(tables[0])[1], bool(int(attrs["interleaved"]))
    )
    kernel = attention.build_rope(
        m, int(attrs["num_heads"]), rotation, emitter.capacity,
        causal=emitter.model.kind == "decoder",
    )  # fmt: skip
    return emitter.call(kernel, [x, *tables])["y"]


@handles("slm.add_positions", by_session=True)
def _add_positions(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, table = call.args
    m, d = shape_of(x)
    kernel = elementwise.build_add_positions(m, d, emitter.capacity)
    return emitter.call(kernel, [x, position_table(table, emitter.capacity, emitter)])["y"]


@handles("slm.segments")
def _segments(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (m,) = shape_of(call.args[0])
    kernel = elementwise.build_segments(m, emitter.capacity)
    state = emitter.cache(SEGMENTS, Tensor(SEGMENTS, (emitter.capacity,), "int32"))
    return emitter.call(kernel, [state])["y"]


@handles("slm.earlier")
def _earlier(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (tokens,) = call.args
    first = int(call.attrs["first"])
    kernel = elementwise.build_earlier(shape_of(tokens)[0], None if first < 0 else first)
    return emitter.call(kernel, [tokens])["y"]


@handles("slm.position_rows", by_session=True)
def _position_rows(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    tokens, table = call.args
    kernel = elementwise.build_position_rows(
        shape_of(tokens)[0], shape_of(table)[1], emitter.capacity
    )
    return emitter.call(kernel, [position_table(table, emitter.capacity, emitter)])["y"]
