"""Quantizes all rows of a step with one range: ONNX DynamicQuantizeLinear on the whole tensor."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.rows.epilogue import quantize_row_u8
from slmtvm.schedules.rows.op import RowOp
from slmtvm.schedules.vector import LANES, Expr


def build_quantize_tensor(op: RowOp) -> Kernel:
    """(y, low, high) -> xq, xs, xz, each row as ``op``, a "row_u8", has it, but with one range.

    y float32 (m, d), low and high are the outputs of a row kernel with the epilogue "range"; the
    range is that of the ``valid`` first rows. One block for each row.
    """
    assert op.epilogue == "row_u8", op
    padded = -(-op.m // LANES) * LANES
    inputs = (
        Tensor("y", (op.m, op.d), "float32"),
        Tensor("low", (padded,), "float32"),
        Tensor("high", (padded,), "float32"),
    )
    outputs = tuple(t for t in op.outputs if t.name in ("xq", "xs", "xz"))
    tensors = (*inputs, *outputs)

    def body(row: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        valid = arguments[-1]
        low = T.alloc_buffer((LANES,), "float32", scope="local")
        high = T.alloc_buffer((LANES,), "float32", scope="local")
        zero = vec.splat(0.0)
        vec.store(low, T.int32(0), vec.splat(-0.0))
        vec.store(high, T.int32(0), zero)
        with T.serial(0, T.bind((valid + (LANES - 1)) // LANES)) as part:
            lane = T.bind(T.ramp(part * LANES, 1, LANES))
            inside = lane < vec.splat(valid)
            for kept, source, combine in (
                (low, buffers["low"], vec.lowest),
                (high, buffers["high"], vec.highest),
            ):
                given = T.bind(T.Select(inside, vec.load(source, part * LANES), zero))
                vec.store(kept, T.int32(0), combine(given, vec.load(kept, T.int32(0))))
        lowest = vec.across(vec.load(low, T.int32(0)), vec.lowest)
        highest = vec.across(vec.load(high, T.int32(0)), vec.highest)
        quantize_row_u8(
            buffers["y"], row * op.d, op.d, lowest, highest, buffers, row, op.k_padded, op.storage
        )

    name = f"quantize_tensor_{op.storage}_k{op.k_padded}_m{op.m}_d{op.d}"
    return define(
        name, tensors, body, grid=op.m, outputs=[t.name for t in outputs], scalars=["valid"]
    )
