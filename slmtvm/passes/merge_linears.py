"""Linear layers that read the same input become one layer with the outputs side by side."""

from __future__ import annotations

import numpy as np
from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.rewrite import Rewriter

_SAME = ("k", "format", "activation", "group_size", "group_channels")


def merge_linears(exprs: list[relax.Expr], rewriter: Rewriter) -> relax.Expr | None:
    """One value holding the columns of ``exprs`` in order, computed by one linear layer.

    None where they are not linear layers of one input in one format. Their weights are concatenated
    along the output features, bits unchanged.
    """
    calls = [rewriter.call_to(e, ops.LINEAR) for e in exprs]
    linears = [c for c in calls if c is not None]
    if len(linears) != len(exprs) or not all(_mergeable(linears[0], c) for c in linears[1:]):
        return None
    channels = int(linears[0].attrs["group_channels"])
    if channels and any(int(c.attrs["n"]) % channels for c in linears[:-1]):
        return None  # a block would hold channels of two layers
    operands = [ops.operands(c) for c in linears]
    names = [
        n for n in ("weight", "scales", "zero_points", "bias") if any(n in o for o in operands)
    ]
    merged: dict[str, relax.Expr] = {}
    for name in names:
        parts = [_part(name, o, c, rewriter) for o, c in zip(operands, linears, strict=True)]
        if any(p is None for p in parts) or len({p.dtype for p in parts if p is not None}) != 1:
            return None
        label = "+".join(o[name].name if name in o else "zero" for o in operands)
        arrays = [p for p in parts if p is not None]
        merged[name] = rewriter.add_param(label, np.concatenate(arrays))
    attrs = linears[0].attrs
    return rewriter.emit(
        ops.linear(
            linears[0].args[0],
            **merged,
            n=sum(int(c.attrs["n"]) for c in linears),
            k=int(attrs["k"]),
            format=str(attrs["format"]),
            activation=str(attrs["activation"]),
            group_size=int(attrs["group_size"]),
            group_channels=channels,
        )
    )


def _mergeable(a: relax.Call, b: relax.Call) -> bool:
    return a.args[0].same_as(b.args[0]) and all(a.attrs[key] == b.attrs[key] for key in _SAME)


def _part(
    name: str, operands: dict[str, relax.Expr], call: relax.Call, rewriter: Rewriter
) -> np.ndarray | None:
    """The operand of one layer with n rows; what a missing one stands for where it is so."""
    n = int(call.attrs["n"])
    if name == "bias" and name not in operands:
        return np.zeros(n, np.float32)
    if name == "zero_points" and name not in operands:
        scales = rewriter.array(operands["scales"])
        zeros = ops.DEFAULT_ZERO_POINTS[str(call.attrs["format"])]
        rows = len(scales) if scales is not None and int(call.attrs["group_channels"]) else n
        return None if scales is None else np.broadcast_to(zeros, (rows, *scales.shape[1:]))
    array = rewriter.array(operands[name]) if name in operands else None
    if array is not None and array.shape == (1,) and n != 1:
        return np.broadcast_to(array, (n,))
    return array
