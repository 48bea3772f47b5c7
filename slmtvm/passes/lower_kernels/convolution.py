"""Short convolutions over tokens."""

from __future__ import annotations

from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import convolution


@handles("slm.short_conv", by_session=True)
def _short_conv(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, attrs, named = call.args[0], call.attrs, ops.operands(call)
    weight = emitter.array(named["weight"])
    shape = convolution.ConvShape(
        m=shape_of(x)[0],
        channels=int(attrs["channels"]),
        taps=len(weight),
        capacity=emitter.capacity,
        gated=bool(int(attrs["gated"])),
        has_bias="bias" in named,
    )
    operands = [emitter.weight(e.name, emitter.array(e)) for e in named.values()]
    cache = emitter.cache(f"conv{int(attrs['layer'])}", shape.cache)
    return emitter.call(convolution.build(shape), [x, *operands, cache])["y"]
