"""What ``inspect`` says of layers with zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slmtvm.ir.model import LayerReport
from slmtvm.sparse_layers import expected_times, sparse_lines


def layer(sparsity: str, used: float, format: str = "int8", group_size: int = 0) -> LayerReport:
    return LayerReport(
        "w", "linear", (512, 512), format, group_size, 512 * 512, sparsity=sparsity, zeros=0.7,
        blocks_used={"8x4": used, "1x4": used} | dict.fromkeys(["32x1", "16x1"], min(1, 3 * used)),
    )  # fmt: skip


def test_layers_of_one_kind_share_a_line():
    (line,) = sparse_lines([layer("8x4", 0.3), layer("8x4", 0.3), layer("", 1.0)])
    assert line.startswith("2 layers of int8, 8x4, 70% zeros: zeros are skipped on ")
    skipped, dense, *_ = line.split(";")
    assert "x86-64-v3 (0." in skipped and "riscv64-rvv" in dense


def test_fewer_blocks_take_less_time_and_dense_ones_more_than_a_dense_kernel():
    few, many = (expected_times(layer("8x4", used)) for used in (0.1, 1.0))
    assert few.keys() == many.keys()
    # Blocks of RISC-V are of other shapes, of which three times as many are left.
    assert all(few[name] < (0.8 if "riscv" in name else 0.5) and many[name] > 1 for name in few)


def test_short_blocks_are_said_to_be_skipped_by_many_rows():
    used = {"8x4": 0.83, "32x1": 1.0, "16x1": 1.0, "1x4": 0.2}
    (line,) = sparse_lines([replace(layer("1x4", 0.83), zeros=0.8, blocks_used=used)])
    _, many = line.split("; but for steps of 16 rows and more on ")
    assert "x86-64-v3 (0.2" in many and "cortex-a78 (0.4" in many and "riscv" not in many


@pytest.mark.parametrize(("format", "group"), [("int4", 32), ("f32", 0), ("int8", 32)])
def test_formats_without_a_sparse_kernel_are_said_to_run_dense(format, group):
    (line,) = sparse_lines([layer("8x4", 0.3, format, group)])
    assert line.endswith("no kernel skips zeros of this format: computed as dense")


def test_pruning_to_half_is_not_praised():
    (line,) = sparse_lines([replace(layer("2:4", 1.0), windows=("4of8", "8of16"))])
    assert "int4 in groups reads less from memory" in line
    picked, dense, _ = line.split("; ")
    assert "x86-64-v3" in picked and "cortex-a78" in dense and "riscv64-rvv" in dense


def test_int4_of_pairs_is_said_to_be_skipped_where_it_gains_and_why_others_have_no_kernel():
    (line,) = sparse_lines([replace(layer("2:4", 1.0, "int4", 32), windows=("2of4",))])
    skipped, dense, asked = line.split("; ")
    assert "zeros are skipped on x86-64-v3 (0.83)" in skipped and "cortex" not in skipped
    assert all(name in dense for name in ("cortex-a78", "riscv64-rvv"))
    assert "computed as dense on" in dense and asked == "--sparse 2of4 skips zeros"
    (line,) = sparse_lines([layer("2:4", 1.0, "int4", 32)])
    assert line.endswith("(quantize with --symmetric)")
