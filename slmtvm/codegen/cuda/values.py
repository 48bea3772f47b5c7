"""TIR expressions over vectors as CUDA text: what one thread of a team computes.

A vector of 16 lanes or a multiple lies across a team, as many consecutive lanes in each thread. Of
a shorter one, thread t holds lane ``t % lanes``: of a scalar every thread has a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad

from slmtvm.errors import UnsupportedOpError
from slmtvm.schedules.isa.cuda import DP4A, DP4A_PAIRS, LANES, MMA

Expr = Any

C_TYPES = {
    "bool": "bool", "int8": "signed char", "uint8": "unsigned char", "int16": "short",
    "uint16": "unsigned short", "int32": "int", "uint32": "unsigned", "float32": "float",
    "float16": "unsigned short", "tile": "slm_tile",
}  # fmt: skip
_SIZES = {"int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2}  # bytes; others 4
_INT_BYTES = 4
_LEAST_INT = -(1 << 31)
_BINARY = {
    tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.Div: "/", tirx.LT: "<", tirx.LE: "<=",
    tirx.GT: ">", tirx.GE: ">=", tirx.EQ: "==", tirx.And: "&&", tirx.Or: "||",
    tirx.BitwiseAnd: "&", tirx.BitwiseOr: "|", tirx.BitwiseXor: "^", tirx.LShift: "<<",
    tirx.RShift: ">>",
}  # fmt: skip
_LLVM_UNARY = {"llvm.fabs": "fabsf", "llvm.sqrt": "sqrtf"}


@dataclass(frozen=True)
class Value:
    """The C expressions of the elements that a thread holds of a vector of ``lanes``."""

    kind: str  # of an element, as TIR names it
    lanes: int
    parts: tuple[str, ...]


def size_of(kind: str) -> int:
    """Bytes of an element."""
    return _SIZES.get(kind, 4)


def type_of(expr: Expr) -> tuple[str, int]:
    """An expression's kind of element, and its lanes."""
    dtype = expr.ty.dtype
    lanes = int(dtype.lanes)
    return str(dtype).removesuffix(f"x{lanes}") if lanes > 1 else str(dtype), lanes


