"""A decoder's ``main`` -> ``body`` (tokens to hidden rows) and ``head`` (hidden rows to logits)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tvm
from tvm import relax

from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import (
    bindings,
    function_names,
    rebuild,
    result,
    variables,
    with_params,
)


@dataclass(frozen=True)
class SplitHead:
    """Logits are wanted for the last token of a prompt only, so what makes them runs apart.

    The head is the last linear layer, what follows it, and the norm before it. An encoder has no
    head: its ``main`` becomes ``body`` as it is, and so does an encoder-decoder's ``source``.
    """

    name = "split-head"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        main = model.module["main"]
        if model.kind == "encoder":
            return replace(model, module=tvm.IRModule({"body": _named(main, "body")}))
        others = {n: model.module[n] for n in function_names(model.module) if n != "main"}
        cut = _cut(main)
        body = _extract(main, "body", cut, main.params[0], _needed(main, cut, set()))
        hidden = relax.Var("hidden", cut.ty)
        tail = _needed(main, result(main), {cut})
        head = _extract(main, "head", result(main), hidden, tail, replaced=cut)
        return replace(model, module=tvm.IRModule({"body": body, "head": head, **others}))


def _named(function: relax.Function, name: str) -> relax.Function:
    return function.with_attr("global_symbol", name)


def _cut(main: relax.Function) -> relax.Var:
    """The hidden rows: the value before the norm before the last linear layer."""
    values = {b.var: b.value for b in bindings(main)}
    params = set(main.params)
    at = result(main)
    seen_linear = False
    while at in values:
        call = values[at]
        sources = [v for v in variables(call) if v not in params]
        is_norm = isinstance(call, relax.Call) and call.op in (ops.RMS_NORM, ops.LAYER_NORM)
        # The head's linear layer must see how its input was rounded.
        is_rounding = isinstance(call, relax.Call) and call.op == ops.QUANTIZE_DEQUANTIZE
        if len(set(sources)) != 1 or (seen_linear and not is_norm and not is_rounding):
            break
        seen_linear = seen_linear or (isinstance(call, relax.Call) and call.op == ops.LINEAR)
        at = sources[0]
        if seen_linear and is_norm:
            break
    return at


def _needed(function: relax.Function, value: relax.Var, stop: set[relax.Var]) -> set[relax.Var]:
    """The bound variables that ``value`` needs, itself included, not looking behind ``stop``."""
    values = {b.var: b.value for b in bindings(function)}
    needed: set[relax.Var] = set()
    pending = [value]
    while pending:
        var = pending.pop()
        if var in needed or var in stop or var not in values:
            continue
        needed.add(var)
        pending.extend(variables(values[var]))
    return needed


def _extract(
    function: relax.Function,
    name: str,
    output: relax.Var,
    source: relax.Var,
    only: set[relax.Var],
    replaced: relax.Var | None = None,
) -> relax.Function:
    """A function of ``source`` and the parameters that binds ``only`` and returns ``output``.

    It copies ``source`` where that stands for the output itself.
    """
    params = [source, *function.params[1:]]
    environment: dict[relax.Var, relax.Expr] = {p: p for p in function.params}
    if replaced is not None:
        environment[replaced] = source
    builder = relax.BlockBuilder()
    with builder.function(name, params):
        with builder.dataflow():
            for binding in bindings(function):
                if binding.var in only:
                    environment[binding.var] = builder.emit(rebuild(binding.value, environment))
            value = environment[output]
            copied = value if only else fused.row(value, [], prologue="copy")
            value = builder.emit_output(copied)
        builder.emit_func_output(value)
    built = builder.get()[name]
    used = {v for b in bindings(built) for v in variables(b.value)}
    return with_params(built, [p for i, p in enumerate(built.params) if i == 0 or p in used])
