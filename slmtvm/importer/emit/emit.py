"""Steps to Relax, in an order that does not depend on the exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.relax.op import nn

from slmtvm.errors import InvalidModelError
from slmtvm.importer.recognise.steps import (
    Attention,
    Columns,
    Concat,
    Convolution,
    CrossAttention,
    Elementwise,
    Embedding,
    Experts,
    ExpertWeights,
    IntegerPair,
    Linear,
    Norm,
    Param,
    Pool,
    PositionRows,
    QuantizeDequantize,
    Reduce,
    Remember,
    Reordered,
    Rescale,
    Rope,
    Rows,
    Step,
    Weights,
    resolve,
)
from slmtvm.ir import experts, ops
from slmtvm.ir.params import Params

_COMMUTATIVE = {"add": 1, "multiply": -1}  # the residual comes first, and so does the activation


def schedule(steps: Mapping[str, Step], outputs: Sequence[str]) -> list[str]:
    """The rows that ``outputs`` need, by their distance from the tokens.

    Steps at one distance keep the order in which a walk from the outputs meets them, so that every
    export of a model gives the same sequence.
    """
    depth: dict[str, int] = {}
    stack = [resolve(steps, output) for output in reversed(outputs)]
    while stack:
        rows = stack[-1]
        waiting = [i for i in _inputs(steps, rows) if i not in depth]
        if waiting:
            stack.extend(waiting)
        else:
            depth.setdefault(rows, 1 + max((depth[i] for i in _inputs(steps, rows)), default=0))
            stack.pop()
    met: dict[str, None] = {}
    stack = [resolve(steps, output) for output in reversed(outputs)]
    while stack:
        rows = stack.pop()
        if rows not in met:
            met[rows] = None
            stack.extend(reversed(_ordered(steps, rows, depth)))
    return sorted(met, key=lambda rows: depth[rows])


def _inputs(steps: Mapping[str, Step], rows: str) -> list[str]:
    return [resolve(steps, i) for i in steps[rows].inputs]


def _ordered(steps: Mapping[str, Step], rows: str, depth: Mapping[str, int]) -> list[str]:
    """The inputs of a step; a commutative one's in canonical order."""
    step = steps[rows]
    inputs = _inputs(steps, rows)
    if isinstance(step, Elementwise) and step.op in _COMMUTATIVE:
        inputs.sort(key=lambda i: _COMMUTATIVE[step.op] * depth[i])
    return inputs


