"""Kernels that pick activations out of windows compute the bits of the dense ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules.isa import WINDOWS, Isa
from slmtvm.schedules.linear import LinearShape, Weights, windows
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.linear_cases import Case, random_case

SHAPES = [
    LinearShape(1, 33, 70, "int8", "row_u8", has_bias=True),
    LinearShape(11, 20, 100, "int8", "row_u8", has_bias=True, has_residual=True),
    LinearShape(3, 1, 7, "int8", "row_u8"),
]


def name(shape: LinearShape) -> str:
    return shape.kernel_name("", {}).removeprefix("linear_")


def kept_of(weight: np.ndarray, kept: int, size: int) -> np.ndarray:
    """``weight`` (n, k) with ``kept`` random weights of every ``size`` neighbours along k."""
    n, k = weight.shape
    order = np.random.default_rng(3).random((n, -(-k // size), size)).argsort(axis=2)
    return np.where((order < kept).reshape(n, -1)[:, :k], weight, 0).astype(np.int8)


def pruned_case(shape: LinearShape, isa: Isa, window: str) -> Case:
    """Extreme weights and activations, as many in each window as it takes."""
    case = random_case(shape, isa, extreme=True)
    chosen = WINDOWS[window]
    weight = kept_of(case.weights["weight"], chosen.kept, chosen.size)
    scales = np.random.default_rng(2).uniform(0.001, 0.03, shape.n).astype(np.float32)
    return dataclasses.replace(case, weights={"weight": weight, "scales": scales})


def picking(case: Case, window: str) -> Case:
    shape = dataclasses.replace(case.shape, sparse=True, window=window, has_zero_points=False)
    return dataclasses.replace(case, shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("target_name", EVERY_TARGET)
def test_a_kernel_that_picks_computes_the_bits_of_the_dense_one(
    target_name: str, window: str
) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    if window not in isa.window_times:
        with pytest.raises(NotImplementedError if not isa.window_times else KeyError):
            (isa.picking(WINDOWS[window]), isa.window_times[window])
        return
    for shape in SHAPES:
        case = pruned_case(shape, isa, window)
        expected = case.run(target, isa)
        given = picking(case, window).run(target, isa, cuts=(1,))
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), name(shape))


@pytest.mark.slow
@pytest.mark.parametrize("target_name", ["x86-64-v3", "cortex-a78", "cortex-a72"])
def test_any_tile_gives_the_same_bits(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    for window in isa.window_times:
        case = pruned_case(dataclasses.replace(SHAPES[1], n=70), isa, window)
        expected = case.run(target, isa)
        for mr, panels, ku, pf in ((3, 1, 4, 0), (8, 2, 2, 1), (2, 4, 1, 2)):
            knobs = {"mr": mr, "nv": panels * isa.for_blocks.vectors, "ku": ku, "pf": pf}
            given = picking(case, window).run(target, isa, knobs, cuts=(1, 2))
            np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("window", ["4of8", "4of16"])
def test_zero_points_are_taken_off(window: str) -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = pruned_case(SHAPES[1], isa, window)
    zeros = np.random.default_rng(4).integers(-27, 28, SHAPES[1].n).astype(np.int8)
    weight = np.clip(case.weights["weight"], -100, 100) + zeros[:, None]
    dense = dataclasses.replace(
        case,
        shape=dataclasses.replace(case.shape, has_zero_points=True),
        weights=case.weights | {"weight": weight.astype(np.int8), "zero_points": zeros},
    )
    given, expected = (c.run(target, isa) for c in (picking(dense, window), dense))
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_one_weight_too_many_breaks_a_window() -> None:
    weight = kept_of(np.ones((40, 70), np.int8), 2, 4)
    chosen = {name: windows.fits(window, Weights(weight)) for name, window in WINDOWS.items()}
    assert chosen == {"4of16": False, "8of16": True, "4of8": True}
    weight[17, 64:70] = 1  # the last window, whose rest is padding
    broken = {name: windows.fits(window, Weights(weight)) for name, window in WINDOWS.items()}
    assert broken == {"4of16": False, "8of16": True, "4of8": False}
    far = Weights(np.full((1, 16), 127, np.int8), None, np.full(1, -2, np.int8))
    assert not windows.fits(WINDOWS["4of8"], far)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": "4of8"}, "of sparse weights"),
        ({"window": "3of7", "sparse": True}, "4of8"),
        ({"window": "4of8", "sparse": True, "has_zero_points": True}, "without zero points"),
    ],
)
def test_other_windows_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(isas.TargetError, match=said):
        LinearShape(1, 16, 64, "int8", "row_u8", **changes)
