"""Values of parameters: those of experts lie apart until they are read."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.ir.params import Params, Stack


def test_a_stack_is_the_array_of_its_parts() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 9, (3, n, 5), np.int8) for n in (4, 7))
    stack = Stack.side_by_side([Stack.of(first), Stack.of(second)])
    whole = np.concatenate([first, second], axis=1)
    assert (stack.shape, stack.dtype, stack.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
    np.testing.assert_array_equal(stack.assembled(), whole)
    np.testing.assert_array_equal(stack.of_expert(1), whole[1])
    more = Stack.joined([stack, Stack.of(whole)])
    np.testing.assert_array_equal(more.assembled(), np.concatenate([whole, whole]))


def test_parameters_are_assembled_when_they_are_read() -> None:
    array = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    params = Params({"stack": Stack.of(array), "array": array, "other": array})
    kept = Params(params).only({"stack", "array"})
    assert list(kept) == ["stack", "array"] and kept.nbytes == 2 * array.nbytes
    assert kept["array"] is array
    np.testing.assert_array_equal(kept["stack"], array)
    assert not np.shares_memory(kept["stack"], array)


@pytest.mark.parametrize(
    "other",
    [
        np.array([0.0, 2.0], np.float32),
        np.array([-0.0, 1.0], np.float32),
        np.array([[0.0, 1.0]], np.float32),
        np.array([0, 0x3F800000], np.int32),
        Stack.of(np.array([0.0, 1.0], np.float32)[:, None]),
    ],
    ids=["value", "sign of zero", "shape", "dtype", "stack"],
)
def test_a_label_is_shared_by_what_is_equal_and_by_nothing_else(other: np.ndarray | Stack) -> None:
    first = np.array([0.0, 1.0], np.float32)
    params = Params()
    assert params.put("w", first) == "w"
    assert params.put("w", first.copy()) == "w"
    assert params.put("w", other) == "w.1"
    assert params.put("w", other) == "w.1"
    assert params["w"] is first


def test_a_number_that_is_none_is_equal_to_itself() -> None:
    params = Params()
    assert {params.put("w", np.full(3, np.nan)) for _ in range(2)} == {"w"}


@pytest.mark.parametrize("label", ["tokens", "hidden", "limits", "layer3.k_cache", "conv0"])
def test_no_value_has_a_name_of_the_compilers_own(label: str) -> None:
    assert Params().put(label, np.zeros(3)) == f"{label}.1"
