"""One function for each fused op: which kernels compute it, on which operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.fused import GATED_PROLOGUES, padded_features, rounding_of
from slmtvm.schedules import attention, convolution, elementwise, embedding, linear, rows

if TYPE_CHECKING:
    from slmtvm.passes.lower_kernels import KernelEmitter

Handler = Callable[[relax.Call, "KernelEmitter"], relax.Expr]
CACHE_BLOCK = 16  # positions; the KV cache holds whole blocks
SOURCE_CACHE = "source"  # begins the names of the state that holds a source's keys and values
HANDLERS: dict[str, Handler] = {}


def handles(name: str) -> Callable[[Handler], Handler]:
    """Decorator: the function below lowers the op ``name``."""

    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        return handler

    return register


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The shape of a value, all of it known."""
    return tuple(int(d) for d in expr.ty.shape.values)


@handles("slm.row")
def _row(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, *params = call.args
    m, width = shape_of(x)
    attrs = call.attrs
    prologue, epilogue = str(attrs["prologue"]), str(attrs["epilogue"])
    whole, groups = epilogue == "tensor_u8", int(attrs["groups"])
    scale, low, high = rounding_of(call)
    op = rows.RowOp(
        prologue=prologue,
        epilogue="row_u8" if whole else epilogue,
        m=m,
        d=width // 2 if prologue in GATED_PROLOGUES else width // groups,
        eps=float(attrs["eps"]),
        group_size=int(attrs["group_size"]),
        storage=emitter.isa.row_dtype,
        keep_f32=bool(int(attrs["keep_float"])),
        scale=scale,
        low=low,
        high=high,
        groups=groups,
    )
    floats = epilogue in ("f32", "rounded")
    assert floats or op.k_padded == padded_features(op.d, epilogue, op.group_size)
    operands = [emitter.weight(p.name, emitter.array(p)) for p in params]
    if whole:
        ranged = dataclasses.replace(op, epilogue="range", keep_f32=False)
        made = emitter.call(rows.build(ranged), [x, *operands])
        kernel = rows.build_quantize_tensor(op)
        results = made | emitter.call(kernel, [made[name] for name in ("y", "low", "high")])
    else:
        results = emitter.call(rows.build(op), [x, *operands])
    if floats:
        return results["y"]
    third = "xsum" if epilogue == "block" else "xz"
    fields = ["xq", "xs", third] + (["y"] if op.keep_f32 else [])
    return relax.Tuple([results[name] for name in fields])


@handles("slm.qkv_attention")
def _attention(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    projections = list(call.args)[: int(attrs["inputs"])]
    m, _ = shape_of(projections[0])
    causal = str(attrs["mask"]) == "causal"
    capacity = emitter.capacity if causal else -(-m // CACHE_BLOCK) * CACHE_BLOCK
    tables = [
        _position_table(named[name], capacity, emitter) for name in ("cos", "sin") if name in named
    ]
    weight_roundings = ops.parse_roundings(str(attrs["weight_rounding"]))
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
        kv_dtype=emitter.kv_dtype if causal else "float32",
        native_f16=emitter.isa.native_f16,
        accumulators=attention.default_accumulators(emitter.isa.name),
        separate=len(projections) > 1,
        q_eps=float(attrs["q_eps"]) if "q_gamma" in named else None,
        k_eps=float(attrs["k_eps"]) if "k_gamma" in named else None,
        window=int(attrs["window"]),
        softcap=float(attrs["softcap"]),
        bias_columns=shape_of(bias[0])[1] if bias else 0,
        bias_zero=bias_zero,
        roundings=ops.parse_roundings(str(attrs["roundings"])),  # type: ignore[arg-type]
        weight_rounding=weight_roundings[0] if weight_roundings else None,  # type: ignore[arg-type]
    )
    gammas = [
        emitter.weight(named[name].name, emitter.array(named[name]))
        for name in ("q_gamma", "k_gamma")
        if name in named
    ]
    inputs = [*projections, *tables, *gammas]
    if not causal:
        made = emitter.call(attention.build_append(shape), inputs)
        caches = [made[t.name] for t in shape.cache]
        return emitter.call(attention.build_attend(shape), [made["q"], *bias, *caches])["o"]
    layer = int(attrs["layer"])
    caches = [emitter.cache(f"layer{layer}.{t.name}", t) for t in shape.cache]
    if m == 1:
        return _decode(shape, [*inputs, *bias], caches, emitter)
    q = emitter.call(attention.build_append(shape), [*inputs, *caches])["q"]
    return emitter.call(attention.build_attend(shape), [q, *bias, *caches])["o"]


def _decode(
    shape: attention.AttentionShape,
    inputs: list[relax.Expr],
    caches: list[relax.Var],
    emitter: KernelEmitter,
) -> relax.Expr:
    """Attention of one token: in one kernel, or in two that share a single kv head."""
    if attention.parts_of(shape) == 1:
        return emitter.call(attention.build_decode(shape), [*inputs, *caches])["o"]
    scores = emitter.call(attention.build_divided_scores(shape), [*inputs, *caches])["scores"]
    values = [c for c, t in zip(caches, shape.cache, strict=True) if t.name.startswith("v_")]
    return emitter.call(attention.build_divided_values(shape), [scores, *values])["o"]


@handles("slm.rope")
def _rope(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, *given = call.args
    m, _ = shape_of(x)
    attrs = call.attrs
    tables = [_position_table(table, emitter.capacity, emitter) for table in given]
    rotation = attention.Rotation(
        int(attrs["head_dim"]), 2 * shape_of(tables[0])[1], bool(int(attrs["interleaved"]))
    )
    kernel = attention.build_rope(
        m, int(attrs["num_heads"]), rotation, emitter.capacity,
        causal=emitter.model.kind == "decoder",
    )  # fmt: skip
    return emitter.call(kernel, [x, *tables])["y"]


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


@handles("slm.remember_rows")
def _remember(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, kv = call.args
    shape = _cross_shape(call, shape_of(x)[0], int(call.attrs["num_kv_heads"]), 1.0, emitter)
    emitter.call(attention.build_remember(shape), [kv, *_cross_caches(call, shape, emitter)])
    return x


@handles("slm.cross_attention")
def _cross_attention(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    q = call.args[0]
    heads, scale = int(call.attrs["num_heads"]), float(call.attrs["scale"])
    shape = _cross_shape(call, shape_of(q)[0], heads, scale, emitter)
    caches = _cross_caches(call, shape, emitter)
    return emitter.call(attention.build_attend(shape), [q, *caches])["o"]


def _cross_shape(
    call: relax.Call, rows: int, num_heads: int, scale: float, emitter: KernelEmitter
) -> attention.AttentionShape:
    return attention.AttentionShape(
        m=rows,
        num_heads=num_heads,
        num_kv_heads=int(call.attrs["num_kv_heads"]),
        head_dim=int(call.attrs["head_dim"]),
        capacity=-(-emitter.model.source_context // CACHE_BLOCK) * CACHE_BLOCK,
        scale=scale,
        mask="bidirectional",
        kv_dtype=emitter.kv_dtype,
        native_f16=emitter.isa.native_f16,
        accumulators=attention.default_accumulators(emitter.isa.name),
    )


def _cross_caches(
    call: relax.Call, shape: attention.AttentionShape, emitter: KernelEmitter
) -> list[relax.Var]:
    layer = int(call.attrs["layer"])
    return [emitter.cache(f"{SOURCE_CACHE}{layer}.{t.name}", t) for t in shape.cache]


def _position_table(expr: relax.Expr, rows: int, emitter: KernelEmitter) -> relax.Var:
    """A table with a row for each position that a padded step can reach; the last row repeats."""
    table = emitter.array(expr)
    padding = max(0, rows - len(table))
    return emitter.weight(
        f"{expr.name}:{rows}", np.pad(table, ((0, padding), (0, 0)), "edge")[:rows]
    )


def linear_shape(
    attrs: tvm.ir.Attrs, m: int, named: Mapping[str, relax.Expr], arrays: Mapping[str, np.ndarray]
) -> linear.LinearShape:
    """The shape of a linear layer of m rows with these attributes and operands."""
    group_size = int(attrs["group_size"])
    offsets = arrays.get("zero_points")
    return linear.LinearShape(
        m=m,
        n=int(attrs["n"]),
        k=int(attrs["k"]),
        format=str(attrs["format"]),
        activation=str(attrs["activation"]),
        group_size=group_size,
        has_zero_points="zero_points" in named,
        has_bias="bias" in named,
        has_residual="residual" in named,
        scale_dtype=linear.pick_scale_dtype(arrays["scales"]) if group_size else "float32",
        float_zero_points=offsets is not None and offsets.dtype.kind == "f",
    )


def weight_arrays(named: Mapping[str, relax.Expr], emitter: KernelEmitter) -> dict[str, np.ndarray]:
    """The values of those operands of a linear layer that are packed together."""
    names = ("weight", "scales", "zero_points")
    return {name: emitter.array(named[name]) for name in names if name in named}


@handles("slm.float_linear")
@handles("slm.quantized_linear")
def _linear(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    inputs = list(call.args)[: int(attrs["inputs"])]
    arrays = weight_arrays(named, emitter)
    shape = linear_shape(attrs, shape_of(inputs[0])[0], named, arrays)
    label = f"{named['weight'].name}@{linear.layout(shape, emitter.isa)}"
    operands = packed_weights(
        emitter, label, linear.packed_weight_names(shape, emitter.isa),
        lambda: linear.pack(shape, emitter.isa, **arrays),
    )  # fmt: skip
    if "bias" in named:
        operands.append(emitter.weight(named["bias"].name, emitter.array(named["bias"])))
    if "residual" in named:
        operands.append(named["residual"])
    return emitter.call(linear.build(shape, emitter.isa), [*inputs, *operands])["y"]


def packed_weights(
    emitter: KernelEmitter, label: str, parts: list[str], pack: Callable[[], dict[str, np.ndarray]]
) -> list[relax.Var]:
    """The parts of a weight that ``pack`` makes, packed once for all functions that read it."""
    names = [f"{label}.{part}" for part in parts]
    if not all(name in emitter.weights for name in names):
        emitter.weights.update(zip(names, pack().values(), strict=True))
    return [emitter.weight(name, emitter.weights[name]) for name in names]


@handles("slm.embedding")
def _embedding(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    arrays = {name: emitter.array(expr) for name, expr in named.items()}
    op = embedding.EmbeddingOp(
        m=shape_of(call.args[0])[0],
        vocab=len(arrays["table"]),
        dim=int(attrs["dim"]),
        format=str(attrs["format"]),
        table_dtype=str(arrays["table"].dtype) if str(attrs["format"]) == "int8" else "int8",
        scale_shape=arrays["scales"].shape if "scales" in arrays else (),
        zero_points="zero_points" in arrays,
        group_size=int(attrs["group_size"]),
    )
    operands = [emitter.weight(expr.name, arrays[name]) for name, expr in named.items()]
    return emitter.call(embedding.build(op), [call.args[0], *operands])["y"]


@handles("slm.add_positions")
def _add_positions(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, table = call.args
    m, d = shape_of(x)
    kernel = elementwise.build_add_positions(m, d, emitter.capacity)
    return emitter.call(kernel, [x, _position_table(table, emitter.capacity, emitter)])["y"]


@handles("slm.position_rows")
def _position_rows(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    tokens, table = call.args
    kernel = elementwise.build_position_rows(
        shape_of(tokens)[0], shape_of(table)[1], emitter.capacity
    )
    return emitter.call(kernel, [_position_table(table, emitter.capacity, emitter)])["y"]


@handles("relax.add")
def _add(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    a, b = call.args
    if shape_of(a) != shape_of(b) or len(shape_of(a)) != 2:
        return call
    return emitter.call(elementwise.build_add(*shape_of(a)), [a, b])["y"]


@handles("relax.multiply")
def _multiply(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    for a, b in (list(call.args), list(call.args)[::-1]):
        if len(shape_of(a)) == len(shape_of(b)) == 2 and shape_of(b) in (
            shape_of(a),
            (shape_of(a)[0], 1),
        ):
            kernel = elementwise.build_multiply(shape_of(a)[0], shape_of(a)[1], shape_of(b)[1])
            return emitter.call(kernel, [a, b])["y"]
    return call


@handles("slm.short_conv")
def _short_conv(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, attrs, named = call.args[0], call.attrs, ops.operands(call)
    weight = emitter.array(named["weight"])
    shape = convolution.ConvShape(
        m=shape_of(x)[0],
        channels=int(attrs["channels"]),
        taps=len(weight),
        capacity=emitter.capacity,
        gated=bool(int(attrs["gated"])),
        has_bias="bias" in named,
    )
    operands = [emitter.weight(e.name, emitter.array(e)) for e in named.values()]
    cache = emitter.cache(f"conv{int(attrs['layer'])}", shape.cache)
    return emitter.call(convolution.build(shape), [x, *operands, cache])["y"]
