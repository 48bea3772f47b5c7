"""Kernels are compiled in the order in which they are written, where the ISA asks for that."""

from __future__ import annotations

import re

from slmtvm.codegen.objects import build_module
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target

TARGET = Target.load("x86-64-v3")
PRODUCTS = re.compile(r"vpmaddubsw")
STACK = re.compile(r"\(%rsp\)")


def _loop_of_products(assembly: str) -> list[str]:
    """The instructions of the loop with the most products for each of them."""
    lines = assembly.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.\w+):", line))}
    loops = [
        lines[labels[m[1]] : i]
        for i, line in enumerate(lines)
        if (m := re.match(r"\s+j\w+\s+(\.\w+)$", line)) and labels.get(m[1], i) < i
    ]
    return max(loops, key=lambda loop: len(PRODUCTS.findall("\n".join(loop))) / len(loop))


def test_weights_that_rows_share_stay_in_registers_on_avx2() -> None:
    shape = LinearShape(128, 512, 256, "int4", "block", 32, scale_dtype="float16")
    kernel = linear.build(shape, isas.get(TARGET.isa))
    loop = "\n".join(
        _loop_of_products(build_module({"f": kernel.func}, TARGET).inspect_source("s"))
    )
    # Sums that LLVM takes one after the other, each along all of k, fetch their weights from the
    # stack: about one access for each product. What is left are the float sums.
    assert 0 < len(STACK.findall(loop)) < len(PRODUCTS.findall(loop)) / 3


def test_vectors_that_leave_the_registers_lie_within_cache_lines_on_avx2() -> None:
    shape = LinearShape(8, 64, 64, "int4", "block", 32, sparse=True, window="2of4")
    kernel = linear.build(shape, isas.get(TARGET.isa))
    assembly = build_module({"f": kernel.func}, TARGET).inspect_source("s")
    assert re.search(r"andq\t\$-32, %rsp", assembly)
    moved = re.findall(r"(vmov\w+)\t%ymm\d+, -?\d*\(%rsp\)", assembly)
    assert moved and set(moved) <= {"vmovaps", "vmovdqa"}, "aligned ones"


def test_lists_load_activations_to_a_lane_with_an_address_of_two_registers_on_arm() -> None:
    target = Target.load("cortex-a78")
    shape = LinearShape(1, 64, 128, "int8", "row_u8", sparse=True)
    kernel = linear.build(shape, isas.get(target.isa))
    assembly = build_module({"f": kernel.func}, target).inspect_source("s")
    assert "ld1r" not in assembly
    assert re.search(r"ldr\ts\d+, \[x\d+, [xw]\d+", assembly)
    assert re.search(r"sdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[0\]", assembly)
