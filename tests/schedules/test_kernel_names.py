"""Kernels of one name are one kernel: whatever changes the code changes the name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tvm_ffi import structural_equal

from slmtvm.schedules import attention, convolution, elementwise, embedding, experts, linear, rows
from slmtvm.schedules.isa import get
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.rows import Pair

ISA = get("avx2")
CAUSAL = attention.AttentionShape(
    m=2, num_heads=4, num_kv_heads=2, head_dim=16, capacity=32, scale=0.25, rotary_dim=8,
    table_rows=32,
)  # fmt: skip
RING = replace(CAUSAL, capacity=96, window=5, ring=48)
DECODE = replace(CAUSAL, m=1)
BIASED = replace(CAUSAL, bias_columns=64, bias_zero=31, softcap=5.0)
ATTENTION: dict[str, list[Any]] = {
    "m": [3], "num_heads": [8], "head_dim": [32], "capacity": [48], "scale": [0.125, -0.25],
    "rotary_dim": [16], "interleaved": [True], "table_rows": [48],
    "kv_dtype": ["float16", "int8"], "accumulators": [8], "queries": [6], "apart": [True],
    "ahead": [True], "rows_ahead": [True], "separate": [True],
    "q_eps": [0.0, 1e-6], "k_eps": [0.0, 1e-6], "window": [5, 6], "chunk": [5, 6],
    "has_sinks": [True],
    "softcap": [5.0, 6.0],
    "mask_positions": [32], "roundings": [((1.0, 0.5, -128, 127),)],
    "weight_roundings": [((1.0, 0.5, -128, 127),)],
}  # fmt: skip
ROW = rows.RowOp("rms_norm", "f32", 2, 24, eps=1e-6)
LINEAR = linear.LinearShape(2, 24, 32, "int4", "block", 32)
PAIR = Pair("add", 0.5, 0, 0.25, 1, 0.5, 0)
ROUTE = experts.RouteOp(2, 8, 2, "softmax", "sum", 0.5, 2.0)
ROUTED_ROW = experts.RoutedRowOp(2, 2, 8, 24, "silu", ("hidden",), by_pair=True)
TABLE = embedding.EmbeddingOp(2, 40, 32, "int4", "int8", (40, 2), True, 16, 0)

Case = tuple[Callable[[Any], Kernel], Any, dict[str, list[Any]]]
CASES: dict[str, Case] = {
    "append to a ring": (attention.build_append, RING, {"ring": [64], "window": [6]}),
    "attend to a ring": (attention.build_attend, RING, {"ring": [64], "kv_dtype": ["int8"]}),
    "append": (attention.build_append, CAUSAL, {**ATTENTION, "stateless": [True]}),
    "attend": (attention.build_attend, CAUSAL, ATTENTION),
    "decode": (attention.build_decode, DECODE, {**ATTENTION, "m": [1]}),
    "biased": (
        attention.build_attend, BIASED,
        {"bias_zero": [30], "bias_columns": [80], "bias_by_key": [True],
         "sum_roundings": [((1.0, 0.5, -128, 127),)]},
    ),
    "norm": (
        rows.build, ROW,
        {"m": [3], "d": [32], "eps": [1e-5], "residual": [True], "groups": [3],
         "prologue": ["layer_norm"]},
    ),
    "quantizing norm": (
        rows.build, replace(ROW, epilogue="row_u8"),
        {"storage": ["int8"], "k_multiple": [64], "keep_f32": [True]},
    ),
    "blocks": (
        rows.build, replace(ROW, epilogue="block", group_size=16),
        {"group_size": [32], "keep_f32": [True]},
    ),
    "rounded": (
        rows.build, rows.RowOp("copy", "rounded", 2, 24, scale=0.5, low=-128, high=127),
        {"scale": [0.25], "low": [0], "high": [255]},
    ),
    "pair": (
        rows.build, rows.RowOp("pair", "f32", 2, 24, pair=PAIR),
        {"other": ["features", "number"],
         "pair": [replace(PAIR, first=False), replace(PAIR, function="multiply"),
                  replace(PAIR, x_scale=0.125), replace(PAIR, zero=3)]},
    ),
    "rescale": (rows.build, rows.RowOp("rescale", "f32", 2, 24, unit=0.5), {"unit": [0.25]}),
    "linear": (
        lambda shape: linear.build(shape, ISA), LINEAR,
        {"m": [3], "n": [32], "k": [64], "format": ["int8"], "group_size": [16],
         "has_zero_points": [True], "has_bias": [True], "has_residual": [True],
         "scale_dtype": ["float16"]},
    ),
    "linear on floats": (
        lambda shape: linear.build(shape, ISA),
        linear.LinearShape(2, 24, 32, "int8", group_channels=4),
        {"group_channels": [8], "format": ["int4", "e4m3fn", "e5m2"], "has_zero_points": [True]},
    ),
    "convolution": (
        convolution.build, convolution.ConvShape(2, 24, 3, 32, gated=False, has_bias=False),
        {"m": [3], "channels": [32], "taps": [4], "capacity": [48], "gated": [True],
         "has_bias": [True]},
    ),
    "embedding": (
        embedding.build, TABLE,
        {"m": [3], "vocab": [41], "zero_points": [False], "group_size": [32], "format": ["int2"]},
    ),
    "route": (
        experts.build_route, ROUTE,
        {"m": [3], "experts": [9], "top_k": [3], "score": ["sigmoid"], "normalize": ["softmax"],
         "eps": [0.25], "scale": [1.0], "has_bias": [True]},
    ),
    "routed row": (
        experts.build_row, ROUTED_ROW,
        {"m": [3], "top_k": [3], "experts": [9], "d": [32], "activation": ["identity"],
         "storage": ["uint8"], "k_multiple": [64]},
    ),
}  # fmt: skip


def variants(base: Any, changes: dict[str, list[Any]]) -> Iterator[Any]:
    yield base
    for name, values in changes.items():
        for value in values:
            try:
                yield replace(base, **{name: value})
            except AssertionError:
                continue  # no such kernel


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_one_name_have_the_same_code(case: str) -> None:
    build, base, changes = CASES[case]
    known: dict[str, Kernel] = {}
    for shape in variants(base, changes):
        kernel = build(shape)
        first = known.setdefault(str(kernel.func.attrs["global_symbol"]), kernel)
        assert first.tensors == kernel.tensors, shape
        assert structural_equal(first.func, kernel.func), shape
    assert len(known) > 1 or case in ("rounded", "rescale")


def test_elementwise_kernels_are_named_by_all_that_they_depend_on() -> None:
    built = [
        *(elementwise.build_add(m, d) for m in (2, 3) for d in (8, 24)),
        *(elementwise.build_multiply(m, d, by) for m in (2, 3) for d in (8, 24) for by in (1, d)),
        *(elementwise.build_position_rows(2, d, rows) for d in (8, 24) for rows in (32, 48)),
        *(elementwise.build_add_positions(2, d, rows) for d in (8, 24) for rows in (32, 48)),
    ]
    assert len({str(k.func.attrs["global_symbol"]) for k in built}) == len(built)
