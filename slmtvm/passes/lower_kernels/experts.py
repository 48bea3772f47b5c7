"""Mixtures of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tvm import relax

from slmtvm.ir import expert_roundings, ops
from slmtvm.ir.experts import GATED, ROW_MULTIPLE, Routing
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.linear import linear_shape
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import experts


@handles("slm.route")
def _route(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    logits, named, routing = call.args[0], ops.operands(call), Routing.of(call.attrs)
    op = experts.RouteOp(
        m=shape_of(logits)[0],
        experts=routing.experts,
        top_k=routing.top_k,
        score=routing.score,
        normalize=routing.normalize,
        eps=routing.eps,
        scale=routing.scale,
        has_bias="bias" in named,
        roundings=tuple(expert_roundings.parse(routing.roundings).items()),
    )
    bias = [emitter.weight(e.name, emitter.array(e)) for e in named.values()]
    made = emitter.call(experts.build_route(op), [logits, *bias])
    return relax.Tuple([made["experts"], made["weights"]])


@handles("slm.routed_linear")
def _routed_linear(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    count = int(attrs["inputs"])
    inputs, chosen = list(call.args)[:count], call.args[count]
    m, top_k = shape_of(chosen)
    shape = experts.RoutedShape(
        m=m,
        top_k=top_k,
        experts=int(attrs["experts"]),
        layer=linear_shape(attrs, m, named, emitter),
        by_pair=bool(int(attrs["by_pair"])),
    )
    layout = f"experts-{experts.layout(shape, emitter.isa)}"
    packed = emitter.packed(
        named,
        layout,
        dataclasses.replace(shape.layer, m=1, has_bias=False),
        lambda weights: experts.pack(shape, emitter.isa, weights),
    )
    operands = [emitter.weight(name, array) for name, array in packed.values()]
    if "bias" in named:
        operands.append(emitter.weight(named["bias"].name, emitter.array(named["bias"])))
    routes = [chosen]
    knobs = emitter.knobs("routed_linear", shape)
    grouping = shape.grouping(knobs)
    if grouping is not None:
        made = emitter.once(
            (chosen, grouping), lambda: emitter.call(experts.build_group(grouping), [chosen])
        )
        routes = [made["tile_expert"], made["tile_pairs"]]
    kernel = experts.build_linear(shape, emitter.isa, knobs)
    return emitter.call(kernel, [*inputs, *routes, *operands])["y"]


@handles("slm.routed_row")
def _routed_row(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (x, chosen), attrs = call.args[:2], call.attrs
    activation, tables = str(attrs["activation"]), expert_roundings.among(ops.operands(call))
    m, top_k = shape_of(chosen)
    quantized = bool(int(attrs["quantized"]))
    op = experts.RoutedRowOp(
        m=m,
        top_k=top_k,
        experts=_experts_of(tables),
        d=shape_of(x)[1] // (2 if activation in GATED else 1),
        activation=activation,
        points=tuple(tables),
        by_pair=bool(int(attrs["by_pair"])),
        storage=emitter.isa.row_dtype if quantized else "",
        k_multiple=ROW_MULTIPLE,
    )
    made = emitter.call(experts.build_row(op), [x, chosen, *_tables(tables, emitter)])
    return relax.Tuple([made[name] for name in ("xq", "xs", "xz")]) if quantized else made["y"]


@handles("slm.combine")
def _combine(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (partial, weights), named = call.args[:2], ops.operands(call)
    (m, top_k), d = shape_of(weights), shape_of(partial)[1]
    if not named:
        return emitter.call(experts.build_combine(m, top_k, d), [partial, weights])["y"]
    tables = expert_roundings.among(named)
    kernel = experts.build_rounded_combine(m, top_k, d, _experts_of(tables), tuple(tables))
    inputs = [partial, weights, named["chosen"], *_tables(tables, emitter)]
    return emitter.call(kernel, inputs)["y"]


def _experts_of(tables: Mapping[str, relax.Expr]) -> int:
    """How many experts roundings are of."""
    return shape_of(next(iter(tables.values())))[0]


def _tables(tables: Mapping[str, relax.Expr], emitter: KernelEmitter) -> list[relax.Expr]:
    return [emitter.weight(table.name, emitter.array(table)) for table in tables.values()]
