"""One row of all rows of an encoder's sequence."""

from __future__ import annotations

from tvm import relax

from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.masks import LIMITS, mask_positions
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import pool


@handles("slm.pool")
def _pool(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    (x,) = call.args
    positions = mask_positions(emitter.model, of_source=False)
    m, d = shape_of(x)
    op = pool.PoolOp(str(call.attrs["how"]), m, d, mask_positions=positions)
    limits = [emitter.cache(LIMITS, tensor) for tensor in op.limits]
    return emitter.call(pool.build(op), [x, *limits])["y"]
