"""Attention kernels compute what their reference says; a row's bits never depend on its company."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from slmtvm.codegen.objects import build_module
from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.attention import reference as ref
from slmtvm.schedules.attention.shape import KV_DTYPES
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target, known_targets
from tests.machines import EVERY_TARGET
from tests.schedules.attention_cases import (
    ABSOLUTE,
    CAPACITY,
    Arrays,
    attention_shape,
    bits,
    cache,
    check_step,
    projections,
    random_floats,
    step,
    tables,
)
from tests.schedules.harness import run


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def with_kv(shape: AttentionShape, kv_dtype: str, target: Target) -> AttentionShape:
    return replace(shape, kv_dtype=kv_dtype, native_f16=isas.get(target.isa).native_f16)


CASES = [
    (attention_shape(5, 4, 2, 40, 20, interleaved=True), 15),
    (attention_shape(3, 6, 2, 32, 32, accumulators=16, queries=8), 100),
    (attention_shape(1, 7, 1, 80), 0),
]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("shape", "position"), CASES, ids=lambda v: getattr(v, "m", v))
def test_a_step_computes_its_reference(
    shape: AttentionShape, position: int, kv_dtype: str, target: Target
) -> None:
    check_step(with_kv(shape, kv_dtype, target), position, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "position"), [(32, 0), (40, 1), (64, 15), (80, 16), (64, 17), (40, 100)]
)
def test_head_sizes_at_positions_around_a_block(
    head_dim: int, position: int, target: Target
) -> None:
    shape = attention_shape(6, 6, 2, head_dim, head_dim)
    for kv_dtype in KV_DTYPES:
        check_step(with_kv(shape, kv_dtype, target), position, target)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rotary_dim", [0, 32])
def test_decoding_in_one_kernel_changes_no_bit(
    rotary_dim: int, kv_dtype: str, target: Target
) -> None:
    shape, position = with_kv(attention_shape(1, 6, 2, 32, rotary_dim), kv_dtype, target), 37
    given, kept = projections(shape), cache(shape, position)
    two = step(shape, given, kept, position, target)
    kernel = attention.build_decode(shape)
    one = run(kernel, {**given, **tables(shape), **kept}, target, position=position, cuts=(1,))
    for name in ("o", *(t.name for t in shape.cache)):
        np.testing.assert_array_equal(bits(one[name]), bits(two[name]), err_msg=name)


def chunked(shape: AttentionShape, qkv: np.ndarray, start: int, chunk: int, accumulators: int,
            target: Target) -> Arrays:  # fmt: skip
    """All rows of ``qkv``, ``chunk`` at a time; outputs of all, and the cache at the end."""
    shape = replace(shape, m=chunk, accumulators=accumulators, queries=min(accumulators, 8))
    kept, outputs = cache(shape, start), []
    for at in range(0, len(qkv), chunk):
        result = step(shape, {"qkv": qkv[at : at + chunk]}, kept, start + at, target)
        kept = {t.name: result[t.name] for t in shape.cache}
        outputs.append(result["o"])
    return {**kept, "o": np.concatenate(outputs)}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("chunk", "accumulators"),
    [
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(5, 4, marks=pytest.mark.slow),
        (5, 16),
        (10, 16),
    ],
    ids=lambda v: str(v),
)
def test_chunks_of_any_size_give_the_same_bits(
    chunk: int, accumulators: int, kv_dtype: str
) -> None:
    shape, host = attention_shape(10, 6, 2, 40, 40, kv_dtype=kv_dtype), Target.load("x86-64-v3")
    qkv = random_floats(10, shape.projections[0].shape[1], seed=4)
    whole = chunked(shape, qkv, 11, 10, 4, host)
    parts = chunked(shape, qkv, 11, chunk, accumulators, host)
    for name, value in whole.items():
        np.testing.assert_array_equal(bits(parts[name]), bits(value), err_msg=name)


def test_a_bidirectional_row_sees_the_valid_positions_only(target: Target) -> None:
    shape = attention_shape(37, 4, 4, 32, mask="bidirectional", capacity=48)
    valid = 21
    appended = run(attention.build_append(shape), projections(shape), target, cuts=(5,))
    keys, values = (appended[t.name][...] for t in shape.cache)
    place = np.arange(48).reshape(1, -1, 1, LANES)
    inputs = {
        "q": appended["q"],
        "k_cache": np.where(place < valid, keys, np.float32(np.nan)),
        "v_cache": np.where(np.arange(48)[:, None] < valid, values, np.float32(np.nan)),
    }
    got = run(attention.build_attend(shape), inputs, target, valid=valid, cuts=(3,))["o"]
    np.testing.assert_allclose(got, ref.attend(shape, inputs, valid), atol=ABSOLUTE)


def test_a_row_has_the_same_bits_with_and_without_a_cache(target: Target) -> None:
    shape = attention_shape(37, 4, 2, 32, 32, capacity=48, table_rows=CAPACITY)
    kept, found = {t.name: np.zeros(t.shape, np.float32) for t in shape.cache}, []
    for kind in (shape, replace(shape, stateless=True)):
        given = {**projections(kind), **tables(kind), **({} if kind.stateless else kept)}
        made = run(attention.build_append(kind), given, target, cuts=(5,))
        read = {name: made[name] for name in ("q", *(t.name for t in kind.cache))}
        found.append(run(attention.build_attend(kind), read, target, position=0, cuts=(3,))["o"])
    np.testing.assert_array_equal(bits(found[0]), bits(found[1]))


def awkward_floats(count: int) -> np.ndarray:
    """Float32 at, between and just beside neighbouring float16, and beyond the largest."""
    rng = np.random.default_rng(6)
    low = rng.integers(0, 0x7BFF, count).astype(np.uint16)  # the largest finite one is 0x7BFF
    pair = [(low + np.uint16(i)).view(np.float16).astype(np.float32) for i in range(2)]
    middle = (pair[0] + pair[1]) / 2
    beyond = rng.choice(
        np.float32([65504, 65510, 65519.99, 65520, 65536, 1e6, 3e38, np.inf]), count
    )
    no_number = np.full(count, np.nan, np.float32)
    below, above = (np.nextafter(middle, np.float32(to)) for to in (0, np.inf))
    kinds = [pair[0], middle, below, above, beyond, no_number]
    picked = np.choose(rng.choice(len(kinds), count, p=[0.2, 0.3, 0.2, 0.2, 0.08, 0.02]), kinds)
    return picked * rng.choice(np.float32([-1, 1]), count)


@pytest.mark.parametrize(
    ("target_name", "native"),
    [(name, True) for name in known_targets() if isas.get(Target.load(name).isa).native_f16]
    + [("x86-64-v3", False), ("riscv64-rvv", False)],
)
def test_a_float16_cache_rounds_to_nearest_even_and_saturates(
    target_name: str, native: bool
) -> None:
    target = Target.load(target_name)
    shape = attention_shape(CAPACITY, 2, 2, 64, kv_dtype="float16", native_f16=native)
    extents = shape.projections[0].shape
    qkv = awkward_floats(extents[0] * extents[1]).reshape(extents)
    got = run(attention.build_append(shape), {"qkv": qkv, **cache(shape, 0)}, target)
    _, k, v = np.split(np.clip(qkv, -65504, 65504).astype(np.float16), 3, axis=1)
    keys = got["k_cache"].transpose(0, 1, 3, 2).reshape(2, CAPACITY, 64)
    for stored, want in ((keys, k), (got["v_cache"], v)):
        want = want.reshape(CAPACITY, 2, 64).swapaxes(0, 1)
        # The sign and payload of what is no number are nobody's business.
        known = ~np.isnan(want)
        np.testing.assert_array_equal(np.isnan(stored), ~known)
        np.testing.assert_array_equal(bits(stored[known]), bits(want[known]))


@pytest.mark.parametrize("count", [40, 64])
def test_an_int8_cache_rounds_half_to_even_and_keeps_zeros(count: int, target: Target) -> None:
    shape = attention_shape(8, 2, 2, count, kv_dtype="int8")
    given = projections(shape)
    heads = given["qkv"].reshape(8, 6, count)
    heads[0] = 0.0
    heads[1] = 1e-38
    heads[2] = 3e38
    heads[3] = np.arange(count) / 2 + 127 - count / 2 + 0.5  # halves, the largest 127
    got = run(attention.build_append(shape), {**given, **cache(shape, 0)}, target)
    keys = got["k_cache"].transpose(0, 1, 3, 2).reshape(2, CAPACITY, count)
    for kind, stored, heads_of in (("k", keys, heads[:, 2:4]), ("v", got["v_cache"], heads[:, 4:])):
        levels, scales = ref.quantize(heads_of.swapaxes(0, 1))
        np.testing.assert_array_equal(stored[:, :8], levels)
        np.testing.assert_array_equal(got[f"{kind}_scale"][:, :8], scales)
        assert not stored[:, :2].any() and not scales[:, :2].any()


@pytest.mark.parametrize(
    ("target_name", "widening", "narrowing"),
    [
        ("x86-64-v4-vnni", r"\bvcvtph2ps\b.*%zmm", r"\bvcvtps2ph\b.*%zmm"),
        ("x86-64-v3", r"\bvcvtph2ps\b.*%ymm", r"\bvcvtps2ph\b.*%ymm"),
        ("cortex-a78", r"\bfcvtl\tv\d+\.4s", r"\bfcvtn\tv\d+\.4h"),
        ("cortex-a72", r"\bfcvtl\tv\d+\.4s", r"\bfcvtn\tv\d+\.4h"),
        ("riscv64-rvv", r"\bvand\.vx\b", r"\bvmerge\."),
    ],
)
def test_a_float16_cache_is_converted_by_vectors(
    target_name: str, widening: str, narrowing: str
) -> None:
    target = Target.load(target_name)
    shape = with_kv(attention_shape(1, 4, 2, 64, 64), "float16", target)
    name = shape.name("decode")
    code = build_module({name: attention.build_decode(shape).func}, target).inspect_source("asm")
    kernel = code[code.index(f"\n{name}:") : code.index(".Lfunc_end0")]
    assert re.search(widening, kernel) and re.search(narrowing, kernel), kernel
    assert not re.search(r"__\w*hf\w*|\bfcvt\ts\d+, h", kernel), "converted one by one"


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [0, 3, 20])
def test_a_row_does_not_read_what_later_rows_leave(
    kv_dtype: str, window: int, target: Target
) -> None:
    """Padding may leave infinities, and a weight of zero does not take them away."""
    shape = with_kv(attention_shape(9, 4, 2, 40, window=window), kv_dtype, target)
    given, kept = projections(shape), cache(shape, 30)
    spoilt = {name: array.copy() for name, array in given.items()}
    for array in spoilt.values():
        array[5:7], array[7:] = np.inf, np.nan
    plain, got = (step(shape, x, kept, 30, target)["o"] for x in (given, spoilt))
    np.testing.assert_array_equal(bits(got[:5]), bits(plain[:5]))
    assert not np.isfinite(got[5:]).any()
