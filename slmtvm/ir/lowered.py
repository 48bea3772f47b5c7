"""The lowered model: what the passes hand to the plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm

from slmtvm.ir.model import CanonicalModel
from slmtvm.schedules.kernel import Kernel


@dataclass(frozen=True)
class LoweredModel:
    """Relax functions whose every binding is a call_tir, a field of its result, or a copy.

    ``module`` holds ``body_M`` and ``head_M``; a call_tir names a kernel of ``kernels``, or a
    PrimFunc of ``module`` where no kernel of ours fits. The first parameter of a function is the
    step's input; the others are named after an array of ``weights`` or a buffer of ``state``.
    """

    module: tvm.IRModule
    kernels: dict[str, Kernel]
    weights: dict[str, np.ndarray]
    state: dict[str, tuple[int, ...]]  # name -> shape; float32
    capacity: int  # positions the KV cache holds
    model: CanonicalModel
