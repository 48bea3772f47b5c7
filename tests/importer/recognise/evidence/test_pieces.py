"""Which operators numbers account for, and which numbers they need."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.importer.recognise.evidence.pieces import (
    Account,
    in_arrays,
    is_algebraic,
    is_linear,
    linear_node,
    probing_numbers,
)
from slmtvm.importer.recognise.evidence.ranges import FINITE, SHARES, Range
from slmtvm.importer.recognise.evidence.regions import evaluate_all
from tests.importer.recognise.evidence.test_ranges import frozen_with, node

FROZEN = frozen_with(
    two=2.0, eight=8.0, zero=0.0, minus=-8.0, mask=np.array([True, False]), axis=np.array([-1])
)
FLOAT, INT32 = 1, 6


@pytest.mark.parametrize(
    ("nodes", "linear"),
    [
        ([node("Mul", "x two", "y")], True),
        ([node("Mul", "x x", "y")], False),
        ([node("Div", "x two", "y")], True),
        ([node("Div", "two x", "y")], False),
        ([node("Neg", "x", "t"), node("Sub", "x t", "y")], True),
        ([node("Where", "mask x zero", "y")], True),
        ([node("Clip", "x minus eight", "y")], False),
        ([node("Abs", "x", "y")], False),
        ([node("Round", "x", "y")], False),
        ([node("Tanh", "x", "y")], False),
    ],
)
def test_linear_are_sums_moves_and_products_with_constants(nodes, linear):
    assert is_linear(FROZEN, nodes, {"x": FINITE}) is linear
    assert all(linear_node(FROZEN, n) for n in nodes) is linear


@pytest.mark.parametrize(
    ("given", "linear"), [(SHARES, True), (Range(-1.0, 1.0), False), (Range(0.0, 9.0), False)]
)
def test_a_guard_is_linear_where_it_never_acts(given, linear):
    nodes = [
        node("Abs", "x", "a"),
        node("Clip", "a zero eight", "b"),
        node("IsNaN", "b", "t"),
        node("Where", "t zero b", "y"),
    ]
    assert is_linear(FROZEN, nodes, {"x": given}) is linear
    assert not any(linear_node(FROZEN, n) for n in nodes)


@pytest.mark.parametrize(
    ("kind", "algebraic"),
    [("Sqrt", True), ("Reciprocal", True), ("Relu", True), ("Softplus", False), ("Tanh", False)],
)
def test_algebraic_are_arithmetic_and_roots_of_sums(kind, algebraic):
    nodes = [
        node("Mul", "x x", "square"),
        node("ReduceMean", "square axis", "mean"),
        node(kind, "mean", "y"),
    ]
    assert is_algebraic(FROZEN, nodes, {"x": FINITE}) is algebraic


def missing(nodes, numbers, given=FINITE):
    account = Account(FROZEN, nodes, {"x": given})
    account.see(evaluate_all(FROZEN, nodes, {"x": np.asarray(numbers, np.float64)}))
    return account.missing


@pytest.mark.parametrize(
    ("kind", "inputs", "enough", "short"),
    [
        ("Clip", "x minus eight", [-9, 0, 9], [0, 9]),
        ("Clip", "x - eight", [0, 9], [0, 1]),
        ("Max", "x minus", [-9, 0], [0, 1]),
        ("Min", "minus x", [-9, 0], [-9, -10]),
        ("Relu", "x", [-1, 1], [1, 2]),
        ("Abs", "x", [-1, 1], [-1, -2]),
        ("HardSwish", "x", [-4, 0, 4], [0, 4]),
    ],
)
def test_both_sides_of_every_bound_are_needed(kind, inputs, enough, short):
    (only,) = nodes = [node(kind, inputs, "y")]
    assert missing(nodes, enough) is None
    assert missing(nodes, short) is only


def test_each_side_of_a_test_is_needed_and_not_of_one_that_is_never_true():
    nodes = [node("Greater", "x eight", "t"), node("Where", "t eight x", "y")]
    assert missing(nodes, [7, 9]) is None
    assert missing(nodes, [1, 2]) in nodes
    assert missing(nodes, [0.1, 0.2], SHARES) is None


@pytest.mark.parametrize(
    ("kind", "inputs"), [("Round", "x"), ("Floor", "x"), ("Sign", "x"), ("Equal", "x two")]
)
def test_steps_and_single_points_are_accounted_for_by_no_numbers(kind, inputs):
    assert missing([node(kind, inputs, "y")], np.linspace(-9, 9, 99)) is not None


def test_casts_of_floats_to_integers_are_steps_and_to_floats_are_not():
    through = [node("Cast", "x", "t", to=INT32), node("Cast", "t", "y", to=FLOAT)]
    assert missing(through, [-1, 0, 1]) is through[0]
    assert missing([node("Cast", "x", "y", to=FLOAT)], [1.0]) is None


def test_probing_numbers_lie_on_both_sides_of_all_that_a_graph_holds():
    nodes = [node("Clip", "x minus eight", "y"), node("Add", "y two", "z")]
    numbers = np.sort(probing_numbers(FROZEN, nodes))
    for held in (2.0, 8.0):
        for sign in (-1, 1):
            beside = np.abs(numbers - sign * held)
            assert (beside < 0.02 * held).sum() >= 3
    assert 0.0 in numbers
    assert numbers[0] == -numbers[-1]
    assert numbers[-1] == pytest.approx(1e30)
    assert np.abs(numbers[numbers != 0]).min() <= 1e-30


def test_probing_numbers_of_half_precision_do_not_overflow():
    frozen = frozen_with(c=np.asarray(1, np.float16))
    assert np.abs(probing_numbers(frozen, [node("Add", "x c", "y")])).max() < 65504


def test_arrays_hold_all_numbers():
    numbers = np.arange(17.0)
    arrays = list(in_arrays(numbers, (2, 3)))
    assert len(arrays) == 3
    assert set(np.concatenate(arrays).reshape(-1)) == set(numbers)
