"""What NVIDIA's compiler makes of kernels: registers, local memory, the instructions wanted."""

from __future__ import annotations

import pytest

from slmtvm.codegen.cuda.nodes import MAX_THREADS
from slmtvm.codegen.cuda.nvrtc import compile_cubin, is_installed
from slmtvm.codegen.cuda.text import PERSISTENT, module_text
from slmtvm.errors import SlmError, TargetError
from slmtvm.target import Target
from tests.codegen.cuda.cases import CASES
from tests.codegen.cuda.cubin import DP4A, IMMA, Cubin

pytestmark = pytest.mark.skipif(
    not is_installed(12), reason="NVRTC is not installed: pip install 'slmtvm[cuda]'"
)

REGISTERS = 64 << 10  # of a multiprocessor


@pytest.mark.slow
def test_on_an_orin_kernels_take_no_local_memory_and_leave_registers_for_two_blocks() -> None:
    gpu = Target.load("jetson-orin").cuda
    assert gpu is not None
    kernels = [case.translated() for case in CASES]
    # The persistent kernel holds itself to the registers of two blocks. Attention to an int4 cache
    # keeps 112 bytes of local memory there; alone it keeps none.
    together = [k for case, k in zip(CASES, kernels, strict=True) if "int4_ring" not in case.name]
    cubin = Cubin(compile_cubin(module_text(kernels, together), gpu.arch))
    assert cubin.local_bytes(PERSISTENT) == 0
    assert 2 * MAX_THREADS * cubin.registers(PERSISTENT) <= REGISTERS
    for case, kernel in zip(CASES, kernels, strict=True):
        # Attention to a float16 cache has a frame of 16 bytes; no array of its text is in it.
        most = 16 if case.name == "decode_float16_37" else 0
        assert cubin.local_bytes(kernel.name) <= most, kernel.name
        assert 2 * MAX_THREADS * cubin.registers(kernel.name) <= REGISTERS, kernel.name
        integers = case.name.startswith("linear_int")
        tensor_cores = "slm_mma" in kernel.parts[0].kernel.text
        assert (cubin.count(kernel.name, IMMA) > 0) == tensor_cores, kernel.name
        assert (cubin.count(kernel.name, DP4A) > 0) == (integers and not tensor_cores), kernel.name
    assert any("slm_mma" in kernel.parts[0].kernel.text for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jetson-thor", "jetson-xavier"])
def test_kernels_compile_for_other_boards_without_local_memory(name: str) -> None:
    gpu = Target.load(name).cuda
    assert gpu is not None
    if not is_installed(gpu.release):
        pytest.skip(
            f"NVRTC {gpu.release} is not installed: pip install 'slmtvm[cuda{gpu.release}]'"
        )
    cases = [case for case in CASES if case.name.startswith(("linear_int4", "attend"))]
    kernels = [case.translated() for case in cases]
    cubin = Cubin(compile_cubin(module_text(kernels), gpu.arch, gpu.release))
    for kernel in kernels:
        assert cubin.local_bytes(kernel.name) == 0, kernel.name


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(TargetError, match=r"cuda\.arch is 'sm_11'; .* compiles for sm_\d+"):
        compile_cubin("", "sm_11")


def test_what_does_not_compile_comes_with_the_compilers_words() -> None:
    with pytest.raises(SlmError, match='identifier "nothing" is undefined'):
        compile_cubin("__global__ void k() { nothing(); }", "sm_87")
