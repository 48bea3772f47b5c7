"""Keeps LLVM to the order in which a kernel is written.

LLVM would take one sum of a tile after the other, each along all of the unrolled k: the weights
that all rows share leave the registers and are loaded again for each. What passes ``in_order`` is
computed before all that is written later and passes it too; no instruction comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tvm import tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import tirx as T

Expr = Any

_ELEMENTS = {"int16": "i16", "int32": "i32", "float32": "float"}

_functions: ContextVar[dict[str, str]] = ContextVar("functions")
"""By name, what the kernel that is being written calls."""


def in_order(value: Expr, register: str) -> Expr:
    """``value``, an int16, int32 or float32 vector that fits a register.

    register: the constraint of inline assembly that stands for one on the target.
    """
    dtype = str(value.ty.dtype)
    element, lanes = dtype.split("x")
    name = f"slm_in_order_{dtype}"
    vector = f"<{lanes} x {_ELEMENTS[element]}>"
    _functions.get()[name] = (
        f"define {vector} @{name}({vector} %given) {{\n"
        f'  %kept = call {vector} asm sideeffect "", "={register},0"({vector} %given)\n'
        f"  ret {vector} %kept\n}}\n"
    )
    return T.bind(T.call_extern(dtype, name, value))


def alone(word: Expr) -> Expr:
    """``word``, an int64, which LLVM does not compute as a lane of a vector of several.

    Addresses that it made together would have to be taken out of the vector one by one.
    """
    name = "slm_alone"
    _functions.get()[name] = (
        f"define i64 @{name}(i64 %given) {{\n"
        '  %kept = call i64 asm "", "=r,0"(i64 %given)\n'
        "  ret i64 %kept\n}\n"
    )
    return T.bind(T.call_extern("int64", name, word))


def in_first_lane(word: Expr, lanes: int, register: str) -> Expr:
    """A vector of ``lanes`` int32 whose first is ``word``; of the others LLVM knows nothing, nor
    that it could load the word into all of them.

    Where instructions take an operand from a lane, a load to one lane alone costs less: on Arm it
    has addresses of two registers.
    """
    name = "slm_in_first_lane"
    vector = f"<{lanes} x i32>"
    _functions.get()[name] = (
        f"define {vector} @{name}(i32 %given) {{\n"
        f"  %lane = insertelement {vector} poison, i32 %given, i32 0\n"
        f'  %kept = call {vector} asm "", "={register},0"({vector} %lane)\n'
        f"  ret {vector} %kept\n}}\n"
    )
    return T.bind(T.call_extern(f"int32x{lanes}", name, word))


def written_call(dtype: str, name: str, code: str, *arguments: Expr) -> Expr:
    """A call of a function that is written in LLVM's language; ``code`` says all of ``name``."""
    _functions.get()[name] = code
    return T.call_extern(dtype, name, *arguments)


def set_apart() -> None:
    """Lets LLVM keep nothing in vector registers from before it, on x86 without AVX-512.

    Of a kernel with several loops, LLVM keeps constants of one in registers throughout the others
    and moves sums of these to memory in their place.
    """
    name = "slm_set_apart"
    clobbered = ",".join(f"~{{xmm{i}}}" for i in range(16))
    _functions.get()[name] = (
        f"define i32 @{name}(i32 %given) {{\n"
        f'  %kept = call i32 asm sideeffect "", "=r,0,{clobbered}"(i32 %given)\n'
        "  ret i32 %kept\n}\n"
    )
    T.evaluate(T.call_extern("int32", name, T.int32(0)))


def align_stack(size: int) -> None:
    """Lets vectors of ``size`` bytes that LLVM moves to the stack lie at multiples of that: callers
    align it to 16 only, where half of those of 32 lie across cache lines."""
    name = f"slm_align_stack_{size}"
    _functions.get()[name] = (
        f"define i32 @{name}(i32 %given) {{\n"
        f"  %room = alloca [{size} x i8], align {size}\n"
        '  %kept = call i32 asm sideeffect "", "=r,0,r"(i32 %given, ptr %room)\n'
        "  ret i32 %kept\n}\n"
    )
    T.evaluate(T.call_extern("int32", name, T.int32(0)))


@contextmanager
def ordered() -> Iterator[dict[str, str]]:
    """A kernel is written within it; gives the functions that it calls, for ``with_functions``."""
    functions: dict[str, str] = {}
    token = _functions.set(functions)
    try:
        yield functions
    finally:
        _functions.reset(token)


def with_functions(func: tirx.PrimFunc, functions: dict[str, str]) -> tirx.PrimFunc:
    """``func`` with what it calls, which LLVM puts where it is called."""
    if not functions:
        return func
    code = "".join(functions[name] for name in sorted(functions))
    zero = tirx.IntImm("int32", 0)
    body = tirx.AttrStmt(zero, "pragma_import_llvm", StringImm(code), func.body)
    return func.with_body(body)
