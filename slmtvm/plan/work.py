"""What each kernel of a plan reads and computes in one call: what the bench divides by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from slmtvm.plan.model import KernelWork, Ref, Space
from slmtvm.schedules.kernel import Kernel


def kernel_work(kernel: Kernel, args: Sequence[Ref]) -> KernelWork:
    """The work of ``kernel`` called on ``args``."""
    bytes_of, share = dict.fromkeys(Space, 0), 1.0
    for tensor, ref in zip(kernel.tensors, args, strict=True):
        bytes_of[ref.space] += kernel.work.touched.get(tensor.name, ref.size)
        if tensor.at_most:  # all of these are of one length: blocks of weights
            share = ref.size / (math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize)
    return KernelWork(
        weight_bytes=bytes_of[Space.WEIGHTS],
        activation_bytes=sum(bytes_of[s] for s in (Space.ARENA, Space.TOKENS, Space.OUTPUT)),
        multiply_adds=round(share * kernel.work.multiply_adds),
        context_bytes=bytes_of[Space.STATE] // kernel.work.positions
        if kernel.work.positions
        else 0,
        context_multiply_adds=kernel.work.context_multiply_adds,
        window=kernel.work.window,
    )


def mean_work(works: Sequence[KernelWork]) -> KernelWork:
    """The work of a call on average: layers of one kernel may have sparse weights of any length."""
    names = [field.name for field in fields(KernelWork)]
    return KernelWork(**{n: round(sum(getattr(w, n) for w in works) / len(works)) for n in names})
