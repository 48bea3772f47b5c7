"""What lowers one function: kernels in the place of its ops, weights in their layouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Mapping
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
from slmtvm.passes.exits import FILL
from slmtvm.passes.rewrite import bindings, function_names, rebuild, variables, with_params
from slmtvm.schedules import linear
from slmtvm.schedules.attention import BlockMask
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import KnobChoice, default_choice

_T = TypeVar("_T")


Handler = Callable[[relax.Call, "KernelEmitter"], relax.Expr]

_ALIGNMENT = 64  # bytes: where a kernel's operands begin


class NotBySessionError(Exception):
    """A function cannot take rows of different sessions: some operand of one row is not aligned, or
    a kernel of all rows depends on a session."""


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
    by_session: Collection[str] = ()
    """The ops that depend on a session."""
    choose: KnobChoice = default_choice
    step_rows: int = 0
    """The most rows of a step; 0 where layers with a window keep all positions nevertheless."""
    sparse: dict[Hashable, linear.LinearShape] = field(default_factory=dict)
    """The shapes, of one row, of layers that run on lists of blocks, by ``operand_names``."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    weights: Params = field(default_factory=Params)
    state: dict[str, Tensor] = field(default_factory=dict)
    rings: dict[str, int] = field(default_factory=dict)
    """How many positions those of its buffers hold that keep a window."""
    lists: dict[tuple[str, int], tuple[BlockMask, dict[str, np.ndarray]]] = field(
        default_factory=dict
    )
    """The blocks that masks see, by the mask and the kv heads that it is for."""
    seek_reach: int = 0
    """As ``LoweredModel`` has it."""
    of_sessions: bool = False
    """Whether the rows of the function that is lowered are of different sessions."""
    fills: bool = False
    """Whether it keeps keys and values alone: what an attention makes of them is not wanted."""
    _rows_of: dict[relax.Var, relax.Var] | None = None
    """While an op is lowered for one row of a session: what each value of one row is a row of."""
    _builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    _params: dict[str, relax.Var] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)
    _packed: dict[Hashable, dict[str, str]] = field(default_factory=dict)
    _given: set[relax.Var] = field(default_factory=set)  # the parameters that are weights
    _rows: int = 1  # of the function that is lowered
    _not_by_session: list[str] = field(default_factory=list)  # why it cannot be of sessions

    def knobs(self, kind: str, shape: Any) -> Knobs:
        """The knobs of a kernel of this kind and shape, see ``schedules.templates``."""
        return self.choose(kind, shape, self.isa)

    def skips_padding(self, rows: int) -> bool:
        """Whether a step may have fewer tokens than these ``rows``, and says how many: to the
        kernels of an encoder-decoder it says how many the source has."""
        return rows > 1 and self.isa.skips_padding and self.model.kind != "encoder-decoder"

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
        key = (self.operand_names(named), layout, shape)
        if key not in self._packed:
            parts = pack(self.weights_of(named))
            label = f"{named['weight'].name}@{layout}"
            self._packed[key] = {
                part: self.weights.put(f"{label}.{part}", array) for part, array in parts.items()
            }
        return {part: (name, self.weights[name]) for part, name in self._packed[key].items()}

    def operand_names(self, named: Mapping[str, relax.Expr]) -> Hashable:
        """Which operands a layer's packed weights are made of."""
        fields = (field.name for field in dataclasses.fields(linear.Weights))
        return tuple((name, named[name].name) for name in fields if name in named)

    def weights_of(self, named: Mapping[str, relax.Expr]) -> linear.Weights:
        """A layer's weights as the model has them."""
        fields = (field.name for field in dataclasses.fields(linear.Weights))
        return linear.Weights(**{n: self.array(named[n]) for n in fields if n in named})

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
            assert tensor.takes(shape), (name, tensor, shape)
        outputs = [t for t in kernel.tensors if t.name in kernel.outputs]
        if self._rows_of is None:
            knows = "position" in kernel.scalars or any(i.name in self.state for i in inputs)
            if self.of_sessions and knows:
                self._not_by_session.append(f"{name} is of all rows and knows a session")
            made = self._emit(name, inputs, [(t.shape, t.dtype) for t in outputs])
        else:
            made = self._call_by_session(name, taken, inputs, outputs)
        return {t.name: value for t, value in zip(outputs, made, strict=True)}

    def _emit(
        self,
        name: str,
        inputs: list[relax.Expr],
        outputs: list[tuple[tuple[int, ...], str]],
        *,
        by_session: bool = False,
    ) -> list[relax.Var]:
        """Call a kernel; its outputs, of these shapes and dtypes."""
        types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
        out = types[0] if len(types) == 1 else relax.TupleType(types)
        made = self._builder.emit(call_kernel(name, inputs, out, by_session=by_session))
        if len(types) == 1:
            return [made]
        return [self._builder.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def _call_by_session(
        self, name: str, taken: list[Tensor], inputs: list[relax.Expr], outputs: list[Tensor]
    ) -> list[relax.Var]:
        """Call a kernel of one row for each row; the rows that it makes, each of its outputs' row.

        A row's operands must be aligned as a kernel's are.
        """
        assert self._rows_of is not None
        rows_of = self._rows_of
        of_rows = [t for t, given in zip(taken, inputs, strict=True) if given in rows_of]
        for tensor in (*of_rows, *outputs):
            if math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize % _ALIGNMENT:
                self._not_by_session.append(f"{name}: a row of {tensor} is not aligned")
        whole = [((self._rows * t.shape[0], *t.shape[1:]), t.dtype) for t in outputs]
        given = [rows_of.get(i, i) for i in inputs]
        return [self._row(v) for v in self._emit(name, given, whole, by_session=True)]

    def _row(self, rows: relax.Var) -> relax.Var:
        """What stands for one of the rows of ``rows``."""
        assert self._rows_of is not None
        count, *rest = (int(d) for d in rows.ty.shape.values)
        row = relax.Var(
            rows.name, relax.TensorType((count // self._rows, *rest), str(rows.ty.dtype))
        )
        self._rows_of[row] = rows
        return row

    def _lower_by_session(self, call: relax.Call, handler: Handler) -> relax.Expr:
        """Lower an op of one row, whose kernels are then called for each row."""
        self._rows_of = {}
        try:
            arguments = [a if a in self._given else self._row(a) for a in call.args]
            row = handler(relax.Call(call.op, arguments, call.attrs, call.ty_args), self)
            return self._rows_of[row]
        finally:
            self._rows_of = None

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What ``make`` made for ``key`` in this function."""
        if key not in self._made:
            self._made[key] = make()
        made: _T = self._made[key]
        return made

    def lower(self, function: relax.Function) -> relax.Function:
        """``function`` with each op handled by the handler of its name.

        Raises NotBySessionError where its rows are to be of different sessions, and cannot.
        """
        self._builder, self._params, self._made = relax.BlockBuilder(), {}, {}
        name = str(function.attrs["global_symbol"])
        self.of_sessions, self.fills = is_of_sessions(name), name.startswith(FILL)
        environment: dict[relax.Var, relax.Expr] = {p: p for p in function.params}
        source = function.params[0]
        self._given, self._rows = set(function.params[1:]), int(source.ty.shape.values[0])
        self._not_by_session = []
        with self._builder.function(name, [source]):
            with self._builder.dataflow():
                for binding in bindings(function):
                    expr = rebuild(binding.value, environment)
                    lowered = self._lower(expr)
                    is_var = isinstance(lowered, relax.Var)
                    environment[binding.var] = lowered if is_var else self._builder.emit(lowered)
                output = self._builder.emit_output(environment[function.body.body])
            self._builder.emit_func_output(output)
        if self._not_by_session:
            raise NotBySessionError("; ".join(self._not_by_session))
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
                if self.of_sessions and expr.op.name in self.by_session:
                    return self._lower_by_session(expr, handler)
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


def is_of_sessions(function: str) -> bool:
    """Whether the rows of the function of this name are tokens of different sessions."""
    return function.startswith("batch")
