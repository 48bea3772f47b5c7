"""The lowered model: what the passes hand to the plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.ops import define, make_call
from slmtvm.schedules.kernel import Kernel, Tensor

# Not call_tir: our kernels take the bounds of their grid, and change their state in place.
CALL_KERNEL = define("slm.call_kernel", lambda call: call.attrs["out"])


def call_kernel(name: str, inputs: list[relax.Expr], out: relax.Type) -> relax.Call:
    """The outputs, of type ``out``, of the kernel ``name`` on its inputs, weights and state."""
    return make_call(CALL_KERNEL, inputs, kernel=name, out=out)


@dataclass(frozen=True)
class LoweredModel:
    """Relax functions whose every binding is a kernel's call, a field of its result, or a copy.

    ``module`` holds ``body_M``, ``head_M`` and ``source_M``; ``slm.call_kernel`` names one of
    ``kernels``, and ``call_tir`` a PrimFunc of ``module`` where no kernel of ours fits. The first
    parameter of a function is the step's input; the others are named after an array of ``weights``
    or a buffer of ``state``.
    """

    module: tvm.IRModule
    kernels: dict[str, Kernel]
    weights: dict[str, np.ndarray]
    state: dict[str, Tensor]  # the KV cache, ``capacity`` positions each, and a source's
    capacity: int  # positions the KV cache holds
    model: CanonicalModel
