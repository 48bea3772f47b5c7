"""Each head times its matrix, on every target with the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules.head_linear import HeadLinearShape, build_head_linear
from tests.machines import runnable_targets
from tests.schedules.harness import run

SHAPES = (
    HeadLinearShape(m=3, num_heads=9, groups=3, k=64, n=32),
    HeadLinearShape(m=2, num_heads=5, groups=5, k=7, n=80, has_bias=True),
    HeadLinearShape(m=1, num_heads=6, groups=1, k=33, n=5),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_each_head_is_multiplied_by_its_groups_matrix(shape: HeadLinearShape) -> None:
    rng = np.random.default_rng(0)
    kernel = build_head_linear(shape)
    inputs = {
        t.name: rng.standard_normal(t.shape).astype(np.float32)
        for t in kernel.tensors
        if t.name != "y"
    }
    x = inputs["x"].astype(np.float64).reshape(shape.m, shape.num_heads, shape.k)
    weight = np.repeat(inputs["weight"], shape.num_heads // shape.groups, axis=0)
    want = np.einsum("mhk,hkn->mhn", x, weight).reshape(shape.m, -1) + inputs.get("bias", 0)
    found = [run(kernel, inputs, target, cuts=(1,))["y"] for target in runnable_targets()]
    np.testing.assert_allclose(found[0], want, atol=1e-4)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
