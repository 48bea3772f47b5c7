"""Attention of tokens over those before them, or over all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.masks import limits_of, mask_positions
from slmtvm.passes.lower_kernels.positions import position_table
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import attention
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.vector import LANES


@handles("slm.qkv_attention", by_session=True)
def _attention(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    projections = list(call.args)[: int(attrs["inputs"])]
    m, _ = shape_of(projections[0])
    causal = str(attrs["mask"]) == "causal"
    cached = causal and emitter.model.kind != "encoder"
    capacity = emitter.capacity if cached else attention.capacity_of(m)
    tables = [
        position_table(named[name], capacity, emitter) for name in ("cos", "sin") if name in named
    ]
    by_key = str(attrs["bias_by"]) == "key"
    if by_key:
        bias, bias_zero = _key_bias(named["bias"], capacity, emitter), 0
    else:
        bias, bias_zero = _distance_bias(named.get("bias"), capacity if causal else 0, emitter)
    shape = attention.AttentionShape(
        m=m,
        num_heads=int(attrs["num_heads"]),
        num_kv_heads=int(attrs["num_kv_heads"]),
        head_dim=int(attrs["head_dim"]),
        capacity=capacity,
        scale=float(attrs["scale"]),
        mask=str(attrs["mask"]),
        rotary_dim=2 * shape_of(tables[0])[1] if tables else 0,
        interleaved=bool(int(attrs["interleaved"])),
        table_rows=capacity if tables else 0,
        kv_dtype=emitter.kv_dtype if cached else "float32",
        separate=len(projections) > 1,
        q_eps=float(attrs["q_eps"]) if "q_gamma" in named else None,
        k_eps=float(attrs["k_eps"]) if "k_gamma" in named else None,
        window=int(attrs["window"]),
        chunk=int(attrs["chunk"]),
        softcap=float(attrs["softcap"]),
        bias_columns=shape_of(bias[0])[1] if bias else 0,
        bias_zero=bias_zero,
        bias_by_key=by_key,
        roundings=ops.parse_roundings(str(attrs["roundings"])),  # type: ignore[arg-type]
        sum_roundings=ops.parse_roundings(str(attrs["sum_roundings"])),  # type: ignore[arg-type]
        weight_roundings=ops.parse_roundings(str(attrs["weight_roundings"])),  # type: ignore[arg-type]
        # Of an encoder-decoder, only the attention of its source sees all.
        mask_positions=mask_positions(
            emitter.model, of_source=emitter.model.kind == "encoder-decoder" and not causal
        ),
        stateless=causal and not cached,
        has_sinks="sinks" in named,
        divided=emitter.isa.divides_heads and m == 1 and cached,
        whole=shape_of(named["k_basis"])[1] if "k_basis" in named else 0,
    )
    shape = attention.suited(shape, emitter.isa)
    if cached and shape.sight and emitter.step_rows:
        shape = replace(
            shape, ring=attention.ring_of(shape.sight, emitter.step_rows, emitter.capacity)
        )
    gammas = [
        emitter.weight(named[name].name, emitter.array(named[name]))
        for name in ("q_gamma", "k_gamma")
        if name in named
    ]
    bases = [
        emitter.weight(named[name].name, emitter.array(named[name]))
        for name in ("q_basis", "k_basis", "v_basis")
        if name in named
    ]
    inputs = [*projections, *tables, *gammas, *bases]
    lists: list[relax.Var] = []
    if "visible" in named:
        shape, lists = _block_lists(named["visible"], shape, emitter)
    sinks = [emitter.weight(e.name, emitter.array(e)) for n, e in named.items() if n == "sinks"]
    shared = [*bias, *lists, *sinks, *limits_of(shape, emitter), *emitter.numbers(shape.numbers)]
    if not cached:
        made = emitter.call(attention.build_append(shape), inputs)
        caches = [made[t.name] for t in shape.cache]
        return emitter.call(_attend(shape, emitter), [made["q"], *shared, *caches])["o"]
    layer = int(attrs["layer"])
    caches = [emitter.cache(f"layer{layer}.{t.name}", t) for t in shape.cache]
    if shape.ring:
        emitter.rings.update({f"layer{layer}.{t.name}": shape.ring for t in shape.cache})
        # Back at position p, the first one that is seen is p + 1 - sight.
        reach = shape.ring + 1 - shape.sight
        emitter.seek_reach = min(emitter.seek_reach or reach, reach)
    if m == 1 and not emitter.fills:
        return _decode(shape, [*inputs, *shared], sinks, caches, emitter)
    q = emitter.call(attention.build_append(shape), [*inputs, *caches])["q"]
    if emitter.fills:
        return q
    return emitter.call(_attend(shape, emitter), [q, *shared, *caches])["o"]


def _attend(shape: attention.AttentionShape, emitter: KernelEmitter) -> Kernel:
    knobs = emitter.knobs("attend", shape)
    shape = replace(shape, padded=emitter.skips_padding(shape.m))
    return attention.build_tuned("attend", shape, emitter.isa, knobs)


def _decode(
    shape: attention.AttentionShape,
    inputs: list[relax.Expr],
    sinks: list[relax.Var],
    caches: list[relax.Var],
    emitter: KernelEmitter,
) -> relax.Expr:
    """Attention of one token: in one kernel, or in two that share a single kv head."""
    if attention.parts_of(shape) == 1:
        knobs = emitter.knobs("decode", shape)
        kernel = attention.build_tuned("decode", shape, emitter.isa, knobs)
        return emitter.call(kernel, [*inputs, *caches])["o"]
    scores = emitter.call(attention.build_divided_scores(shape), [*inputs, *caches])["scores"]
    values = [c for c, t in zip(caches, shape.cache, strict=True) if t.name.startswith("v_")]
    read = [scores, *sinks, *emitter.numbers(shape.numbers), *values]
    return emitter.call(attention.build_divided_values(shape), read)["o"]


def _block_lists(
    expr: relax.Expr, shape: attention.AttentionShape, emitter: KernelEmitter
) -> tuple[attention.AttentionShape, list[relax.Var]]:
    """The shape with the lists of blocks that it sees, and these.

    Functions of fewer rows read the beginning of the same lists.
    """
    packed = emitter.array(expr)
    context = packed.shape[1]
    rows, key = LANES if not shape.causal else 2 * LANES, (expr.name, shape.num_kv_heads)
    if key not in emitter.lists:
        capacity = attention.capacity_of(context)
        visible = np.unpackbits(packed, axis=-1)[:, :, :context]
        emitter.lists[key] = attention.block_tables(
            visible != 0, shape.num_kv_heads, capacity, rows=rows
        )
    mask, tables = emitter.lists[key]
    label = f"{expr.name}@{rows}x{shape.num_kv_heads}"
    given = [emitter.weight(f"{label}.{t.name}", tables[t.name]) for t in mask.tensors]
    return replace(shape, blocks=mask), given


def _distance_bias(
    expr: relax.Expr | None, capacity: int, emitter: KernelEmitter
) -> tuple[list[relax.Var], int]:
    """A bias by distance with the columns that a kernel wants, and the column of distance 0.

    capacity: positions of the cache that a causal bias is for; 0 for a bidirectional one.
    """
    if expr is None:
        return [], 0
    table = emitter.array(expr)
    zero = table.shape[1] - 1 if capacity else table.shape[1] // 2
    # Positions beyond the context are padding: any bias will do.
    before = max(0, capacity - 1 - zero) if capacity else 0
    padded = np.pad(table, ((0, 0), (before, attention.BIAS_MARGIN)), "edge")
    name = f"{expr.name}:{before}+{attention.BIAS_MARGIN}"
    return [emitter.weight(name, padded)], zero + before


def _key_bias(expr: relax.Expr, capacity: int, emitter: KernelEmitter) -> list[relax.Var]:
    """A bias by the key's position, with a column for each of ``capacity``."""
    table = emitter.array(expr)
    # Positions beyond the context are padding: any bias will do.
    columns = max(capacity, attention.capacity_of(table.shape[1]))
    padded = np.pad(table, ((0, 0), (0, columns - table.shape[1])), "edge")
    return [emitter.weight(f"{expr.name}:{columns}", padded)]
