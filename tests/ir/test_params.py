"""Values of parameters: those of experts lie apart until they are read."""

from __future__ import annotations

import numpy as np

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
