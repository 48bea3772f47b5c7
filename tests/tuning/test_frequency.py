"""Parts of a kernel's assembly are counted as often as they are run."""

from __future__ import annotations

from typing import Any

import pytest

from slmtvm.codegen.objects import build_module
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from slmtvm.tuning.frequency import Block, blocks, marked
from slmtvm.tuning.static import function_lines

V3 = Target.load("x86-64-v3")
SHAPE = LinearShape(16, 48, 128, "int4", "block", 32, scale_dtype="float16")

ASSEMBLY = """\
	pushq	%rbx
	jge	.LBB0_5
.LBB0_2:
	#APP
	# slm_mark 0
	#NO_APP
	xorl	%ebx, %ebx
	.p2align	4
.LBB0_3:
	# slm_mark 1
	vmovdqu	(%r11), %ymm7
.Ltmp1:
	# slm_mark 1
	vmovdqu	32(%r11), %ymm8
	jne	.LBB0_3
	addq	$1, %rax
	jne	.LBB0_2
.LBB0_5:
	retq
""".splitlines()


def test_an_unrolled_loop_goes_round_less_often() -> None:
    first, outer, inner, behind, last = blocks(ASSEMBLY, (96.0, 768.0))
    assert first == Block(("pushq\t%rbx", "jge\t.LBB0_5"), 1)
    assert outer == Block(("xorl\t%ebx, %ebx",), 96)
    assert len(inner.instructions) == 3 and inner.count == 768 / 2
    assert behind == Block(("addq\t$1, %rax", "jne\t.LBB0_2"), 96)
    assert last == Block(("retq",), 1)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"mr": 3, "nv": 2, "rt": 4},  # a tile of one row is left
        {"mr": 3, "nv": 4, "rt": 1},  # and half a panel
        {"mr": 6, "nv": 1, "rt": 1, "ku": 16, "gu": 4},
        {"mr": 2, "nv": 2, "rt": 8, "ku": 16, "gu": 1},
    ],
)
def test_all_products_of_a_layer_are_counted(knobs: dict[str, Any]) -> None:
    """Each vpmaddubsw multiplies 32 values, of a layer without padding m n k in all."""
    isa = isas.get(V3.isa)
    given = {**linear.default_knobs(SHAPE, isa), **knobs}
    marks = marked(linear.build(SHAPE, isa, given), "#")
    text = build_module({"kernel": marks.func}, V3).inspect_source("asm")
    found = blocks(function_lines(text, "kernel"), marks.runs)
    products = sum(
        block.count * sum("vpmaddubsw" in line for line in block.instructions) for block in found
    )
    assert 32 * products == pytest.approx(SHAPE.m * SHAPE.n * SHAPE.k)
