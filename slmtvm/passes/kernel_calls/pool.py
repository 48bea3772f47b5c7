"""One row of all rows of an encoder's sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from slmtvm.passes.kernel_calls.masks import LIMITS, mask_positions
from slmtvm.passes.kernel_calls.registry import handles, shape_of
from slmtvm.schedules import pool

if TYPE_CHECKING:
    from slmtvm.passes.lower_kernels import KernelEmitter


@handles("slm.pool")
def _pool(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (x,) = call.args
    positions = mask_positions(emitter.model, of_source=False)
    m, d = shape_of(x)
    op = pool.PoolOp(str(call.attrs["how"]), m, d, mask_positions=positions)
    limits = [emitter.cache(LIMITS, tensor) for tensor in op.limits]
    return emitter.call(pool.build(op), [x, *limits])["y"]
