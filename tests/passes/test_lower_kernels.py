"""What becomes of weights when ops become calls of kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slmtvm.passes.lower_kernels import lower_kernels
from slmtvm.passes.pipeline import fuse
from slmtvm.target import Target
from tests.passes.toy import decoder


@pytest.mark.parametrize("target", ["x86-64-v3", "riscv64-rvv"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_the_head_is_stored_as_the_head_reads_it(tied: bool, target: str) -> None:
    model = decoder("f32", layers=1)
    table = model.params["embedding"] if tied else model.params["embedding"] + 1
    model = replace(model, params={**model.params, "head.weight": table})
    lowered = lower_kernels(fuse(model), Target.load(target))
    assert ("embedding" in lowered.weights) != tied
    assert sum(name.startswith("head.weight@") for name in lowered.weights) == 1
    assert any(name.startswith("packed_embedding") for name in lowered.kernels) == tied
