"""Which keys may be hidden, and where it says that they are."""

from __future__ import annotations

from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.schedules import attention

# Names the state that holds the limits of keys' scores.
LIMITS = "limits"


def mask_positions(model: CanonicalModel, *, of_source: bool) -> int:
    """Positions of the limits that an attention over the source, or over its own rows, reads.

    0 where none of its keys are ever hidden.
    """
    has_source = model.kind == "encoder-decoder"
    if model.mask != "keys" or of_source != has_source:
        return 0
    return attention.capacity_of(model.source_context if has_source else model.context)


def limits_of(shape: attention.AttentionShape, emitter: KernelEmitter) -> list[relax.Var]:
    """The operand of a kernel of ``shape`` that holds limits, if it takes one."""
    return [emitter.cache(LIMITS, tensor) for tensor in shape.limits]
