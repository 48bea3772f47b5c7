"""Attention on fewer features of each head: what its cache keeps of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import Rewriter, rewrite

_SLICE = tvm.ir.Op.get("relax.strided_slice")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerBases:
    """How a layer's heads of D features become heads of R, and its result D again.

    ``queries``, ``keys`` and ``values``: float64 (kv heads, D, R), multiplied from the right; the
    product of two projected heads stands for that of the whole ones. ``results``: float64 (heads,
    R, D), from what attention makes of projected values; ``offset``, float64 (heads * D,), is
    added.
    """

    queries: Array
    keys: Array
    values: Array
    results: Array
    offset: Array

    @property
    def rank(self) -> int:
        """R."""
        return int(self.keys.shape[2])


@dataclass(frozen=True)
class LowRank:
    """Puts the ``bases`` around attentions, by layer; where they are None the layer stays.

    Matrices become parts of linear layers' weights, which saves work, where these are float32 and
    nothing lies between, those of queries, keys and values all or none; elsewhere they are
    ``slm.head_linear``, so that integer weights keep their bits and rotations their positions.
    """

    bases: Sequence[LayerBases | None]

    name = "low-rank"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        kv = tuple(
            spec if own is None else replace(spec, head_dim=own.rank, whole=spec.head_dim)
            for spec, own in zip(model.kv, self.bases, strict=True)
        )
        return replace(rewrite(model, self._rule), kv=kv)

    def _rule(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        if call.op == ops.LINEAR:
            return _folded_after(call, rewriter)
        if call.op != ops.ATTENTION:
            return None
        layer = int(call.attrs["layer"])
        own = self.bases[layer]
        if own is None:
            return None
        heads, kv_heads = int(call.attrs["num_heads"]), int(call.attrs["num_kv_heads"])
        given = list(zip(
            call.args[:3], (own.queries, own.keys, own.values), (heads, kv_heads, kv_heads),
            (f"kv_rank{layer}.{name}" for name in "qkv"), strict=True,
        ))  # fmt: skip
        made = [_folded_before(*each, rewriter) for each in given]
        if any(each is None for each in made):  # attention takes all three, or none
            made = [
                ops.head_linear(
                    x, rewriter.add_param(label, basis.astype(np.float32)), num_heads=count
                )
                for x, basis, count, label in given
            ]
        projected = [rewriter.emit(each) for each in made]
        attrs = {**dict(call.attrs.items()), "head_dim": own.rank}
        attended = ops.make_call(ops.ATTENTION, [*projected, *call.args[3:]], **attrs)
        back = rewriter.add_param(f"kv_rank{layer}.o", own.results.astype(np.float32))
        offset = rewriter.add_param(f"kv_rank{layer}.offset", own.offset.astype(np.float32))
        return ops.head_linear(rewriter.emit(attended), back, offset, num_heads=heads)


def _folded_before(
    x: relax.Expr, basis: Array, heads: int, label: str, rewriter: Rewriter
) -> relax.Call | None:
    """The float linear layer that makes ``x``, perhaps as some of its features, with ``basis`` in
    its weight; None where there is no such layer."""
    begin, end = 0, int(x.ty.shape.values[1])
    sliced = rewriter.call_to(x, _SLICE)
    if sliced is not None:
        begin, end = (int(sliced.args[i].fields[0].value) for i in (2, 3))
        x = sliced.args[0]
    linear = rewriter.call_to(x, ops.LINEAR)
    if linear is None or not _is_float(linear):
        return None
    named = {name: rewriter.array(expr) for name, expr in ops.operands(linear).items()}
    if any(array is None for array in named.values()):
        return None
    k, rank = int(linear.attrs["k"]), basis.shape[2]
    matrices = np.repeat(basis, heads // len(basis), axis=0)

    def through(part: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        by_head = part[begin:end].reshape(heads, matrices.shape[1], -1).astype(np.float64)
        made = np.einsum("hdr,hdk->hrk", matrices, by_head)
        return made.reshape(heads * rank, *part.shape[1:]).astype(np.float32)

    folded = {
        name: rewriter.add_param(f"{label}.{name}", through(array))
        for name, array in named.items()
        if array is not None
    }
    return ops.linear(linear.args[0], **folded, n=heads * rank, k=k, format="f32")


def _folded_after(linear: relax.Call, rewriter: Rewriter) -> relax.Call | None:
    """A float linear layer that reads what attention makes, with the matrices in its weight."""
    heads = rewriter.call_to(linear.args[0], ops.HEAD_LINEAR)
    if heads is None or not _is_float(linear):
        return None
    arrays = {n: rewriter.array(e) for n, e in ops.operands(linear).items()}
    weight, bias = arrays["weight"], arrays.get("bias", np.zeros(1, np.float32))
    matrices = {n: rewriter.array(e) for n, e in ops.operands(heads).items()}
    matrix, offset = matrices["weight"], matrices.get("bias", np.zeros(1, np.float32))
    if weight is None or bias is None or matrix is None or offset is None:
        return None
    count, n, rank = int(heads.attrs["num_heads"]), len(weight), matrix.shape[1]
    matrix = np.repeat(matrix, count // len(matrix), axis=0).astype(np.float64)
    wide = weight.astype(np.float64)
    narrow = np.einsum("nhd,hrd->nhr", wide.reshape(n, count, -1), matrix).reshape(n, -1)
    shifted = bias + wide @ np.broadcast_to(offset, wide.shape[1:])
    label = ops.operands(linear)["weight"].name
    return ops.linear(
        heads.args[0],
        rewriter.add_param(f"{label}.kv_rank", narrow.astype(np.float32)),
        bias=rewriter.add_param(f"{label}.kv_rank.bias", shifted.astype(np.float32)),
        n=n, k=count * rank, format="f32",
    )  # fmt: skip


def _is_float(linear: relax.Call) -> bool:
    return str(linear.attrs["format"]) == "f32"
