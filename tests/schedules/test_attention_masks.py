"""Attention kernels with hidden keys: these have no weight, and change no bit of other rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.attention import reference as ref
from slmtvm.schedules.attention.shape import KV_DTYPES
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target
from tests.machines import EVERY_TARGET, runnable_targets
from tests.schedules.attention_cases import (
    ABSOLUTE,
    CAPACITY,
    Arrays,
    attention_shape,
    bits,
    cache,
    check_step,
    limits,
    parameters,
    projections,
    random_visible,
    step,
    with_bias,
)
from tests.schedules.harness import run

HOST = Target.load("x86-64-v3")
EVERYTHING = with_bias(
    attention_shape(
        1, 6, 2, 48, 32, separate=True, q_eps=1e-6, k_eps=1e-5, window=20, softcap=3.0, scale=0.4,
        mask_positions=CAPACITY,
    )
)  # fmt: skip
CASES = {
    "plain": (attention_shape(5, 4, 2, 40, 20, mask_positions=CAPACITY), 29),
    "the_first_rows": (attention_shape(9, 6, 2, 32, mask_positions=CAPACITY), 0),
    "a_window": (attention_shape(3, 3, 3, 112, window=9, mask_positions=CAPACITY + 16), 95),
    "wide_tiles": (
        attention_shape(19, 2, 1, 80, accumulators=16, queries=8, mask_positions=CAPACITY),
        13,
    ),
    "everything": (replace(EVERYTHING, m=6), 50),
}


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


@pytest.mark.parametrize("case", CASES)
def test_hidden_keys_have_no_weight(case: str) -> None:
    shape, position = CASES[case]
    check_step(shape, position, HOST)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_hidden_keys_have_no_weight_on_any_target(kv_dtype: str, target: Target) -> None:
    shape, position = CASES["plain"]
    native = isas.get(target.isa).native_f16
    check_step(replace(shape, kv_dtype=kv_dtype, native_f16=native), position, target)


@pytest.mark.slow
def test_masked_rows_have_the_same_bits_on_every_target() -> None:
    position = 77
    inputs = {**projections(EVERYTHING), **parameters(EVERYTHING), **cache(EVERYTHING, position)}
    results = []
    for target in runnable_targets():
        kernel = attention.build_decode(attention.suited(EVERYTHING, isas.get(target.isa)))
        results.append(run(kernel, inputs, target, position=position)["o"])
    for result in results[1:]:
        np.testing.assert_array_equal(bits(result), bits(results[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_where_all_is_visible_no_bit_differs_from_kernels_without_a_mask(
    case: str, kv_dtype: str
) -> None:
    shape, position = CASES[case]
    shape = replace(shape, kv_dtype=kv_dtype)
    inputs = {**projections(shape), **parameters(shape), **cache(shape, position)}
    q = run(attention.build_append(shape), inputs, HOST, position=position)
    inputs |= {name: q[name] for name in ("q", *(t.name for t in shape.cache))}
    inputs["limits"] = limits(np.ones(shape.mask_positions, bool))
    masked = run(attention.build_attend(shape), inputs, HOST, position=position)["o"]
    plain = attention.build_attend(replace(shape, mask_positions=0))
    np.testing.assert_array_equal(
        bits(masked), bits(run(plain, inputs, HOST, position=position)["o"])
    )


def one_by_one(shape: AttentionShape, given: Arrays, position: int) -> np.ndarray:
    """The rows of ``given`` decoded one after the other."""
    kept, outputs = cache(shape, position), []
    kernel = attention.build_decode(replace(shape, m=1))
    for i in range(shape.m):
        row = {name: array[i : i + 1] for name, array in given.items()}
        made = run(kernel, {**row, **parameters(shape), **kept}, HOST, position=position + i)
        kept = {t.name: made[t.name] for t in shape.cache}
        outputs.append(made["o"])
    return np.concatenate(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("accumulators", [1, 4, 16])
def test_chunks_give_the_bits_of_single_rows(accumulators: int) -> None:
    shape, position = replace(EVERYTHING, m=5), 29
    given = projections(shape)
    wide = replace(shape, accumulators=accumulators, queries=min(accumulators, 8))
    chunk = step(wide, given, cache(shape, position), position, HOST)["o"]
    np.testing.assert_array_equal(bits(chunk), bits(one_by_one(shape, given, position)))


def test_heads_divided_among_blocks_give_the_bits_of_whole_ones() -> None:
    shape, position = attention_shape(1, 4, 1, 64, 64, mask_positions=CAPACITY), 90
    assert attention.parts_of(shape) > 1
    inputs = {**projections(shape), **parameters(shape), **cache(shape, position)}
    whole = run(attention.build_decode(shape), inputs, HOST, position=position)["o"]
    scored = run(attention.build_divided_scores(shape), inputs, HOST, position=position, cuts=(1,))
    given = {"scores": scored["scores"], "v_cache": scored["v_cache"]}
    made = run(attention.build_divided_values(shape), given, HOST, position=position, cuts=(1,))
    np.testing.assert_array_equal(bits(made["o"]), bits(whole))


def test_what_hidden_tokens_left_in_the_cache_does_not_matter() -> None:
    shape, visible = attention_shape(1, 4, 2, 32, mask_positions=CAPACITY), random_visible(CAPACITY)
    position = int(np.flatnonzero(visible)[60])
    kept = cache(shape, position)
    inputs = {**projections(shape), **parameters(shape)}
    clean = run(attention.build_decode(shape), {**inputs, **kept}, HOST, position=position)["o"]
    hidden = np.flatnonzero(~visible[:position])
    kept["k_cache"][:, hidden // LANES, :, hidden % LANES] = 1e30
    kept["v_cache"][:, hidden] = -3e38
    other = run(attention.build_decode(shape), {**inputs, **kept}, HOST, position=position)["o"]
    np.testing.assert_array_equal(bits(other), bits(clean))


def test_a_row_that_sees_hidden_keys_alone_is_finite(target: Target) -> None:
    shape, position = attention_shape(1, 4, 2, 40, mask_positions=CAPACITY), 37
    inputs = {**projections(shape), **cache(shape, position)}
    inputs["limits"] = limits(np.zeros(CAPACITY, bool))
    o = run(attention.build_decode(shape), inputs, target, position=position)["o"]
    assert np.isfinite(o).all()


def test_a_bidirectional_row_sees_visible_keys_of_the_valid_ones(target: Target) -> None:
    m, valid = 37, 30
    shape = attention_shape(
        m, 4, 4, 40, mask="bidirectional", capacity=48, mask_positions=CAPACITY
    )  # fmt: skip
    appended = run(attention.build_append(shape), projections(shape), target)
    inputs = {name: appended[name] for name in ("q", "k_cache", "v_cache")} | parameters(shape)
    place = np.arange(48).reshape(1, -1, 1, LANES)
    inputs["k_cache"] = np.where(place < valid, inputs["k_cache"], np.float32(np.nan))
    inputs["v_cache"][:, valid:] = np.nan
    got = run(attention.build_attend(shape), inputs, target, valid=valid, cuts=(3,))["o"]
    np.testing.assert_allclose(got, ref.attend(shape, inputs, valid), atol=ABSOLUTE)
