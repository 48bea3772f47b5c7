"""Finding the hottest loop in assembly, and what the ports of a core allow it."""

from __future__ import annotations

import shutil

import pytest
from isa.loops import hottest_loop, llvm_mca, measure_loops, port_bounds

from slmtvm.plan.model import KernelCode
from slmtvm.schedules import isa, linear
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target

FUNCTION = """
.LBB0_1:
\tmovi\tv0.2d, #0000000000000000
.LBB0_2:
.Ltmp3:
\tldp\tq1, q2, [x0], #32
\t.loc\t1 0 0
\tldr\tq3, [x1], #16
\tand\tv1.16b, v1.16b, v4.16b
\tsdot\tv0.4s, v1.16b, v3.4b[0]
\tsdot\tv0.4s, v2.16b, v3.4b[1]
\tsubs\tw2, w2, #1
\tb.ne\t.LBB0_2
\tsdot\tv0.4s, v1.16b, v3.4b[2]
\tsdot\tv0.4s, v2.16b, v3.4b[3]
\tstr\tq0, [x3], #16
\tcbnz\tw4, .LBB0_1
\tret
""".splitlines()


def test_the_hottest_loop_is_innermost_though_the_one_around_it_has_more_dot_products() -> None:
    body = hottest_loop(FUNCTION)
    assert [line.split()[0] for line in body] == [
        "ldp", "ldr", "and", "sdot", "sdot", "subs", "b.ne",
    ]  # fmt: skip


def test_a_pair_counts_as_two_loads_and_all_vector_arithmetic_shares_its_pipes() -> None:
    assert port_bounds(hottest_loop(FUNCTION)) == (1.5, 1.5)  # 3 loads; 2 dot products; 3 in all
    without_loads = [line for line in hottest_loop(FUNCTION) if "\tld" not in line]
    assert port_bounds(without_loads) == (1.0, 1.5)


def test_a_kernel_of_a_model_has_a_loop_that_can_be_timed() -> None:
    if shutil.which(llvm_mca()) is None:
        pytest.skip("no llvm-mca here; on Debian and Ubuntu: apt install llvm")
    target = Target.load("cortex-a78")
    shape = LinearShape(m=1, n=64, k=256, format="int4", activation="block", group_size=32)
    kernel = linear.build(shape, isa.get(target.isa))
    name = str(kernel.func.attrs["global_symbol"])
    code = KernelCode(kernel.func, len(kernel.tensors), kernel.scalars)
    (loop,) = measure_loops({name: code}, target, ["cortex-a78"])
    assert loop.kernel == name
    assert loop.dots > 0
    assert loop.cycles["cortex-a78"] >= loop.port_bound >= loop.dot_bound > 0
