"""What becomes of weights when ops become calls of kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tvm import relax, tirx

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels import lower_kernels
from slmtvm.passes.pipeline import fuse
from slmtvm.schedules import kernel
from slmtvm.target import Target
from tests.passes.toy import Layer, decoder


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


def rounded_layer(step: float) -> Layer:
    """A layer whose scores and gate are rounded to multiples of ``step``."""

    def gate(x: relax.Expr) -> relax.Expr:
        return ops.quantize_dequantize(relax.op.nn.silu(x), scale=step, low=-128, high=127)

    return Layer(roundings=f"1.0:{step}:-128:127", gate=gate)


def test_layers_that_are_rounded_by_other_scales_share_their_kernels() -> None:
    kernels = [
        lower_kernels(
            fuse(decoder("f32", variants=[rounded_layer(step) for step in steps])),
            Target.load("x86-64-v3"),
        ).kernels
        for steps in ((0.5, 0.5), (0.5, 0.25))
    ]
    assert kernels[0].keys() == kernels[1].keys()


def test_kernels_that_layers_share_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    finish = kernel.with_functions

    def note(func: tirx.PrimFunc, functions: dict[str, str]) -> tirx.PrimFunc:
        written.append(str(func.attrs["global_symbol"]))
        return finish(func, functions)

    monkeypatch.setattr(kernel, "with_functions", note)
    lowered = lower_kernels(fuse(decoder("f32", layers=3)), Target.load("x86-64-v3"))
    assert sorted(written) == sorted(lowered.kernels)
