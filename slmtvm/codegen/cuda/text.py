"""All kernels of a plan as one CUDA text."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from slmtvm.codegen.cuda.translate import CudaKernel, translate
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import KernelCode, Plan, Space

DEVICE_TEXT = (resources.files("slmtvm.codegen.cuda") / "slm_device.h").read_text()
"""What the text of every kernel needs before it."""


def entry(name: str) -> str:
    """The name of a kernel's entry in the text."""
    return f"kernel_{name}"


def translate_plan(plan: Plan) -> list[CudaKernel]:
    """The kernels of a plan, in order of their names.

    Raises UnsupportedOpError where one has no CUDA text.
    """
    with_scratch = {
        step.kernel
        for function in plan.functions
        for step in function.steps
        if step.args[-1].space == Space.SCRATCH
    }
    return [
        _translate(name, code, name in with_scratch) for name, code in sorted(plan.kernels.items())
    ]


def _translate(name: str, code: KernelCode, scratch: bool) -> CudaKernel:
    try:
        return translate(entry(name), code.func, code.scalars, scratch)
    except UnsupportedOpError as error:
        raise UnsupportedOpError(
            f"{error}; compile the model for the CPU", where=f"kernel {name}"
        ) from error


def module_text(kernels: Iterable[CudaKernel]) -> str:
    """What a CUDA compiler takes."""
    return "\n".join([DEVICE_TEXT, *(kernel.text for kernel in kernels)])
