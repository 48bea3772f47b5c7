"""Kernels as CUDA text compute, thread by thread, the bits of a CPU's kernels."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from slmtvm.codegen.cuda.nodes import Node
from slmtvm.codegen.cuda.nvrtc import is_installed
from slmtvm.codegen.cuda.text import module_text
from tests.codegen.cuda.cases import CASES, Case
from tests.emulation.cuda.emulator import ORDERS, Emulated, build, build_ptx, build_text

pytestmark = pytest.mark.slow
needs_nvrtc = pytest.mark.skipif(
    not is_installed(12), reason="NVRTC is not installed: pip install 'slmtvm[cuda]'"
)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Node]:
    return {case.name: case.translated() for case in CASES}


@pytest.fixture(scope="module")
def emulated(kernels: dict[str, Node], tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build(list(kernels.values()), tmp_path_factory.mktemp("cuda")))


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        same = got[name].view(np.uint8) == expected.view(np.uint8)
        assert same.all(), f"{name}: {(~same).sum()} of {same.size} bytes differ"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_order_of_threads_gives_the_bits_of_the_cpu(
    case: Case, kernels: dict[str, Node], emulated: Emulated
) -> None:
    want = case.on_cpu()
    for order in ORDERS:
        wrong, got = case.emulated(kernels[case.name], emulated, order=order)
        assert wrong is None
        assert_same_bits(got, want)


@pytest.mark.parametrize(("teams", "blocks"), [(4, 3), (16, 1), (16, 2)])
def test_every_geometry_of_a_launch_gives_the_bits_of_the_cpu(
    teams: int, blocks: int, kernels: dict[str, Node], emulated: Emulated
) -> None:
    layers = [case for case in CASES if case.name.startswith("linear_int")][:5]
    for case in layers:
        wrong, got = case.emulated(
            kernels[case.name], emulated, order=ORDERS[2], teams=teams, blocks=blocks
        )
        assert wrong is None
        assert_same_bits(got, case.on_cpu())


BUGS = {
    # The emulator's own findings, where threads miss each other.
    "half of a team does not wait": (
        "append_float16_37", "slm_sync(t);", "if (t.lane < 8) slm_sync(t);"
    ),
    "half of a team reads a lane": (
        "row_rms_norm_block_70", " = slm_from(t, ", " = t.lane < 8 ? 0.0f : slm_from(t, "
    ),
    # Bytes that differ from the CPU's in some order of threads.
    "nobody waits": ("append_float16_37", "slm_sync(t);", ""),
    "a wrong lane": ("row_rms_norm_block_70", "(t.lane % 8 + 8)", "(t.lane % 8 + 7)"),
    "a sum contracted otherwise": ("row_layer_norm_block_100", "fmaf(", "slm_unfused("),
    "scratch of the next team": ("attend_float16_37", "(size_t)t.index *", "(size_t)0 *"),
    "places of what is not greatest": (
        "likeliest_of_20001", "0x1.0000000000000p+24f", "0x0.0p+0f"
    ),
    "logits below 0 passed over": (
        "likeliest_parts_5001", "slm_float((int)0xff800000)", "0x0.0p+0f"
    ),
    # Only where blocks of one launch are there at once.
    "scratch of another block": (
        "attend_float16_37", "(size_t)t.index *", "(size_t)(threadIdx.x / SLM_LANES) *"
    ),
}  # fmt: skip
_UNFUSED = "SLM_DEVICE float slm_unfused(float a, float b, float c) { return a * b + c; }\n"


_EXEMPLARS = ("half of a team does not wait", "nobody waits", "scratch of another block")


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, marks=[] if bug in _EXEMPLARS else pytest.mark.exhaustive) for bug in BUGS],
)
def test_the_emulator_finds(bug: str, kernels: dict[str, Node], tmp_path: pathlib.Path) -> None:
    case, kernel, text = broken(bug, kernels)
    assert found(case, kernel, Emulated(build_text(text, [kernel.name], tmp_path)))


# By what they have of what kernels are made of: shuffles, shared memory and scratch, tensor cores.
_BY_PTX = (
    "row_rms_norm_block_70", "attend_float16_37", "linear_int8_block__m32_n17_k200",
    "likeliest_parts_101",
)  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if c.name.startswith(_BY_PTX) else pytest.mark.exhaustive)
        for c in CASES
    ],
    ids=lambda case: case.name,
)
def test_what_nvidias_front_end_makes_of_a_kernel_has_the_bits_of_the_cpu(
    case: Case, kernels: dict[str, Node], tmp_path: pathlib.Path
) -> None:
    kernel = kernels[case.name]
    emulated = Emulated(build_ptx(module_text([kernel]), [kernel.name], tmp_path))
    want = case.on_cpu()
    for order in ORDERS:
        wrong, got = case.emulated(kernel, emulated, order=order)
        assert wrong is None
        assert_same_bits(got, want)


@needs_nvrtc
@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, marks=[] if bug == "nobody waits" else pytest.mark.exhaustive)
        for bug in BUGS
    ],
)
def test_the_emulator_of_ptx_finds(
    bug: str, kernels: dict[str, Node], tmp_path: pathlib.Path
) -> None:
    case, kernel, text = broken(bug, kernels)
    assert found(case, kernel, Emulated(build_ptx(text, [kernel.name], tmp_path)))


def broken(bug: str, kernels: dict[str, Node]) -> tuple[Case, Node, str]:
    """The kernel that a bug is planted in, and its text with it."""
    name, right, wrong = BUGS[bug]
    case = next(c for c in CASES if c.name == name)
    text = module_text([kernels[name]])
    assert right in text
    before, after = text.split("SLM_DEVICE void case_")
    planted = f"{before}{_UNFUSED}SLM_DEVICE void case_{after.replace(right, wrong)}"
    return case, kernels[name], planted


def found(case: Case, kernel: Node, emulated: Emulated) -> bool:
    """Whether any order shows that something is wrong."""
    want = case.on_cpu()

    def shows(order: int) -> bool:
        message, got = case.emulated(kernel, emulated, order=order)
        return message is not None or any(
            (got[n].view(np.uint8) != want[n].view(np.uint8)).any() for n in want
        )

    return any(shows(order) for order in ORDERS)
