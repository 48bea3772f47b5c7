"""What NVIDIA's compiler makes of kernels: registers, local memory, the instructions wanted."""

from __future__ import annotations

from importlib import util

import pytest

from slmtvm.codegen.cuda.nvrtc import compile_cubin
from slmtvm.codegen.cuda.text import module_text
from slmtvm.codegen.cuda.translate import MAX_THREADS
from slmtvm.errors import SlmError, TargetError
from slmtvm.target import Target
from tests.codegen.cuda.cases import CASES
from tests.codegen.cuda.cubin import DP4A, Cubin

pytestmark = pytest.mark.skipif(
    util.find_spec("nvidia") is None, reason="NVRTC is not installed: pip install 'slmtvm[cuda]'"
)

REGISTERS = 64 << 10  # of a multiprocessor


@pytest.mark.slow
def test_on_an_orin_kernels_take_no_local_memory_and_leave_registers_for_two_blocks() -> None:
    gpu = Target.load("jetson-orin").cuda
    assert gpu is not None
    kernels = [case.translated() for case in CASES]
    cubin = Cubin(compile_cubin(module_text(kernels), gpu.arch))
    for case, kernel in zip(CASES, kernels, strict=True):
        assert cubin.local_bytes(kernel.name) == 0, kernel.name
        assert 2 * MAX_THREADS * cubin.registers(kernel.name) <= REGISTERS, kernel.name
        integers = case.name.startswith("linear_int")
        assert (cubin.count(kernel.name, DP4A) > 0) == integers, kernel.name


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(TargetError, match=r"cuda\.arch is 'sm_11'; .* compiles for sm_\d+"):
        compile_cubin("", "sm_11")


def test_what_does_not_compile_comes_with_the_compilers_words() -> None:
    with pytest.raises(SlmError, match='identifier "nothing" is undefined'):
        compile_cubin("__global__ void k() { nothing(); }", "sm_87")
