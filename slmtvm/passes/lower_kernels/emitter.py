"""What lowers one function: kernels in the place of its ops, weights in their layouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from slmtvm.errors import UnsupportedOpError
from slmtvm.ir.lowered import call_kernel
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.params import Params
from slmtvm.passes.rewrite import bindings, function_names, rebuild, variables, with_params
from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import KnobChoice, default_choice

_T = TypeVar("_T")


Handler = Callable[[relax.Call, "KernelEmitter"], relax.Expr]


@dataclass
class KernelEmitter:
    """What a handler uses to put kernels in the place of an op."""

    model: CanonicalModel
    isa: Isa
    capacity: int
    kv_dtype: str
    linears: list[relax.Call]
    """The linear layers of all functions."""
    handlers: Mapping[str, Handler]
    """Which function lowers an op."""
    choose: KnobChoice = default_choice
    kernels: dict[str, Kernel] = field(default_factory=dict)
    weights: Params = field(default_factory=Params)
    state: dict[str, Tensor] = field(default_factory=dict)
    _builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    _params: dict[str, relax.Var] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)
    _packed: dict[Hashable, dict[str, str]] = field(default_factory=dict)

    def knobs(self, kind: str, shape: Any) -> Knobs:
        """The knobs of a kernel of this kind and shape, see ``schedules.templates``."""
        return self.choose(kind, shape, self.isa)

    def array(self, expr: relax.Expr) -> np.ndarray:
        """The value of a parameter of the model."""
        return self.model.params[expr.name]

    def weight(self, label: str, array: np.ndarray) -> relax.Var:
        """A weight in the layout its kernel reads, of this value; see ``Params.put``."""
        return self._param(self.weights.put(label, array), array.shape, str(array.dtype))

    def packed(
        self,
        named: Mapping[str, relax.Expr],
        layout: str,
        shape: Hashable,
        pack: Callable[[linear.Weights], Mapping[str, np.ndarray]],
    ) -> dict[str, tuple[str, np.ndarray]]:
        """The parts that ``pack`` makes of a layer's operands: what each is called, and its value.

        They are packed once for all layers that have the same operands, every one that ``pack`` is
        given, in one ``layout`` and ``shape``, which say what else the parts depend on.
        """
        fields = (field.name for field in dataclasses.fields(linear.Weights))
        read = {name: named[name] for name in fields if name in named}
        key = (tuple((name, expr.name) for name, expr in read.items()), layout, shape)
        if key not in self._packed:
            parts = pack(linear.Weights(**{n: self.array(expr) for n, expr in read.items()}))
            label = f"{named['weight'].name}@{layout}"
            self._packed[key] = {
                part: self.weights.put(f"{label}.{part}", array) for part, array in parts.items()
            }
        return {part: (name, self.weights[name]) for part, name in self._packed[key].items()}

    def numbers(self, named: Mapping[str, float]) -> tuple[relax.Var, ...]:
        """A kernel's last input, where it reads scales and the like: it does not depend on them."""
        if not named:
            return ()
        array = np.array([*named.values()], np.float32)
        return (self.weight(f"numbers.{array.tobytes().hex()}", array),)

    def cache(self, name: str, tensor: Tensor) -> relax.Var:
        """A buffer like ``tensor`` that lives as long as the session."""
        assert self.state.setdefault(name, replace(tensor, name=name)).shape == tensor.shape, name
        return self._param(name, tensor.shape, tensor.dtype)

    def _param(self, name: str, shape: tuple[int, ...], dtype: str) -> relax.Var:
        if name not in self._params:
            self._params[name] = relax.Var(name, relax.TensorType(shape, dtype))
        return self._params[name]

    def call(self, kernel: Kernel, inputs: list[relax.Expr]) -> dict[str, relax.Var]:
        """Call ``kernel`` on its inputs, weights and state, in order; its outputs by name."""
        name = str(kernel.func.attrs["global_symbol"])
        known = self.kernels.setdefault(name, kernel)
        assert (known.tensors, known.scalars) == (kernel.tensors, kernel.scalars), name
        taken = [t for t in kernel.tensors if t.name not in (*kernel.outputs, "scratch")]
        for tensor, given in zip(taken, inputs, strict=True):
            shape = tuple(int(d) for d in given.ty.shape.values)
            assert math.prod(shape) == math.prod(tensor.shape), (name, tensor, shape)
        types = [
            relax.TensorType(t.shape, t.dtype) for t in kernel.tensors if t.name in kernel.outputs
        ]
        out = types[0] if len(types) == 1 else relax.TupleType(types)
        made = self._builder.emit(call_kernel(name, inputs, out))
        names = [t.name for t in kernel.tensors if t.name in kernel.outputs]
        if len(names) == 1:
            return {names[0]: made}
        return {n: self._builder.emit(relax.TupleGetItem(made, i)) for i, n in enumerate(names)}

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What ``make`` made for ``key`` in this function."""
        if key not in self._made:
            self._made[key] = make()
        made: _T = self._made[key]
        return made

    def lower(self, function: relax.Function) -> relax.Function:
        """``function`` with each op handled by the handler of its name."""
        self._builder, self._params, self._made = relax.BlockBuilder(), {}, {}
        name = str(function.attrs["global_symbol"])
        environment: dict[relax.Var, relax.Expr] = {p: p for p in function.params}
        source = function.params[0]
        with self._builder.function(name, [source]):
            with self._builder.dataflow():
                for binding in bindings(function):
                    expr = rebuild(binding.value, environment)
                    lowered = self._lower(expr)
                    is_var = isinstance(lowered, relax.Var)
                    environment[binding.var] = lowered if is_var else self._builder.emit(lowered)
                output = self._builder.emit_output(environment[function.body.body])
            self._builder.emit_func_output(output)
        built = self._builder.get()[name]
        free = {v for b in bindings(built) for v in variables(b.value)}
        # A parameter that TVM's own op reads comes as the model has it.
        plain = [p for p in function.params[1:] if p in free]
        for param in plain:
            name = self.weights.put(param.name, self.array(param))
            assert name == param.name, name
        return with_params(built, [source, *plain, *self._params.values()])

    def _lower(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
            handler = self.handlers.get(expr.op.name)
            if handler is not None:
                return handler(expr, self)
            if expr.op.name.startswith("slm."):
                raise UnsupportedOpError(
                    f"no kernel for {expr.op.name}", where=str(self.model.source)
                )
        return expr

    def used_weights(self, module: tvm.IRModule) -> dict[str, np.ndarray]:
        """The weights that some function still takes, in the order in which the first one does."""
        names = {
            p.name: None
            for function in function_names(module)
            for p in module[function].params[1:]
            if p.name in self.weights
        }
        return {name: self.weights[name] for name in names}
