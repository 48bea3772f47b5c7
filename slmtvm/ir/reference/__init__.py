"""What canonical ops mean, in numpy: the whole sequence at once, from position 0, in float32.

This defines the results that compiled models are compared with. It is written for clarity; it
expands every weight and keeps every score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

# layer -> keys and values of the source, and which of its tokens are visible, None for all
_Memory = dict[int, tuple[Array, Array, Array | None]]
Observer = Callable[[Array, Array], None]
"""Is shown the keys and values (m, features) of an attention as they are kept."""


@dataclass(frozen=True)
class _Run:
    """One function on one sequence; ``visible`` bool (m,), None where all its keys are;
    ``segments`` int32 (m,)."""

    kind: str
    visible: Array | None
    memory: _Memory
    observe: Observer
    segments: Array


def evaluate(
    model: CanonicalModel,
    tokens: npt.ArrayLike,
    source: npt.ArrayLike | None = None,
    *,
    mask: npt.ArrayLike | None = None,
    observe: Observer = lambda keys, values: None,
    segments: npt.ArrayLike | None = None,
) -> Array:
    """The first output, see ``evaluate_outputs``."""
    return evaluate_outputs(model, tokens, source, mask=mask, observe=observe, segments=segments)[0]


def evaluate_outputs(
    model: CanonicalModel,
    tokens: npt.ArrayLike,
    source: npt.ArrayLike | None = None,
    *,
    mask: npt.ArrayLike | None = None,
    observe: Observer = lambda keys, values: None,
    segments: npt.ArrayLike | None = None,
) -> list[Array]:
    """Each output, float32: of every position (m, features), such as logits (m, vocab), or an
    encoder's pooled ones (features,). A decoder's have a row after each token.

    tokens: (m,) token ids, m at most ``model.context``. source: (s,) token ids that an
    encoder-decoder reads first. mask: which tokens are visible, those of the source where there is
    one; not 0 is visible, and rows of hidden tokens are 0. What hidden tokens do is ``model.mask``;
    a model with "none" treats them as one with "skip". segments: (m,) of which text each token is,
    of the first where not given. observe: is shown keys and values as they are kept.
    """
    memory: _Memory = {}
    if source is not None:
        _run(model, "source", source, mask, memory, observe)
        mask = None
    return _run(model, "main", tokens, mask, memory, observe, segments)


def evaluate_function(model: CanonicalModel, name: str, given: Array) -> Array:
    """What a decoder's function of this name makes of tokens (m,) or rows (m, features)."""
    return evaluate_results(model, name, given)[0]


def evaluate_results(model: CanonicalModel, name: str, given: Array) -> list[Array]:
    """``evaluate_function`` of one that returns several values."""
    types = np.zeros(len(given), np.int32)
    run = _Run(model.kind, None, {}, lambda keys, values: None, types)
    return _evaluate(model, name, given, run)


def encode_source(
    model: CanonicalModel, source: npt.ArrayLike, *, mask: npt.ArrayLike | None = None
) -> Array:
    """The hidden states (s, features) of an encoder-decoder's source, float32."""
    return _run(model, "source", source, mask, {})[0]


def _run(
    model: CanonicalModel,
    name: str,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike | None,
    memory: _Memory,
    observe: Observer = lambda keys, values: None,
    segments: npt.ArrayLike | None = None,
) -> list[Array]:
    ids = np.asarray(tokens, np.int32)
    types = np.zeros_like(ids) if segments is None else np.asarray(segments, np.int32)
    visible = np.ones(len(ids), bool) if mask is None else np.asarray(mask) != 0
    keys = model.mask == "keys" and (model.kind != "encoder-decoder" or name == "source")
    run = _Run(
        "encoder" if name == "source" else model.kind,
        visible if keys else None,
        memory,
        observe,
        types if keys else types[visible],
    )
    found = _evaluate(model, name, ids if keys else ids[visible], run)
    pooled = [o.pooled and model.kind == "encoder" for o in model.outputs] or [False]
    return [
        output[0] if is_row else _spread(output, visible, keys)
        for output, is_row in zip(found, pooled if name == "main" else [False], strict=True)
    ]


