"""Attention over a source, whose keys and values are remembered."""

from __future__ import annotations

from dataclasses import replace

from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.masks import limits_of, mask_positions
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import attention

# Begins the names of the state that holds a source's keys and values.
SOURCE_CACHE = "source"


@handles("slm.remember_rows")
def _remember(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, kv = call.args
    shape = _cross_shape(call, shape_of(x)[0], int(call.attrs["num_kv_heads"]), 1.0, emitter)
    emitter.call(attention.build_remember(shape), [kv, *_cross_caches(call, shape, emitter)])
    return x


@handles("slm.cross_attention", by_session=True)
def _cross_attention(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    q = call.args[0]
    heads, scale = int(call.attrs["num_heads"]), float(call.attrs["scale"])
    shape = _cross_shape(call, shape_of(q)[0], heads, scale, emitter)
    roundings, weight_roundings = (
        ops.parse_roundings(str(call.attrs[name])) for name in ("roundings", "weight_roundings")
    )
    shape = replace(shape, roundings=roundings, weight_roundings=weight_roundings)  # type: ignore[arg-type]
    caches = _cross_caches(call, shape, emitter)
    inputs = [q, *limits_of(shape, emitter), *emitter.numbers(shape.numbers), *caches]
    return emitter.call(attention.build_attend(shape), inputs)["o"]


def _cross_shape(
    call: relax.Call, rows: int, num_heads: int, scale: float, emitter: KernelEmitter
) -> attention.AttentionShape:
    shape = attention.AttentionShape(
        m=rows,
        num_heads=num_heads,
        num_kv_heads=int(call.attrs["num_kv_heads"]),
        head_dim=int(call.attrs["head_dim"]),
        capacity=attention.capacity_of(emitter.model.source_context),
        scale=scale,
        mask="bidirectional",
        kv_dtype=emitter.kv_dtype,
        mask_positions=mask_positions(emitter.model, of_source=True),
    )
    return attention.suited(shape, emitter.isa)


def _cross_caches(
    call: relax.Call, shape: attention.AttentionShape, emitter: KernelEmitter
) -> list[relax.Var]:
    layer = int(call.attrs["layer"])
    return [emitter.cache(f"{SOURCE_CACHE}{layer}.{t.name}", t) for t in shape.cache]
