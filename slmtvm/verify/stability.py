"""How far onnxruntime's results for one file are from each other: what no other can be nearer to.

Where activations are rounded, the last bit of a float can decide which way a value is rounded; if
all rows of a call are rounded by one scale, what comes later can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
import onnx
from onnx import numpy_helper

from slmtvm.errors import SlmError
from slmtvm.verify.agreement import Figures, worst
from slmtvm.verify.cases import Case
from slmtvm.verify.reference import Reference

_DRAWS = 4  # of last bits
_PREFIXES = 6  # lengths of a decoder's window that are run without what comes after
_HALF_STEP = np.float32(2.0**-11)
_MOST_BYTES = 1 << 30  # of a file whose numbers are changed: it is held in memory several times

Rows = list[np.ndarray]
Measure = Callable[[Rows, Rows, Sequence[Case]], Figures]


def own_difference(
    reference: Reference,
    cases: Sequence[Case],
    measure: Measure,
    enough: Callable[[Figures], bool] = lambda _: True,
    *,
    half: bool = False,
) -> Figures | None:
    """The largest difference between onnxruntime on the file and on the same numbers otherwise.

    That is, for a decoder, for the first tokens of a window without the others, with last bits of
    the file's float32 numbers changed, of float16 where ``half``, in which a cache holds what it
    keeps, and with its graph optimized; no more of these than is ``enough``. None where onnxruntime
    runs none of them.
    """
    wanted = [case.reference_rows(reference) for case in cases]
    found: list[Figures] = []

    def add(figures: Figures) -> None:
        if figures.is_finite:  # else what was changed in the file was no weight
            found.append(figures)

    first = cases[0]
    if first.mask is None and first.kind == "decoder":
        for part in _prefixes(first):
            rows = part.reference_rows(reference)
            add(measure([rows], [wanted[0][: len(rows)]], [part]))
    for make in variants(reference, half):
        try:
            other = make()
            add(measure([case.reference_rows(other) for case in cases], wanted, cases))
        except SlmError:
            continue  # that an optimized file does not run says nothing of the file
        if found and enough(worst(found)):
            break
    return worst(found) if found else None


def variants(reference: Reference, half: bool = False) -> Iterator[Callable[[], Reference]]:
    """The same numbers in other ways, those that tell most first: last bits of weights changed, the
    graph optimized."""
    draws = range(_DRAWS) if reference.size <= _MOST_BYTES else range(0)
    changes = [
        partial(with_other_bits, random=np.random.default_rng(seed), half=half) for seed in draws
    ]
    for change in changes[:1]:
        yield partial(reference.variant, change=change)
    yield partial(reference.variant, optimize=True)
    for change in changes[1:]:
        yield partial(reference.variant, change=change)


def _prefixes(case: Case) -> Iterator[Case]:
    """A decoder's window, shorter and shorter."""
    count = len(case.tokens)
    for length in sorted({int(x) for x in np.geomspace(1, max(count // 2, 1), _PREFIXES)}):
        yield replace(case, tokens=case.tokens[:length], following=case.following[:length])


def with_other_bits(
    model: onnx.ModelProto, random: np.random.Generator, *, half: bool = False
) -> onnx.ModelProto:
    """``model``, half of its weights' float32 numbers moved, in place, to the next one to zero.

    Where ``half``, by as much as float16 rounds them at most.
    Single numbers stay: one may be an exponent, which must be whole for what is negative.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and prod(tensor.dims) > 1:
            array = numpy_helper.to_array(tensor)
            stay = random.random(array.shape) < 0.5
            near = array * (1 - _HALF_STEP) if half else np.nextafter(array, np.float32(0))
            moved = np.where(stay, array, near)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return model