def parts_of(lanes: int) -> int:
    """How many elements of a vector a thread holds."""
    return max(1, lanes // LANES)


def place(lanes: int, part: int) -> str:
    """Which lane of a vector part ``part`` of the thread ``t.lane`` is."""
    if lanes < LANES:
        return f"t.lane % {lanes}" if lanes > 1 else "0"
    each = lanes // LANES
    return "t.lane" if each == 1 else f"(t.lane * {each} + {part})"


def unsupported(what: object) -> UnsupportedOpError:
    return UnsupportedOpError(f"a kernel has {what}, which has no CUDA text")


class Values:
    """Writes expressions.

    ``load`` gives the value of a load as a kind and lanes, ``address`` the pointer to what one
    would read; ``name`` emits a statement that names a C expression, for what all threads of a team
    must reach together.
    """

    def __init__(
        self,
        load: Callable[[Expr, str, int], Value],
        address: Callable[[Expr], str],
        name: Callable[[str, str], str],
    ) -> None:
        self._load = load
        self._address = address
        self._name = name
        self._bound: dict[Any, Value] = {}

    def bind(self, var: Any, value: Value) -> None:
        """``var`` stands for ``value``, of plain names, from here on."""
        self._bound[var] = value

    def scalar(self, expr: Expr) -> str:
        """The C expression of what is one lane."""
        value = self.value(expr)
        assert value.lanes == 1, expr
        return value.parts[0]

    def value(self, expr: Expr) -> Value:
        kind, lanes = type_of(expr)
        if isinstance(expr, tirx.Var):
            return self._bound[expr]
        if isinstance(expr, TensorLoad):
            return self._load(expr, kind, lanes)
        if isinstance(expr, (tirx.IntImm, tirx.FloatImm)):
            return Value(kind, 1, (_literal(kind, expr.value),))
        if isinstance(expr, tirx.Broadcast):
            return Value(kind, lanes, (self.scalar(expr.value),) * parts_of(lanes))
        if isinstance(expr, tirx.Ramp):
            base, stride = self.scalar(expr.base), self.scalar(expr.stride)
            step = "" if stride == "1" else f" * {stride}"
            return self._each(kind, lanes, lambda i: f"({base} + {place(lanes, i)}{step})")
        if isinstance(expr, tirx.Cast):
            return self._cast(kind, self.value(expr.value))
        if isinstance(expr, tirx.Select):
            return self._combine(
                kind, lanes, "({} ? {} : {})",
                [expr.condition, expr.true_value, expr.false_value],
            )  # fmt: skip
        if isinstance(expr, tirx.Shuffle):
            return self._shuffle(kind, lanes, expr)
        if isinstance(expr, tirx.Not):
            return self._combine(kind, lanes, "(!{})", [expr.a])
        if isinstance(expr, Call):
            return self._call(kind, lanes, expr)
        return self._binary(kind, lanes, expr)

    def _binary(self, kind: str, lanes: int, expr: Expr) -> Value:
        both = [expr.a, expr.b]
        operator = _BINARY.get(type(expr))
        if operator:
            return self._combine(kind, lanes, f"({{}} {operator} {{}})", both)
        # As LLVM has them: the second where either is not a number.
        if isinstance(expr, (tirx.Max, tirx.Min)):
            sign = ">" if isinstance(expr, tirx.Max) else "<"
            return self._combine(kind, lanes, f"({{0}} {sign} {{1}} ? {{0}} : {{1}})", both)
        if isinstance(expr, (tirx.FloorDiv, tirx.FloorMod)):
            name = "slm_floordiv" if isinstance(expr, tirx.FloorDiv) else "slm_floormod"
            return self._combine(kind, lanes, f"{name}({{}}, {{}})", both)
        if isinstance(expr, tirx.NE) and not type_of(expr.a)[0].startswith("float"):
            return self._combine(kind, lanes, "({} != {})", both)
        raise unsupported(type(expr).__name__)

    def _call(self, kind: str, lanes: int, expr: Expr) -> Value:
        name = str(expr.op.name)
        if name == "tirx.reinterpret":
            return self._reinterpret(kind, lanes, expr.args[0])
        if name == "tirx.fma":
            return self._combine(kind, lanes, "fmaf({}, {}, {})", expr.args)
        if name == "tirx.if_then_else":
            return self._combine(kind, lanes, "({} ? {} : {})", expr.args)
        if name == "tirx.call_extern" and str(expr.args[0].value) in (DP4A, DP4A_PAIRS):
            called, operands = str(expr.args[0].value), expr.args[1:]
            given = ", ".join(["{}"] * len(operands))
            return self._combine(kind, lanes, f"{called}({given})", operands)
        if name == "tirx.call_extern" and str(expr.args[0].value) in MMA:
            return self._mma(kind, lanes, str(expr.args[0].value), expr.args[1:])
        if name == "tirx.call_llvm_pure_intrin":
            return self._llvm(kind, lanes, expr)
        raise unsupported(name)

    def _mma(self, kind: str, lanes: int, name: str, operands: Sequence[Expr]) -> Value:
        """What both teams of a warp do together."""
        *others, state = operands
        given = ["t"]
        for operand in others:
            if isinstance(operand, Call) and str(operand.op.name) == "tirx.address_of":
                given.append(self._address(operand.args[0]))
            else:
                given.append(self.scalar(operand))
        given.append(f"slm_tile{{{{{', '.join(self.value(state).parts)}}}}}")
        made = self._name("tile", f"{name}({', '.join(given)})")
        return Value(kind, lanes, tuple(f"{made}.v[{i}]" for i in range(parts_of(lanes))))

    def _llvm(self, kind: str, lanes: int, expr: Expr) -> Value:
        name = tvm.get_global_func("target.llvm_get_intrinsic_name")(int(expr.args[0]))
        operands = expr.args[1:]
        if name == "llvm.fma":
            return self._combine(kind, lanes, "fmaf({}, {}, {})", operands)
        if name in _LLVM_UNARY:
            return self._combine(kind, lanes, f"{_LLVM_UNARY[name]}({{}})", operands)
        if name == "llvm.vector.reduce.add":
            value = self.value(operands[0])
            own = " + ".join(value.parts)
            text = f"slm_sum(t, {own}, {min(value.lanes, LANES)})"
            return Value(kind, 1, (self._name(kind, text),))
        raise unsupported(name)

    def _cast(self, kind: str, value: Value) -> Value:
        if value.kind == "float16":
            assert kind == "float32", kind
            text = "slm_widen({})"
        elif kind == "float16":
            assert value.kind == "float32", value.kind
            text = "slm_narrow({})"
        else:
            text = f"(({C_TYPES[kind]}){{}})"
        return Value(kind, value.lanes, tuple(text.format(p) for p in value.parts))

    def _reinterpret(self, kind: str, lanes: int, operand: Expr) -> Value:
        given, given_lanes = type_of(operand)
        if isinstance(operand, TensorLoad) and given_lanes > 1 and size_of(given) < 4:
            return self._load(operand, kind, lanes)  # as what it is to be
        value = self.value(operand)
        if given_lanes != lanes or size_of(given) != size_of(kind):
            raise unsupported(f"{given}x{given_lanes} taken as {kind}x{lanes}")
        if kind == "float32":
            text = "slm_float({})"
        elif given == "float32":
            text = "slm_bits({})" if kind == "int32" else "(unsigned)slm_bits({})"
        else:
            text = f"(({C_TYPES[kind]}){{}})"
        return Value(kind, lanes, tuple(text.format(p) for p in value.parts))

    def _shuffle(self, kind: str, lanes: int, expr: Expr) -> Value:
        """Lane i is lane ``indices[i]`` of the operands, one behind the other."""
        operands = [self.value(v) for v in expr.vectors]
        chosen = [int(i) for i in expr.indices]
        each = parts_of(operands[0].lanes)
        own = [lane * each + chosen[0] for lane in range(LANES)]  # of each thread's the same one
        if each > 1 and len(operands) == 1 and chosen[0] < each and chosen == own:
            return Value(kind, lanes, (operands[0].parts[chosen[0]],))
        if lanes > LANES or any(v.lanes > LANES for v in operands):
            raise unsupported(f"a shuffle of {lanes} lanes")
        result, first = "", 0
        for value in operands:
            mine = [c - first if first <= c < first + value.lanes else None for c in chosen]
            first += value.lanes
            if all(m is None for m in mine):
                continue
            text = value.parts[0]
            if value.lanes > 1 and mine != list(range(value.lanes)):
                text = self._name(kind, _moved(value, mine))
            result = f"({_these(mine)} ? {text} : {result})" if result else text
        return Value(kind, lanes, (result,))

    def _combine(self, kind: str, lanes: int, text: str, operands: Sequence[Expr]) -> Value:
        values = [self.value(o) for o in operands]
        for value in values:
            assert value.lanes in (lanes, 1), (text, value)
        if size_of(kind) < _INT_BYTES and kind != "bool":  # C computes with int
            text = f"(({C_TYPES[kind]}){text})"
        return self._each(
            kind, lanes, lambda i: text.format(*(v.parts[i if v.lanes > 1 else 0] for v in values))
        )

    def _each(self, kind: str, lanes: int, text: Callable[[int], str]) -> Value:
        return Value(kind, lanes, tuple(text(i) for i in range(parts_of(lanes))))


def _moved(value: Value, wanted: Sequence[int | None]) -> str:
    """The lanes of ``value`` that are wanted, any where none is.

    A result shorter than a team repeats, as all vectors do.
    """
    if value.kind not in ("float32", "int32"):
        raise unsupported(f"a shuffle of {value.kind}")
    lanes = len(wanted)
    known = [(i, w) for i, w in enumerate(wanted) if w is not None]
    shifts = {w - i for i, w in known}
    if len(shifts) == 1:
        shift = shifts.pop()
        source = place(lanes, 0) if shift == 0 else f"({place(lanes, 0)} + {shift})"
    else:
        table = sum((w or 0) << 4 * i for i, w in enumerate(wanted))
        source = f"(int)({table:#x}ull >> 4 * ({place(lanes, 0)}) & 15)"
    return f"slm_from(t, {value.parts[0]}, {source})"


def _these(wanted: Sequence[int | None]) -> str:
    """Whether a thread's lane is among those wanted."""
    bits = sum((w is not None) << i for i, w in enumerate(wanted))
    return f"({bits:#x} >> ({place(len(wanted), 0)}) & 1)"


def _literal(kind: str, value: Any) -> str:
    if kind == "float32":
        real = float(value)
        if math.isfinite(real):
            return f"{real.hex()}f" if real >= 0 else f"({real.hex()}f)"
        bits = "0x7fc00000" if math.isnan(real) else "0x7f800000" if real > 0 else "0xff800000"
        return f"slm_float((int){bits})"
    if kind == "bool":
        return "true" if value else "false"
    number = int(value)
    if kind == "uint32":
        return f"{number}u"
    if number == _LEAST_INT:  # 2147483648 is no int
        return f"({number + 1} - 1)"
    return f"({number})" if number < 0 else f"{number}"
