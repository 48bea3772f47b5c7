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


BOARDS = ("jetson-orin", "jetson-thor", "jetson-xavier")
TENSOR_CORES = BOARDS[:2]  # for int8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "each"),
    [(BOARDS[0], 2), *(pytest.param(b, 1, marks=pytest.mark.exhaustive) for b in BOARDS)],
)
def test_kernels_take_no_local_memory_and_leave_registers_for_two_blocks(
    name: str, each: int
) -> None:
    gpu = Target.load(name).cuda
    assert gpu is not None
    if not is_installed(gpu.release):
        pytest.skip(
            f"NVRTC {gpu.release} is not installed: pip install 'slmtvm[cuda{gpu.release}]'"
        )
    cases = CASES[::each]
    kernels = [case.translated() for case in cases]
    together = [k for k, case in zip(kernels, cases, strict=True) if case.one_row]
    cubin = Cubin(compile_cubin(module_text(kernels, together), gpu.arch, gpu.release))
    for entry in (*(kernel.name for kernel in kernels), PERSISTENT):
        assert cubin.local_bytes(entry) == 0, entry
        assert 2 * MAX_THREADS * cubin.registers(entry) <= REGISTERS, entry
    for case, kernel in zip(cases, kernels, strict=True):
        integers = case.name.startswith(("linear_int", "linear_pairs"))
        tensor_cores = name in TENSOR_CORES and "slm_mma" in kernel.parts[0].kernel.text
        assert (cubin.count(kernel.name, IMMA) > 0) == tensor_cores, kernel.name
        assert (cubin.count(kernel.name, DP4A) > 0) == (integers and not tensor_cores), kernel.name
    assert any("slm_mma" in kernel.parts[0].kernel.text for kernel in kernels)


@pytest.mark.slow
def test_a_thors_tensor_cores_are_used() -> None:
    if not is_installed(13):
        pytest.skip("NVRTC 13 is not installed: pip install 'slmtvm[cuda13]'")
    cases = [case for case in CASES if case.name.startswith(("linear_int4", "linear_pairs"))]
    kernels = [case.translated() for case in cases]
    cubin = Cubin(compile_cubin(module_text(kernels), "sm_110", 13))
    for kernel in kernels:
        assert cubin.local_bytes(kernel.name) == 0, kernel.name
        used = "slm_mma" in kernel.parts[0].kernel.text
        assert bool(cubin.count(kernel.name, IMMA)) == used, kernel.name
        assert bool(cubin.count(kernel.name, DP4A)) != used, kernel.name


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(TargetError, match=r"cuda\.arch is 'sm_11'; .* compiles for sm_\d+"):
        compile_cubin("", "sm_11")


def test_what_does_not_compile_comes_with_the_compilers_words() -> None:
    with pytest.raises(SlmError, match='identifier "nothing" is undefined'):
        compile_cubin("__global__ void k() { nothing(); }", "sm_87")
