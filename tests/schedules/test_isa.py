"""Instruction sets: found by name, exact, and using the instructions they are named for."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from slmtvm.codegen.objects import build_module
from slmtvm.errors import TargetError
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.kernel import Tensor, define
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run

INT4 = LinearShape(1, 64, 256, "int4", "block", 32, scale_dtype="float16")
INT8 = LinearShape(1, 64, 256, "int8", "row_u8")
F32 = LinearShape(1, 64, 256, "f32")
# Every load and store of the kernel between these is a vector of the length set here.
RVV_LOAD = r"vset(i)?vli\b(?s:.*?)\bvle(8|16|32)\.v"


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def test_every_target_names_an_instruction_set(target: Target) -> None:
    assert isas.get(target.isa).name == target.isa


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(TargetError, match="avx2, avx512_vnni, cuda, neon, neon_dotprod, rvv"):
        isas.get("sse2")


def test_every_finite_half_widens_exactly(target: Target) -> None:
    isa = isas.get(target.isa)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.where(np.isfinite(halves), halves, np.float16(0))
    blocks = halves.size // isa.lanes

    def body(block, x, y):  # type: ignore[no-untyped-def]
        at = T.ramp(block * isa.lanes, 1, isa.lanes)
        T.buffer_store(y, isa.f16_to_f32(x[at]), [at])

    kernel = define(
        f"widen_{isa.name}",
        [Tensor("x", halves.shape, "float16"), Tensor("y", halves.shape, "float32")],
        body,
        grid=blocks,
        outputs=["y"],
    )
    y = run(kernel, {"x": halves}, target)["y"]
    np.testing.assert_array_equal(y.view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize(
    ("target_name", "shape", "pattern"),
    [
        ("x86-64-v4-vnni", INT4, r"\bvpdpbusd\b.*%zmm"),
        ("x86-64-v4-vnni", INT8, r"\bvpdpbusd\b.*%zmm"),
        ("x86-64-v4-vnni", F32, r"\bvfmadd\w*ps\b.*%zmm"),
        ("x86-64-v3", INT4, r"\bvpmaddubsw\b.*%ymm"),
        ("x86-64-v3", INT8, r"\bvpmaddwd\b.*%ymm"),
        ("x86-64-v3", F32, r"\bvfmadd\w*ps\b.*%ymm"),
        ("cortex-a78", INT4, r"\bsdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]"),
        ("cortex-a78", INT8, r"\bsdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]"),
        ("cortex-a78", F32, r"\bfmla\tv\d+\.4s"),
        ("cortex-a72", INT4, r"\bsmlal2?\tv\d+\.8h"),
        ("cortex-a72", INT8, r"\bsadalp\tv\d+\.4s"),
        ("cortex-a72", F32, r"\bfmla\tv\d+\.4s"),
        ("riscv64-rvv", INT4, RVV_LOAD),
        ("riscv64-rvv", INT4, r"\bvwmaccs?u?\.vx\b"),
        ("riscv64-rvv", INT8, r"\bvwmacc\.vx\b"),
        ("riscv64-rvv", F32, RVV_LOAD),
        ("riscv64-rvv", F32, r"\bvfm(acc|add)\.vf\b"),
    ],
    ids=lambda value: None if isinstance(value, LinearShape) else str(value).split("\\")[0],
)
def test_a_kernel_uses_its_instruction(target_name: str, shape: LinearShape, pattern: str) -> None:
    target = Target.load(target_name)
    kernel = linear.build(shape, isas.get(target.isa))
    name = str(kernel.func.attrs["global_symbol"])
    code = build_module({name: kernel.func}, target).inspect_source("asm")
    assert re.search(pattern, code), code


@pytest.mark.parametrize("kind", ["u2_s8", "u4_s8", "u4_s8_one_row", "s8_s8", "s8_row"])
def test_the_longest_run_of_steps_is_exact_at_the_extremes(target: Target, kind: str) -> None:
    """One state takes as many steps as it says it can, all of the same largest products."""
    isa = isas.get(target.isa)
    bits = int(kind[1]) if kind[0] == "u" else 8
    rows = 1 if kind.endswith("one_row") else 4
    dot = getattr(isa, kind)() if bits == 8 else isa.fields_s8(bits, rows)
    steps = dot.max_steps or 64
    per_raw = 8 // bits
    low, high = (-128, 127) if bits == 8 else (0, (1 << bits) - 1)
    signed_row = kind != "s8_row"
    stored = "int8" if signed_row else isa.row_dtype
    a_values = [-127, 127] if signed_row else [0, 255]
    shift = 128 if not signed_row and stored == "int8" else 0
    cases = [(w, a) for w in (low, high) for a in a_values]
    k = max(steps * isa.k_step, 16)
    raw_dtype = "int8" if bits == 8 else "uint8"

    def body(block, w, a, out):  # type: ignore[no-untyped-def]
        state = None
        for step in range(steps):
            at = step * isa.k_step
            row = dot.row(a, block * k + at // 16 * 16)
            raw = w[T.ramp(block * isa.raw_bytes, 1, isa.raw_bytes)]
            weight = dot.weights(raw)[step % per_raw]
            state = dot.step(state, weight, dot.activation(row, at % 16))
        T.buffer_store(out, dot.finish(state), [T.ramp(block * isa.lanes, 1, isa.lanes)])

    tensors = [
        Tensor("w", (len(cases), isa.raw_bytes), raw_dtype),
        Tensor("a", (len(cases), k), stored),
        Tensor("out", (len(cases), isa.lanes), "int32"),
    ]
    kernel = define(f"dot_{kind}_{isa.name}", tensors, body, grid=len(cases), outputs=["out"])
    bytes_of = {w: w if bits == 8 else sum(w << s for s in range(0, 8, bits)) for w in (low, high)}
    w = np.array([[bytes_of[w]] * isa.raw_bytes for w, _ in cases], raw_dtype)
    a = np.array([[a - shift] * k for _, a in cases], stored)
    out = run(kernel, {"w": w, "a": a}, target)["out"]
    expected = [[(w + dot.offset) * (a - shift) * steps * isa.k_step] * isa.lanes for w, a in cases]
    np.testing.assert_array_equal(out, expected)


def test_a_panel_holds_whole_vectors_of_every_instruction_set() -> None:
    for isa in map(isas.get, isas.known()):
        assert isa.panel % isa.lanes == 0
