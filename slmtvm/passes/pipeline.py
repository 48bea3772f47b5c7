"""The passes in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from slmtvm.ir.lowered import LoweredModel
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.fuse_attention import FuseAttention
from slmtvm.passes.fuse_convolution import FuseConvolution
from slmtvm.passes.fuse_residual import FuseResidual
from slmtvm.passes.fuse_rows import FuseRows
from slmtvm.passes.lower_kernels import lower_kernels
from slmtvm.passes.quantize_activations import QuantizeActivations
from slmtvm.passes.specialize import Specialize
from slmtvm.passes.split_experts import SplitExperts
from slmtvm.passes.split_head import SplitHead
from slmtvm.plan.setup import CHUNKS
from slmtvm.schedules.templates import KnobChoice, default_choice
from slmtvm.target import Target


class Pass(Protocol):
    """A rewriting of the canonical model."""

    @property
    def name(self) -> str: ...

    def apply(self, model: CanonicalModel) -> CanonicalModel: ...


def passes(
    activations: str = "int8", chunks: tuple[int, ...] = CHUNKS
) -> tuple[Pass, ...]:  # fmt: skip
    """What does not depend on the target: run once for all targets of a bundle."""
    return (
        SplitHead(),
        FuseAttention(),
        FuseConvolution(),
        SplitExperts(),
        FuseRows(),
        QuantizeActivations(activations),
        FuseResidual(),
        Specialize(chunks),
    )


def fuse(
    model: CanonicalModel,
    progress: Callable[[str], None] = lambda _: None,
    activations: str = "int8",
    chunks: tuple[int, ...] = CHUNKS,
) -> CanonicalModel:
    """The model with its ops fused and its shapes static; ``progress`` hears each pass.

    ``activations``: as for ``QuantizeActivations``; ``chunks`` as for ``Specialize``.
    """
    for step in passes(activations, chunks):
        progress(step.name)
        model = step.apply(model)
    return model


def lower(
    fused: CanonicalModel,
    target: Target,
    kv_dtype: str | None = None,
    choose: KnobChoice = default_choice,
    sparse: str = "auto",
    keep: str = "window",
) -> LoweredModel:
    """The fused model as calls of the target's kernels; the others as for ``lower_kernels``."""
    return lower_kernels(fused, target, kv_dtype, choose, sparse, keep)
