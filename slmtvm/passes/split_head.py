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
    results,
    variables,
    with_params,
)


@dataclass(frozen=True)
class SplitHead:
    """Logits are wanted for the last token of a prompt only, so what makes them runs apart.

    The head of an output is the last linear layer, what follows it, and the norm before it; what
    several outputs need of the body lies side by side in its rows. An encoder has no head: its
    ``main`` becomes ``body`` as it is, and so does an encoder-decoder's ``source``.
    """

    name = "split-head"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        main = model.module["main"]
        given: dict[relax.Var, relax.Expr] = {p: p for p in main.params}
        if model.kind == "encoder":
            body = extract(main, "body", results(main), main.params[0], given)
            return replace(model, module=tvm.IRModule({"body": body}))
        others = {n: model.module[n] for n in function_names(model.module) if n != "main"}
        outputs = results(main)
        cuts = list(dict.fromkeys(cut_of(main, output) for output in outputs))
        body = extract(main, "body", cuts, main.params[0], given, side_by_side=True)
        width = sum(int(cut.ty.shape.values[1]) for cut in cuts)
        m = cuts[0].ty.shape.values[0]
        hidden = relax.Var("hidden", relax.TensorType((m, width), "float32"))
        head = extract(main, "head", outputs, hidden, given | _parts(hidden, cuts))
        return replace(model, module=tvm.IRModule({"body": body, "head": head, **others}))


def _parts(hidden: relax.Var, cuts: list[relax.Var]) -> dict[relax.Var, relax.Expr]:
    """Which columns of ``hidden`` each value is."""
    if len(cuts) == 1:
        return {cuts[0]: hidden}
    parts: dict[relax.Var, relax.Expr] = {}
    begin = 0
    for cut in cuts:
        end = begin + int(cut.ty.shape.values[1])
        parts[cut] = relax.op.strided_slice(hidden, [1], [begin], [end])
        begin = end
    return parts


def cut_of(main: relax.Function, output: relax.Var) -> relax.Var:
    """The hidden rows of an output: the value before the norm before its last linear layer."""
    values = {b.var: b.value for b in bindings(main)}
    params = set(main.params)
    at = output
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


def needed_by(function: relax.Function, value: relax.Var, stop: set[relax.Var]) -> set[relax.Var]:
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


def extract(
    function: relax.Function,
    name: str,
    outputs: list[relax.Var],
    source: relax.Var,
    given: dict[relax.Var, relax.Expr],
    *,
    side_by_side: bool = False,
    in_place: bool = False,
) -> relax.Function:
    """A function of ``source`` and the parameters that returns ``outputs``, from ``given`` values.

    Several are a tuple, or ``side_by_side`` in one row. What is the source, or an earlier one of
    them, is copied; all are where they lie ``in_place`` of the source.
    """
    params = [source, *function.params[1:]]
    only = set().union(*(needed_by(function, output, set(given)) for output in outputs))
    environment: dict[relax.Var, relax.Expr] = {}
    builder = relax.BlockBuilder()
    with builder.function(name, params):
        with builder.dataflow():
            for var, expr in given.items():
                environment[var] = expr if isinstance(expr, relax.Var) else builder.emit(expr)
            for binding in bindings(function):
                if binding.var in only and binding.var not in environment:
                    environment[binding.var] = builder.emit(rebuild(binding.value, environment))
            values: list[relax.Expr] = []
            for output in outputs:
                value = environment[output]
                again = in_place or value is source or value in values
                values.append(builder.emit(copied(value)) if again else value)
            if len(values) == 1:
                returned = values[0]
            else:
                returned = relax.op.concat(values, 1) if side_by_side else relax.Tuple(values)
            returned = builder.emit_output(returned)
        builder.emit_func_output(returned)
    built = builder.get()[name]
    used = {v for b in bindings(built) for v in variables(b.value)}
    return with_params(built, [p for i, p in enumerate(built.params) if i == 0 or p in used])


def copied(value: relax.Expr) -> relax.Call:
    return fused.row(value, [], prologue="copy")