class Emitter:
    """Builds Relax functions and collects the parameters of all of them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._steps: Mapping[str, Step] = {}
        self._values: dict[str, relax.Var] = {}
        self._vars: dict[tuple[Any, ...], relax.Var] = {}
        self._named: dict[str, relax.Var] = {}
        self._layers = 0
        self._cross_layers: dict[str, int] = {}
        self._convolutions = 0
        self.params = Params()

    def function(
        self, name: str, steps: Mapping[str, Step], outputs: Sequence[str]
    ) -> relax.Function:
        """``name(tokens, *params)``, which returns the rows of ``outputs``, a tuple of several."""
        self._steps, self._values, self._vars, self._named = steps, {}, {}, {}
        order = schedule(steps, outputs)
        for rows in order:
            self._declare(self._steps[rows])
        builder = relax.BlockBuilder()
        m = tirx.Var("m", "int64")
        self._tokens = relax.Var("tokens", relax.TensorType((m,), "int32"))
        depth = {rows: i for i, rows in enumerate(order)}
        inputs = [self._tokens]
        with builder.function(name, inputs):
            with builder.dataflow():
                lookups = [s for s in (steps[r] for r in order) if isinstance(s, Embedding)]
                self._indices = self._emit_indices(builder, lookups)
                for rows in order:
                    expr = self._call(rows, depth)
                    self._values[rows] = builder.emit(expr)
                results = [self._value(output) for output in outputs]
                several = len(results) > 1
                result = builder.emit_output(relax.Tuple(results) if several else results[0])
            builder.emit_func_output(result)
        built = builder.get()[name]
        params = [self._tokens, *self._named.values()]
        return relax.Function(params, built.body, built.ret_ty, attrs=built.attrs)

    def _emit_indices(
        self, builder: relax.BlockBuilder, lookups: Sequence[Embedding]
    ) -> dict[str, relax.Var]:
        """What rows of tables are looked up by, as ``Embedding.by`` names it."""
        indices = {"token": self._tokens}
        for step in lookups:
            if step.by == "segment" and step.by not in indices:
                indices[step.by] = builder.emit(ops.segments(self._tokens))
            if step.by == "earlier" and step.by not in indices:
                indices[step.by] = builder.emit(ops.earlier(self._tokens, first=step.first))
        return indices

    def _declare(self, step: object) -> None:
        """Make the parameters of ``step``, and check them, before anything is built."""
        for entry in fields(step):  # type: ignore[arg-type]
            value = getattr(step, entry.name)
            parts = value.values() if isinstance(value, Mapping) else value
            for part in parts if isinstance(value, (tuple, Mapping)) else (value,):
                if isinstance(part, Param):
                    self._param(part)
                elif isinstance(part, (Weights, ExpertWeights)):
                    self._declare(part)

    def _value(self, rows: str) -> relax.Var:
        return self._values[resolve(self._steps, rows)]

    def _call(self, rows: str, depth: Mapping[str, int]) -> relax.Expr:
        step = self._steps[rows]
        if isinstance(step, Embedding):
            return ops.embedding(
                self._indices[step.by],
                *self._weights(step.table),
                dim=step.dim,
                format=step.table.format,
                group_size=step.table.group_size,
                group_channels=step.table.group_channels,
            )
        if isinstance(step, Linear):
            return ops.linear(
                self._value(step.x),
                *self._weights(step.weights),
                self._optional(step.bias),
                n=step.n,
                k=step.k,
                format=step.weights.format,
                activation=step.activation,
                group_size=step.weights.group_size,
                group_channels=step.weights.group_channels,
            )
        if isinstance(step, Norm):
            x, gamma = self._value(step.x), self._param(step.gamma)
            if step.beta is None:
                return ops.rms_norm(x, gamma, eps=step.eps, groups=step.groups)
            beta = self._param(step.beta)
            return ops.layer_norm(x, gamma, beta, eps=step.eps, groups=step.groups)
        if isinstance(step, Rope):
            return ops.rope(
                self._value(step.x),
                self._param(step.cos),
                self._param(step.sin),
                num_heads=step.num_heads,
                head_dim=step.head_dim,
                interleaved=step.interleaved,
            )
        if isinstance(step, Attention):
            self._layers += 1
            return ops.attention(
                self._value(step.q),
                self._value(step.k),
                self._value(step.v),
                self._optional(step.bias),
                self._optional(step.sinks),
                self._optional(step.visible),
                layer=self._layers - 1,
                num_heads=step.num_heads,
                num_kv_heads=step.num_kv_heads,
                head_dim=step.head_dim,
                scale=step.scale,
                mask=step.mask,
                window=step.window,
                chunk=step.chunk,
                softcap=step.softcap,
                bias_by=step.bias_by,
                roundings=step.roundings,
                sum_roundings=step.sum_roundings,
                weight_roundings=step.weight_roundings,
            )
        if isinstance(step, CrossAttention):
            layer = self._cross_layers.setdefault(step.key, len(self._cross_layers))
            return ops.cross_attention(
                self._value(step.q),
                layer=layer,
                num_heads=step.num_heads,
                num_kv_heads=step.num_kv_heads,
                head_dim=step.head_dim,
                scale=step.scale,
                roundings=step.roundings,
                weight_roundings=step.weight_roundings,
            )
        if isinstance(step, Remember):
            return ops.remember(
                *(self._value(i) for i in (step.x, step.k, step.v)),
                layer=self._cross_layers[step.key],
                num_kv_heads=step.num_kv_heads,
                head_dim=step.head_dim,
            )
        if isinstance(step, Experts):
            return experts.moe(
                self._value(step.x),
                self._value(step.logits),
                self._expert_operands(step.up),
                self._expert_operands(step.down),
                routing=step.routing,
                gate=step.gate,
                up_layer=step.up.layer,
                down_layer=step.down.layer,
                selection_bias=self._optional(step.selection_bias),
                roundings={p: self._param(table) for p, table in step.roundings.items()},
            )
        if isinstance(step, Convolution):
            self._convolutions += 1
            return ops.causal_conv(
                self._value(step.x),
                self._param(step.weight),
                self._optional(step.bias),
                layer=self._convolutions - 1,
            )
        if isinstance(step, PositionRows):
            return ops.position_rows(self._tokens, self._param(step.table))
        if isinstance(step, Pool):
            return ops.pool(self._value(step.x), how=step.how)
        if isinstance(step, Reduce):
            return getattr(relax.op, step.op)(self._value(step.x), axis=[1], keepdims=True)
        if isinstance(step, Concat):
            return relax.op.concat([self._value(part) for part in step.parts], axis=1)
        if isinstance(step, QuantizeDequantize):
            return ops.quantize_dequantize(
                self._value(step.x), scale=step.scale, low=step.low, high=step.high
            )
        if isinstance(step, IntegerPair):
            y = self._param(step.y) if isinstance(step.y, Param) else self._value(step.y)
            return ops.integer_pair(self._value(step.x), y, pair=step.pair)
        if isinstance(step, Rescale):
            x, steps = self._value(step.x), self._param(step.steps)
            return ops.rescale(x, steps, unit=step.unit)
        if isinstance(step, Reordered):
            # All features are there; TVM's default mode warns that it does not check.
            x, features = self._value(step.x), self._param(step.features)
            return relax.op.take(x, features, axis=1, mode="clip")
        if isinstance(step, Columns):
            return relax.op.strided_slice(self._value(step.x), [1], [step.begin], [step.end])
        assert isinstance(step, Elementwise)
        return self._elementwise(step, depth)

    def _elementwise(self, step: Elementwise, depth: Mapping[str, int]) -> relax.Expr:
        operands = list(step.operands)
        if step.op in _COMMUTATIVE and all(isinstance(o, Rows) for o in operands):
            sign = _COMMUTATIVE[step.op]
            operands.sort(key=lambda o: sign * depth[resolve(self._steps, str(o))])
        exprs = [
            self._value(o)
            if isinstance(o, Rows)
            else self._param(o)
            if isinstance(o, Param)
            else relax.const(float(o), "float32")
            for o in operands
        ]
        if step.op == "power" and operands[1] in (2.0, 3.0):
            square = relax.op.multiply(exprs[0], exprs[0])
            return square if operands[1] == 2.0 else relax.op.multiply(square, exprs[0])
        name = step.op.removeprefix("nn.")
        function = getattr(nn if name != step.op else relax.op, name)
        return function(*exprs)

    def _weights(self, weights: Weights) -> tuple[relax.Var, relax.Var | None, relax.Var | None]:
        return (
            self._param(weights.weight),
            self._optional(weights.scales),
            self._optional(weights.zero_points),
        )

    def _expert_operands(self, layer: ExpertWeights) -> dict[str, relax.Var | None]:
        values = (*self._weights(layer.weights), self._optional(layer.bias))
        return dict(zip(("weight", "scales", "zero_points", "bias"), values, strict=True))

    def _optional(self, param: Param | None) -> relax.Var | None:
        return None if param is None else self._param(param)

    def _param(self, param: Param) -> relax.Var:
        """The variable of ``param``; one memory is one parameter, whatever reads it.

        So is one array that was made twice from the same weight, which its name tells.
        """
        value = param.value
        key = (
            value.shape,
            *(
                (piece.__array_interface__["data"][0], piece.shape, piece.strides, str(piece.dtype))
                for piece in param.pieces
            ),
        )
        if key not in self._vars:
            if value.dtype.kind == "f" and not all(np.isfinite(p).all() for p in param.pieces):
                raise InvalidModelError(
                    "holds NaN or infinite values", where=f"{self._where}: weight {param.name!r}"
                )
            name = self.params.put(param.name, value)
            if name not in self._named:
                self._named[name] = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
            self._vars[key] = self._named[name]
        return self._vars[key]
