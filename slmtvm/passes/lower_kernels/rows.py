"""Norms and gates of whole rows."""

from __future__ import annotations

import dataclasses

from tvm import relax

from slmtvm.ir.fused import padded_features, rounding_of
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import rows


@handles("slm.row")
def _row(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, *params = call.args
    m, width = shape_of(x)
    attrs = call.attrs
    prologue, epilogue = str(attrs["prologue"]), str(attrs["epilogue"])
    # Rows of different sessions have each a range of their own, as tokens one by one do.
    whole, groups = epilogue == "tensor_u8" and not emitter.of_sessions, int(attrs["groups"])
    epilogue = "row_u8" if epilogue == "tensor_u8" else epilogue
    scale, low, high = rounding_of(call)
    pair = str(attrs["pair"])
    op = rows.RowOp(
        prologue=prologue,
        epilogue=epilogue,
        m=m,
        d=width // 2 if prologue in rows.GATED else width // groups,
        eps=float(attrs["eps"]),
        group_size=int(attrs["group_size"]),
        storage=emitter.isa.row_dtype,
        keep_f32=bool(int(attrs["keep_float"])),
        scale=scale,
        low=low,
        high=high,
        groups=groups,
        pair=rows.Pair.parse(pair) if pair else None,
        other=_other(params[0], m) if pair else "rows",
        unit=float(attrs["unit"]),
    )
    floats = epilogue in ("f32", "rounded")
    assert floats or op.k_padded == padded_features(op.d, epilogue, op.group_size)
    # Weights are vectors; what lies in rows is the other side of a pair.
    operands = [
        p if len(shape_of(p)) == 2 else emitter.weight(p.name, emitter.array(p)) for p in params
    ]
    if whole:
        ranged = dataclasses.replace(op, epilogue="range", keep_f32=False)
        made = emitter.call(rows.build(ranged), [x, *operands, *emitter.numbers(ranged.numbers)])
        kernel = rows.build_quantize_tensor(op)
        results = made | emitter.call(kernel, [made[name] for name in ("y", "low", "high")])
    else:
        results = _emit(op, [x, *operands, *emitter.numbers(op.numbers)], emitter)
    if floats:
        return results["y"]
    third = "xsum" if epilogue == "block" else "xz"
    fields = ["xq", "xs", third] + (["y"] if op.keep_f32 else [])
    return relax.Tuple([results[name] for name in fields])


def _emit(op: rows.RowOp, inputs: list[relax.Expr], emitter: KernelEmitter) -> dict[str, relax.Var]:
    if not emitter.isa.rows_by_block or not rows.by_block.can_build(op):
        return emitter.call(rows.build(op), inputs)
    given = list(inputs)
    if rows.by_block.has_statistics(op):
        given += emitter.call(rows.by_block.build_statistics(op), inputs).values()
    return emitter.call(rows.by_block.build_blocks(op), given)


def _other(y: relax.Expr, m: int) -> str:
    """How the other side of a pair of m rows lies."""
    shape = shape_of(y)
    if len(shape) == 1:
        return "features"
    return "number" if shape == (m, 1) else "rows"
