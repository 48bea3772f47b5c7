"""What canonical ops mean, in numpy: the whole sequence at once, from position 0, in float32.

This defines the results that compiled models are compared with. It is written for clarity; it
expands every weight and keeps every score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from tvm import relax
from tvm.ir import Op
from tvm.ir.expr import GenericConst

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import attention, experts, layers, rounding
from slmtvm.ir.reference.arrays import Array
from slmtvm.ir.reference.elementwise import ELEMENTWISE, ROWWISE

_Memory = dict[int, tuple[Array, Array]]  # layer -> keys and values of the source


def evaluate(
    model: CanonicalModel, tokens: npt.ArrayLike, source: npt.ArrayLike | None = None
) -> Array:
    """Output of every position: logits (m, vocab) or hidden states (m, features), float32.

    tokens: (m,) token ids, m at most ``model.context``. source: (s,) token ids that an
    encoder-decoder reads first.
    """
    memory: _Memory = {}
    if source is not None:
        _run(model, "source", source, memory)
    return _run(model, "main", tokens, memory)


def encode_source(model: CanonicalModel, source: npt.ArrayLike) -> Array:
    """The hidden states (s, features) of an encoder-decoder's source, float32."""
    return _run(model, "source", source, {})


def _run(model: CanonicalModel, name: str, tokens: npt.ArrayLike, memory: _Memory) -> Array:
    function = model.module[name]
    values: dict[relax.Var, Array] = {function.params[0]: np.asarray(tokens, np.int32)}
    values.update({p: model.params[p.name] for p in function.params[1:]})
    for block in function.body.blocks:
        for binding in block.bindings:
            values[binding.var] = _value(binding.value, values, model.kind, memory)
    return values[function.body.body]


def _value(
    expr: relax.Expr, values: Mapping[relax.Var, Array], kind: str, memory: _Memory
) -> Array:
    if isinstance(expr, relax.Var):
        return values[expr]
    if isinstance(expr, GenericConst):
        return np.asarray(expr.value.numpy())
    assert isinstance(expr, relax.Call) and isinstance(expr.op, Op), expr
    name = expr.op.name
    if name == "relax.strided_slice":
        begin, end = (int(expr.args[i].fields[0].value) for i in (2, 3))
        return _value(expr.args[0], values, kind, memory)[:, begin:end]
    if name == "relax.concat":
        parts = [_value(part, values, kind, memory) for part in expr.args[0].fields]
        return np.concatenate(parts, axis=1)
    if name in ELEMENTWISE or name in ROWWISE:
        function = ELEMENTWISE.get(name) or ROWWISE[name]
        operands = [_value(a, values, kind, memory) for a in expr.args]
        return np.asarray(function(*operands), np.float32)
    attrs = {key: expr.attrs[key] for key in expr.attrs.keys()}  # noqa: SIM118 (not a dict)
    if name in _WITH_OPERANDS:
        named = {key: _value(arg, values, kind, memory) for key, arg in ops.operands(expr).items()}
        return _WITH_OPERANDS[name](
            _value(expr.args[0], values, kind, memory), attrs, kind, **named
        )
    inputs = [_value(a, values, kind, memory) for a in expr.args]
    if name == "slm.remember":
        memory[int(attrs["layer"])] = inputs[1], inputs[2]
        return inputs[0]
    if name == "slm.cross_attention":
        keys, values_kept = memory[int(attrs["layer"])]
        return attention.attend(attrs, inputs[0], keys, values_kept)
    return _CANONICAL[name](attrs, *inputs)


_WITH_OPERANDS: dict[str, Callable[..., Array]] = {
    "slm.causal_conv": layers.causal_conv,
    "slm.embedding": layers.embedding,
    "slm.linear": layers.linear,
    "slm.moe": experts.moe,
}
_CANONICAL: dict[str, Callable[..., Array]] = {
    "slm.quantize_dequantize": rounding.quantize_dequantize,
    "slm.attention": attention.attention,
    "slm.layer_norm": layers.layer_norm,
    "slm.position_rows": attention.position_rows,
    "slm.rms_norm": layers.rms_norm,
    "slm.rope": attention.rope,
}
