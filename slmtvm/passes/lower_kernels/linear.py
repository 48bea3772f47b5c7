"""Linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import linear
from slmtvm.schedules.linear import rows_in_lanes, turned_pairs


def linear_shape(
    attrs: tvm.ir.Attrs, m: int, named: Mapping[str, relax.Expr], emitter: KernelEmitter
) -> linear.LinearShape:
    """The shape of a linear layer of m rows with these attributes and operands."""
    group_size = int(attrs["group_size"])
    scales, offsets = (
        emitter.array(named[name]) if name in named else None for name in ("scales", "zero_points")
    )
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
        scale_dtype=linear.pick_scale_dtype(scales)
        if group_size and scales is not None
        else "float32",
        float_zero_points=offsets is not None and offsets.dtype.kind == "f",
        group_channels=int(attrs.get("group_channels", 0)),
    )


def without_rows(shape: linear.LinearShape) -> linear.LinearShape:
    """What the packed weights of a layer depend on."""
    return dataclasses.replace(shape, m=1, has_bias=False, has_residual=False)


@handles("slm.float_linear")
@handles("slm.quantized_linear")
def _linear(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    inputs = list(call.args)[: int(attrs["inputs"])]
    shape = linear_shape(attrs, shape_of(inputs[0])[0], named, emitter)
    chosen = emitter.sparse.get(emitter.operand_names(named))
    if chosen is not None and (shape.m >= rows_in_lanes.MIN_ROWS or not chosen.in_lists):
        shape = dataclasses.replace(
            shape, sparse=True, window=chosen.window, has_zero_points=chosen.has_zero_points
        )
        shape = dataclasses.replace(shape, turned=linear.turns(shape, emitter.isa))
    if shape.in_turned_pairs:
        inputs = _turned_pairs(inputs, shape, emitter)
    elif shape.in_lists or shape.turned:
        inputs = [_turned(inputs[0], shape, emitter), *inputs[1:]]
    packed = packed_linear(emitter, named, shape)
    operands = [emitter.weight(name, array) for name, array in packed.values()]
    if "bias" in named:
        operands.append(emitter.weight(named["bias"].name, emitter.array(named["bias"])))
    if "residual" in named:
        operands.append(named["residual"])
    knobs = emitter.knobs("linear", shape)
    padded = emitter.skips_padding(shape.m) and not shape.in_lists
    shape = dataclasses.replace(shape, padded=padded)
    kernel = linear.build(shape, emitter.isa, knobs)
    return emitter.call(kernel, [*inputs, *operands])["y"]


def _turned(x: relax.Expr, shape: linear.LinearShape, emitter: KernelEmitter) -> relax.Expr:
    """Rows as a kernel takes them whose vectors hold rows: turned once for all layers of a step."""
    kernel = linear.turning(shape, emitter.isa)
    name = str(kernel.func.attrs["global_symbol"])
    return emitter.once((name, x), lambda: emitter.call(kernel, [x])["xt"])


def _turned_pairs(
    inputs: list[relax.Expr], shape: linear.LinearShape, emitter: KernelEmitter
) -> list[relax.Expr]:
    """The same where pairs of activations lie together."""
    kernel = turned_pairs.turning(shape, emitter.isa)
    key = ("turned pairs", inputs[0])
    made = emitter.once(key, lambda: emitter.call(kernel, inputs[:2]))
    return [made["xp"], made["xr"]]


def packed_linear(
    emitter: KernelEmitter, named: Mapping[str, relax.Expr], shape: linear.LinearShape
) -> dict[str, tuple[str, np.ndarray]]:
    """The parts of a layer's weight as its kernel reads them: what each is called, and its
    value."""
    return emitter.packed(
        named,
        linear.layout(shape, emitter.isa),
        without_rows(shape),
        lambda weights: linear.pack(shape, emitter.isa, weights),
    )