def _spread(found: Array, visible: Array, keys: bool) -> Array:
    """The rows of visible tokens at their places, and zeros between them."""
    rows = np.zeros((len(visible), found.shape[1]), found.dtype)
    rows[visible] = found[visible] if keys else found
    return rows


def _evaluate(model: CanonicalModel, name: str, tokens: Array, run: _Run) -> list[Array]:
    function = model.module[name]
    values: dict[relax.Var, Array] = {function.params[0]: tokens}
    values.update({p: model.params[p.name] for p in function.params[1:]})
    for block in function.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Tuple):  # the outputs, where they are several
                return [values[field] for field in binding.value.fields]
            values[binding.var] = _value(binding.value, values, run)
    return [values[function.body.body]]


def _value(expr: relax.Expr, values: Mapping[relax.Var, Array], run: _Run) -> Array:
    if isinstance(expr, relax.Var):
        return values[expr]
    if isinstance(expr, GenericConst):
        return np.asarray(expr.value.numpy())
    assert isinstance(expr, relax.Call) and isinstance(expr.op, Op), expr
    name = expr.op.name
    if name == "relax.strided_slice":
        begin, end = (int(expr.args[i].fields[0].value) for i in (2, 3))
        return _value(expr.args[0], values, run)[:, begin:end]
    if name == "relax.concat":
        parts = [_value(part, values, run) for part in expr.args[0].fields]
        return np.concatenate(parts, axis=1)
    if name in ELEMENTWISE or name in ROWWISE:
        function = ELEMENTWISE.get(name) or ROWWISE[name]
        operands = [_value(a, values, run) for a in expr.args]
        return np.asarray(function(*operands), np.float32)
    attrs = {key: expr.attrs[key] for key in expr.attrs.keys()}  # noqa: SIM118 (not a dict)
    if name == "slm.segments":
        return run.segments
    if name == "slm.earlier":
        return layers.earlier(attrs, _value(expr.args[0], values, run))
    if name in _WITH_OPERANDS:
        named = {key: _value(arg, values, run) for key, arg in ops.operands(expr).items()}
        return _WITH_OPERANDS[name](_value(expr.args[0], values, run), attrs, run.kind, **named)
    inputs = [_value(a, values, run) for a in expr.args]
    if name == "slm.remember":
        run.memory[int(attrs["layer"])] = inputs[1], inputs[2], run.visible
        run.observe(inputs[1], inputs[2])
        return inputs[0]
    if name == "slm.cross_attention":
        keys, values_kept, seen = run.memory[int(attrs["layer"])]
        return attention.attend(attrs, inputs[0], keys, values_kept, visible=seen)
    if name == "slm.row":  # before rows are fused there are copies alone
        assert attrs["prologue"] == "copy", attrs
        return inputs[0]
    if name == "slm.pool":
        return layers.pool(attrs, *inputs, visible=run.visible)
    if name == "slm.attention":
        if attrs["mask"] == "causal":
            run.observe(inputs[1], inputs[2])
        return attention.attention(attrs, *inputs, visible=run.visible)
    return _CANONICAL[name](attrs, *inputs)


_WITH_OPERANDS: dict[str, Callable[..., Array]] = {
    "slm.causal_conv": layers.causal_conv,
    "slm.embedding": layers.embedding,
    "slm.head_linear": layers.head_linear,
    "slm.linear": layers.linear,
    "slm.moe": experts.moe,
}
_CANONICAL: dict[str, Callable[..., Array]] = {
    "slm.integer_pair": rounding.integer_pair,
    "slm.quantize_dequantize": rounding.quantize_dequantize,
    "slm.layer_norm": layers.layer_norm,
    "slm.position_rows": attention.position_rows,
    "slm.rescale": rounding.rescale,
    "slm.rms_norm": layers.rms_norm,
    "slm.rope": attention.rope,
}
