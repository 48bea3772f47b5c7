"""Rows of a table by token."""

from __future__ import annotations

import numpy as np
from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.linear import linear_shape, packed_linear
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import embedding, linear, packed_embedding

_SAME = ("format", "group_size", "group_channels")  # of a table and of a layer that shares it
_PAIRS = (("table", "weight"), ("scales", "scales"), ("zero_points", "zero_points"))


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
        group_channels=int(attrs["group_channels"]),
    )
    shared = _layer_of_table(op, arrays, emitter)
    if shared is not None:
        of_layer, shape = shared
        packed = packed_linear(emitter, of_layer, shape)
        wanted = [packed[t.name] for t in packed_embedding.operands(shape, emitter.isa)]
        operands = [emitter.weight(*part) for part in wanted]
        kernel = packed_embedding.build(shape, emitter.isa)
        return emitter.call(kernel, [call.args[0], *operands])["y"]
    operands = [emitter.weight(expr.name, arrays[name]) for name, expr in named.items()]
    return emitter.call(embedding.build(op), [call.args[0], *operands])["y"]


def _layer_of_table(
    op: embedding.EmbeddingOp, arrays: dict[str, np.ndarray], emitter: KernelEmitter
) -> tuple[dict[str, relax.Expr], linear.LinearShape] | None:
    """A linear layer, the head of most models, whose weight is the table: its operands, and its
    shape for as many rows. The table is then stored once, as that layer reads it."""
    for call in emitter.linears:
        attrs, named = call.attrs, ops.operands(call)
        same = all(attrs[key] == getattr(op, key) for key in _SAME)
        if not same or (int(attrs["n"]), int(attrs["k"])) != (op.vocab, op.dim):
            continue
        shape = linear_shape(attrs, op.m, named, emitter)
        pairs = (
            (arrays.get(of_table), emitter.array(named[of_layer]) if of_layer in named else None)
            for of_table, of_layer in _PAIRS
        )
        if packed_embedding.readable(shape) and all(_equal(a, b) for a, b in pairs):
            return named, shape
    return None


def _equal(of_table: np.ndarray | None, of_layer: np.ndarray | None) -> bool:
    """Whether both mean the same; a table may have one number where a layer has many."""
    if of_table is None or of_layer is None:
        return of_table is of_layer
    single = of_table.shape == (1,)
    whole = np.broadcast_to(of_table, of_layer.shape) if single else of_table
    return whole.dtype == of_layer.dtype and np.array_equal(whole, of_layer)
