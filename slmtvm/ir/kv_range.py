"""How large keys and values of a decoder become: whether a float16 cache holds them.

First weights are asked: a norm's rows have a length that is known, and so has what a linear layer
makes of them at most. Where that is no bound, or one beyond float16, the model is evaluated on a
few tokens, among them those whose embeddings are largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from tvm import relax
from tvm.ir import Op

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.params import Params
from slmtvm.ir.probing import embedding_norms
from slmtvm.ir.reference import evaluate
from slmtvm.ir.reference.arrays import Array
from slmtvm.ir.reference.weights import dequantize

LARGEST_HALF = 65504.0
_MARGIN = 0.9  # of it, for what activations that are rounded add
_PROBES = 16  # tokens of the largest embeddings, and as many of the others
_SEED = 0


def beyond_half(model: CanonicalModel) -> float:
    """The largest magnitude of a key or value found beyond float16, 0 where there is none.

    That is shown by the weights, or by no more than a few tokens. Infinities and what is no number
    count as beyond it.
    """
    if model.kind == "encoder" or _Bounds(model).below(_MARGIN * LARGEST_HALF):
        return 0.0
    largest = 0.0

    def observe(keys: Array, values: Array) -> None:
        nonlocal largest
        for part in (keys, values):
            most = float(np.abs(part).max(initial=0.0))
            largest = max(largest, most if most == most else np.inf)

    with np.errstate(all="ignore"):
        tokens = probing_tokens(model, "main")[: model.context]
        source = None
        if model.kind == "encoder-decoder":
            source = probing_tokens(model, "source")[: model.source_context]
        evaluate(model, tokens, source, observe=observe)
    return largest if largest > LARGEST_HALF else 0.0


def note_of(largest: float) -> str:
    """What users are told where ``beyond_half`` found something."""
    return (
        f"keys or values reach {largest:.3g}, beyond float16: the KV cache is float32 if nothing "
        f"else is asked for, and --kv f16 cuts them off at {LARGEST_HALF:.0f}"
    )


def probing_tokens(model: CanonicalModel, name: str) -> Array:
    """Tokens int32 (n,) for the function ``name``: half those of the largest embeddings, and half
    drawn at random, always the same; the two take turns."""
    largest = embedding_norms(model, name)
    assert largest is not None  # every function looks its tokens up
    chosen = np.argsort(-largest, kind="stable")[:_PROBES]
    drawn = np.random.default_rng(_SEED).integers(0, model.vocab_size, chosen.size)
    return np.stack([chosen, drawn], axis=1).reshape(-1).astype(np.int32)


def _calls(function: relax.Function) -> dict[relax.Var, relax.Call]:
    return {
        binding.var: binding.value
        for block in function.body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
    }


class _Bounds:
    """Upper bounds of the magnitudes of features, by weights alone."""

    def __init__(self, model: CanonicalModel) -> None:
        self._params = Params(model.params)
        self._functions = [_calls(f) for f in model.module.functions.values()]

    def below(self, limit: float) -> bool:
        """Whether all that is cached is bounded by ``limit``."""
        with np.errstate(all="ignore"):
            return all(
                bound is not None and bool((bound <= limit).all()) for bound in self._cached()
            )

    def _cached(self) -> Iterator[Array | None]:
        for calls in self._functions:
            for call in calls.values():
                causal = call.op == ops.ATTENTION and str(call.attrs["mask"]) == "causal"
                if causal or call.op == ops.REMEMBER:
                    yield from (self._of(expr, calls) for expr in call.args[1:3])

    def _array(self, expr: relax.Expr) -> Array:
        return np.abs(self._params[expr.name])

    def _of(self, expr: relax.Expr, calls: dict[relax.Var, relax.Call]) -> Array | None:
        """A bound of each feature, or None where none is known."""
        call = calls.get(expr)
        if call is None or not isinstance(call.op, Op):
            return None
        rule = _RULES.get(call.op.name)
        return None if rule is None else rule(self, call, calls)

    def linear(self, call: relax.Call, calls: dict[relax.Var, relax.Call]) -> Array | None:
        attrs, named = call.attrs, ops.operands(call)
        x = calls.get(call.args[0])
        inner = self._of(call.args[0], calls)
        if inner is None or x is None:
            return None
        arrays = {key: self._params[expr.name] for key, expr in named.items()}
        weight = dequantize(
            arrays["weight"], arrays.get("scales"), arrays.get("zero_points"),
            format=str(attrs["format"]), group_size=int(attrs["group_size"]),
            columns=int(attrs["k"]), group_channels=int(attrs.get("group_channels", 0)),
        )  # fmt: skip
        bias = np.abs(arrays["bias"]) if "bias" in arrays else np.float32(0)
        bound = np.abs(weight) @ inner
        if x.op in (ops.RMS_NORM, ops.LAYER_NORM) and int(x.attrs["groups"]) == 1:
            # A normed row is no longer than sqrt(k): by Cauchy and Schwarz.
            gamma = self._params[x.args[1].name]
            length = np.sqrt(weight.shape[1]) * np.linalg.norm(weight * gamma, axis=1)
            shift = weight @ self._params[x.args[2].name] if x.op == ops.LAYER_NORM else 0.0
            bound = np.minimum(bound, length + np.abs(shift))
        return np.asarray(bound + bias)

    def norm(self, call: relax.Call, _calls: dict[relax.Var, relax.Call]) -> Array:
        gamma, *beta = (self._array(expr) for expr in call.args[1:])
        part = np.sqrt(gamma.size) * gamma + (beta[0] if beta else 0.0)
        return np.tile(part, int(call.attrs["groups"]))

    def rope(self, call: relax.Call, calls: dict[relax.Var, relax.Call]) -> Array | None:
        inner = self._of(call.args[0], calls)
        if inner is None:
            return None
        # Another feature comes in, and a table may be more than a sine.
        most = max(1.0, *(float(self._array(table).max()) for table in call.args[1:]))
        return np.full_like(inner, 2 * most * inner.max())

    def rounding(self, call: relax.Call, _calls: dict[relax.Var, relax.Call]) -> Array | None:
        scale, low, high = (float(call.attrs[name]) for name in ("scale", "low", "high"))
        features = int(call.ty.shape.values[1])
        return np.full(features, scale * max(-low, high))

    def columns(self, call: relax.Call, calls: dict[relax.Var, relax.Call]) -> Array | None:
        inner = self._of(call.args[0], calls)
        if inner is None:
            return None
        begin, end = (int(call.args[i].fields[0].value) for i in (2, 3))
        return inner[begin:end]

    def reordered(self, call: relax.Call, calls: dict[relax.Var, relax.Call]) -> Array | None:
        inner = self._of(call.args[0], calls)
        return None if inner is None else inner[self._params[call.args[1].name]]


_Rule = Callable[[_Bounds, relax.Call, dict[relax.Var, relax.Call]], Array | None]
_RULES: dict[str, _Rule] = {
    "relax.strided_slice": _Bounds.columns,
    "relax.take": _Bounds.reordered,
    "slm.layer_norm": _Bounds.norm,
    "slm.linear": _Bounds.linear,
    "slm.quantize_dequantize": _Bounds.rounding,
    "slm.rms_norm": _Bounds.norm,
    "slm.rope": _Bounds.rope,
}
