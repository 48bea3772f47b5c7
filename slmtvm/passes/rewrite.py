"""Rebuilding straight-line Relax functions: the one mechanism all passes share.

A canonical function is one dataflow block of calls. A pass gives a rule; the rule sees each call
with its arguments already rebuilt, and either returns the expression to put in its place or None to
keep it. What a rule leaves without a use is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.params import Params


class Rewriter:
    """What a rule may ask while one function is rebuilt, and emit into it."""

    def __init__(
        self,
        name: str,
        builder: relax.BlockBuilder,
        function: relax.Function,
        arrays: Params,
    ) -> None:
        self.name = name
        """The function's name in its module."""
        self._builder = builder
        self._arrays = arrays
        self._definitions: dict[relax.Var, relax.Expr] = {}
        self._readers: dict[relax.Var, list[relax.Expr]] = {}
        self.now_read_by: list[relax.Expr] = []
        """What reads the value that the rule is asked about."""
        self.params: dict[str, relax.Var] = {p.name: p for p in function.params}

    def definition(self, expr: relax.Expr) -> relax.Expr | None:
        """The expression bound to a variable; None for parameters."""
        return self._definitions.get(expr)

    def call_to(self, expr: relax.Expr, op: tvm.ir.Op) -> relax.Call | None:
        """The call of ``op`` that defines ``expr``, else None."""
        value = self.definition(expr)
        return value if isinstance(value, relax.Call) and value.op == op else None

    def readers(self, expr: relax.Expr) -> list[relax.Expr]:
        """What read this value before the function was rewritten, the result as a variable."""
        return self._readers.get(expr, [])

    def note_readers(self, var: relax.Var, readers: list[relax.Expr]) -> None:
        """Say what read the value that ``var`` now holds."""
        self._readers.setdefault(var, []).extend(readers)

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind ``expr`` to a new variable of the rebuilt function."""
        var = self._builder.emit(expr)
        self._definitions[var] = expr
        return var

    def array(self, expr: relax.Expr) -> np.ndarray | None:
        """The value of a parameter (a weight or a table); None for what is computed."""
        is_param = isinstance(expr, relax.Var) and expr not in self._definitions
        return self._arrays.get(expr.name) if is_param else None

    def add_param(self, label: str, array: np.ndarray) -> relax.Var:
        """The parameter of this value that is called ``label``, see ``Params.put``."""
        name = self._arrays.put(label, array)
        if name not in self.params:
            self.params[name] = relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
        return self.params[name]


Rule = Callable[[relax.Call, Rewriter], "relax.Expr | None"]


def bindings(function: relax.Function) -> list[relax.VarBinding]:
    """The bindings of a straight-line function in order."""
    return [b for block in function.body.blocks for b in block.bindings]


def results(function: relax.Function) -> list[relax.Var]:
    """The variables that a function returns, seen through copies; several are a tuple."""
    values = {b.var: b.value for b in bindings(function)}

    def origin(expr: relax.Expr) -> relax.Expr:
        while isinstance(values.get(expr), relax.Var):
            expr = values[expr]
        return expr

    returned = origin(function.body.body)
    made = values.get(returned)
    return [origin(v) for v in made.fields] if isinstance(made, relax.Tuple) else [returned]


def variables(expr: relax.Expr) -> list[relax.Var]:
    """The variables an expression reads, in order, repeats included."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [v for a in expr.args for v in variables(a)]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in variables(f)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return []


def rebuild(expr: relax.Expr, environment: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """``expr`` with each variable replaced by what the environment holds for it."""
    if isinstance(expr, relax.Var):
        return environment[expr]
    if isinstance(expr, relax.Call):
        arguments = [rebuild(a, environment) for a in expr.args]
        return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([rebuild(f, environment) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(rebuild(expr.tuple_value, environment), expr.index)
    return expr


def rewrite(model: CanonicalModel, rule: Rule) -> CanonicalModel:
    """``model`` with every function of its module rebuilt by ``rule``, dead bindings dropped."""
    arrays = Params(model.params)
    functions = {
        name: _rewrite_function(name, model.module[name], rule, arrays)
        for name in function_names(model.module)
    }
    module = relax.transform.DeadCodeElimination(list(functions))(tvm.IRModule(functions))
    return _drop_unused_params(replace(model, module=module, params=arrays))


def _rewrite_function(
    name: str, function: relax.Function, rule: Rule, arrays: Params
) -> relax.Function:
    old = bindings(function)
    readers: dict[relax.Var, list[relax.Expr]] = {function.body.body: [function.body.body]}
    for binding in old:
        for var in variables(binding.value):
            readers.setdefault(var, []).append(binding.value)
    environment: dict[relax.Var, relax.Expr] = {p: p for p in function.params}
    builder = relax.BlockBuilder()
    rewriter = Rewriter(name, builder, function, arrays)
    with builder.function(name, list(function.params)):
        with builder.dataflow():
            for param in function.params:
                rewriter.note_readers(param, readers.get(param, []))
            for binding in old:
                expr = rebuild(binding.value, environment)
                rewriter.now_read_by = readers.get(binding.var, [])
                replacement = rule(expr, rewriter) if isinstance(expr, relax.Call) else None
                value = expr if replacement is None else replacement
                new = value if isinstance(value, relax.Var) else rewriter.emit(value)
                rewriter.note_readers(new, rewriter.now_read_by)
                environment[binding.var] = new
            output = builder.emit_output(environment[function.body.body])
        builder.emit_func_output(output)
    return with_params(builder.get()[name], list(rewriter.params.values()))


def with_params(function: relax.Function, params: list[relax.Var]) -> relax.Function:
    """``function`` with another list of parameters."""
    return relax.Function(params, function.body, function.ret_ty, attrs=function.attrs)


def _drop_unused_params(model: CanonicalModel) -> CanonicalModel:
    functions = {}
    live: set[str] = set()
    for name in function_names(model.module):
        function = model.module[name]
        used = {v for b in bindings(function) for v in variables(b.value)}
        # The first parameter is the step's input, whether it is read or not.
        params = [p for i, p in enumerate(function.params) if i == 0 or p in used]
        live.update(p.name for p in params)
        functions[name] = with_params(function, params)
    params_left = Params(model.params).only(live)
    return replace(model, module=tvm.IRModule(functions), params=params_left)


def function_names(module: tvm.IRModule) -> list[str]:
    """The names of the module's Relax functions, in order."""
    return sorted(
        var.name_hint for var, f in module.functions.items() if isinstance(f, relax.Function)
    )
