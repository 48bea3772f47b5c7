"""The lowered model: what the passes hand to the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.ops import define, make_call
from slmtvm.schedules.kernel import Kernel, Tensor

# Not call_tir: our kernels take the bounds of their grid, and change their state in place.
CALL_KERNEL = define("slm.call_kernel", lambda call: call.attrs["out"])


def call_kernel(
    name: str, inputs: list[relax.Expr], out: relax.Type, *, by_session: bool = False
) -> relax.Call:
    """The outputs, of type ``out``, of the kernel ``name`` on its inputs, weights and state.

    by_session: the kernel is of one row, and called for each row with the state and the position
    of that row's session; inputs that are values, and outputs, hold the rows one after the other.
    """
    return make_call(CALL_KERNEL, inputs, kernel=name, out=out, by_session=int(by_session))


@dataclass(frozen=True)
class SparseLayer:
    """A linear layer with zeros that a kernel could skip, and what became of it on a target.

    ``kernel``: the one expected to be fastest, "blocks", "columns" or a window like "4of8".
    ``density``: which part of the blocks hold a weight that is not zero, or of a window's weights
    are kept. ``relative_time``: what the kernel is expected to take, of the dense one's time;
    ``bytes_left`` of the weights it would read. ``taken``: whether it is what runs.
    """

    name: str
    kernel: str
    density: float
    relative_time: float
    bytes_left: float
    taken: bool

    def facts(self) -> dict[str, object]:
        """The same as JSON values, to three digits."""
        return {
            "layer": self.name,
            "kernel": self.kernel if self.taken else "dense",
            "density": round(self.density, 3),
            "expected_time": round(self.relative_time, 3),
            "weight_bytes": round(self.bytes_left, 3),
        }


def sparse_note(layers: Sequence[SparseLayer]) -> str:
    """What became of them, in a line."""
    taken = [layer for layer in layers if layer.taken]
    if not taken:
        return (
            f"{len(layers)} layers have zeros in patterns, too few for skipping them to gain: they "
            "run on dense kernels"
        )
    left = sum(layer.bytes_left for layer in taken) / len(taken)
    return (
        f"{len(taken)} of {len(layers)} layers with zeros in patterns skip them, and read "
        f"{left:.0%} of their weights on average"
    )


@dataclass(frozen=True)
class LoweredModel:
    """Relax functions whose every binding is a kernel's call, a field of its result, or a copy.

    ``module`` holds ``body_M``, ``head_M`` and ``source_M``, and for rows of different sessions
    ``batch_M`` and ``batchhead_M``; ``slm.call_kernel`` names one of
    ``kernels``, and ``call_tir`` a PrimFunc of ``module`` where no kernel of ours fits. The first
    parameter of a function is the step's input; the others are named after an array of ``weights``
    or a buffer of ``state``. ``sparse`` are the layers that might skip zeros. ``calls_join``: small
    calls are done together with the one that follows, so what they read must outlive that one.

    ``rings`` says of buffers that keep a window how many positions they hold. A session that
    wrote more than so many, up to ``end``, can go on from those alone that are at least
    ``end - seek_reach``, or from 0.
    """

    module: tvm.IRModule
    kernels: dict[str, Kernel]
    weights: dict[str, np.ndarray]
    state: dict[str, Tensor]  # the KV cache, ``capacity`` positions each, and a source's
    capacity: int  # positions the KV cache holds
    model: CanonicalModel
    sparse: tuple[SparseLayer, ...] = ()
    rings: Mapping[str, int] = field(default_factory=dict)
    seek_reach: int = 0
    calls_join: bool = False
