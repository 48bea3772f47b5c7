"""What a kernel is: a TIR function over a grid of independent blocks.

A kernel's parameters are, in order: buffers (inputs, weights, state, outputs, then ``scratch`` if
it needs memory of its own for each thread), the ambient scalars it asks for (int32 ``position`` of
the step's first token, int32 ``valid`` number of real tokens), and int32 ``begin`` and ``end``: the
blocks of the grid that this call computes. Blocks never read what another block of the same call
writes, and no block's arithmetic depends on how the grid is divided: results are the same for
every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.order import ordered, with_functions

AMBIENT_SCALARS = ("position", "valid")

FLAT = "slm.flat"
"""Marks a PrimFunc that needs no more lowering than its last steps."""


@dataclass(frozen=True)
class Tensor:
    """A kernel's buffer: name, shape and dtype; ``scratch`` is the one private to a thread.

    With ``at_most``, what is given may have fewer elements than ``shape``: how many says its value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    at_most: bool = False

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can be given."""
        given, own = math.prod(shape), math.prod(self.shape)
        return given == own or (self.at_most and given < own)


@dataclass(frozen=True)
class Work:
    """What one call computes and reads, for the bench; nothing depends on it.

    ``multiply_adds`` in all, and ``context_multiply_adds`` for each position that a row attends to.
    ``window``: how many positions it attends to at most, 0 for no bound. ``positions``: how many
    the cache that it reads holds, 0 where it reads none.
    ``touched``: bytes, of those tensors of which a call reads only a part.
    """

    multiply_adds: int = 0
    context_multiply_adds: int = 0
    window: int = 0
    positions: int = 0
    touched: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tunable:
    """What a kernel was made from: ``kind`` and ``shape`` say what it computes, ``knobs`` only how.

    ``kind`` is a name in ``schedules.templates``, which makes the kernel of the same shape with
    other knobs.
    """

    kind: str
    shape: Any
    knobs: Mapping[str, int]


@dataclass(frozen=True)
class Kernel:
    """A PrimFunc and how it is run.

    ``tensors`` are the buffers of ``func`` in order; ``scalars`` the ambient scalars after them.
    ``outputs`` names the tensors that the kernel writes in full, ``state`` those it updates in
    place. ``tunable`` is None where there are no knobs. The grid falls into ``runs`` equal parts of
    consecutive blocks; kernels of equal ``runs`` above 1 that follow one another read only what the
    same run of the others wrote.
    """

    func: tirx.PrimFunc
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    state: tuple[str, ...]
    scalars: tuple[str, ...]
    grid: int
    work: Work = Work()
    tunable: Tunable | None = None
    runs: int = 1


_defined: ContextVar[dict[str, Kernel] | None] = ContextVar("_defined", default=None)


@contextmanager
def each_written_once() -> Iterator[None]:
    """Within it, the code of kernels of one name is written once: the layers of a model ask for the
    same ones again and again, and writing takes longer than compiling."""
    token = _defined.set({})
    try:
        yield
    finally:
        _defined.reset(token)


def define(
    name: str,
    tensors: Sequence[Tensor],
    body: Callable[..., None],
    *,
    grid: int,
    outputs: Sequence[str],
    state: Sequence[str] = (),
    scalars: Sequence[str] = (),
    work: Work | None = None,
    runs: int = 1,
) -> Kernel:
    """Build a kernel: ``body(block, *buffers, *scalars)`` emits TIR for one block of the grid.

    ``name`` must say all that the code depends on: two kernels of one name are one kernel. Buffers
    are flat inside ``body``: index them with one element offset or one ``T.ramp``.
    """
    assert all(s in AMBIENT_SCALARS for s in scalars), scalars
    defined = _defined.get()
    if defined is not None and name in defined:
        return defined[name]
    with ordered() as functions, IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, FLAT: True})
        buffers = [T.arg(t.name, T.buffer((_elements(t),), t.dtype)) for t in tensors]
        ambient: list[Any] = [T.arg(s, T.int32()) for s in scalars]
        begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
        with T.serial(begin, end) as block:
            body(block, *buffers, *ambient)
    kernel = Kernel(
        with_functions(builder.get(), functions),
        tuple(tensors),
        tuple(outputs),
        tuple(state),
        tuple(scalars),
        grid,
        work or Work(),
        runs=runs,
    )
    if defined is not None:
        defined[name] = kernel
    return kernel


def _elements(tensor: Tensor) -> int:
    count = 1
    for extent in tensor.shape:
        count *= extent
    return count
