"""Windows, capped scores, biases by distance and norms of heads in attention kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention import AttentionShape, Rotation
from slmtvm.schedules.attention import reference as ref
from slmtvm.schedules.attention.shape import KV_DTYPES
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target
from tests.machines import runnable_targets
from tests.schedules.attention_cases import (
    ABSOLUTE,
    CAPACITY,
    Arrays,
    attention_shape,
    bits,
    cache,
    check_step,
    constants,
    parameters,
    projections,
    random_floats,
    step,
    tables,
    with_bias,
)
from tests.schedules.harness import run

HOST = Target.load("x86-64-v3")
EVERYTHING = with_bias(
    attention_shape(
        1,
        6,
        2,
        48,
        32,
        separate=True,
        q_eps=1e-6,
        k_eps=1e-5,
        window=20,
        softcap=3.0,
        scale=0.4,
        has_sinks=True,
    )
)
PROJECTED = replace(attention_shape(1, 6, 2, 40, 32, k_eps=1e-5, window=20), head_dim=24, whole=40)
ROUNDED = replace(
    with_bias(attention_shape(1, 6, 2, 48, window=20, scale=0.4), by_key=True),
    roundings=((1.0, 0.5, -128, 127),), sum_roundings=((1.0, 0.3, -72, 183),),
    weight_roundings=((1.0, 1 / 255, 0, 255),), has_sinks=True,
)  # fmt: skip
# A window smaller than a block and its neighbours, ending within and between blocks.
VARIANTS = {
    "window_1": (attention_shape(5, 4, 2, 40, window=1), 29),
    "window_9": (attention_shape(19, 2, 1, 80, 20, window=9, accumulators=16, queries=8), 13),
    "window_32": (attention_shape(3, 3, 3, 112, 112, window=32, kv_dtype="float16"), 95),
    "window_beyond_the_context": (attention_shape(2, 2, 2, 16, window=1000), 40),
    "chunk_7": (attention_shape(19, 2, 1, 80, 20, chunk=7, accumulators=16, queries=8), 13),
    "chunk_32": (attention_shape(9, 3, 3, 112, chunk=32, kv_dtype="float16"), 91),
    "chunk_beyond_the_context": (attention_shape(2, 2, 2, 16, chunk=1000), 40),
    "chunk_of_a_block": (attention_shape(5, 2, 1, 40, chunk=LANES, kv_dtype="int8"), 30),
    "softcap": (attention_shape(4, 5, 1, 96, softcap=1.5, scale=1.0), 30),
    "bias": (with_bias(attention_shape(7, 4, 2, 40)), 24),
    "bias_at_the_end": (with_bias(attention_shape(16, 3, 1, 32)), CAPACITY - 16),
    "bias_by_key": (with_bias(attention_shape(7, 4, 2, 40), by_key=True), 24),
    "bias_by_key_at_the_end": (
        with_bias(attention_shape(16, 3, 1, 32, window=19), by_key=True),
        CAPACITY - 16,
    ),
    "separate": (attention_shape(3, 6, 2, 40, 40, interleaved=True, separate=True), 17),
    "query_norm": (attention_shape(3, 4, 2, 48, 48, q_eps=1e-6), 10),
    "key_norm": (attention_shape(3, 4, 2, 40, k_eps=1e-2), 10),
    "sinks": (attention_shape(7, 6, 2, 40, has_sinks=True), 20),
    "everything": (replace(EVERYTHING, m=6, kv_dtype="float16"), 50),
    "projected": (replace(PROJECTED, m=9), 37),
    "projected_few": (
        replace(
            attention_shape(2, 5, 1, 9, 8, separate=True, interleaved=True), head_dim=7, whole=9
        ),
        3,
    ),
    "int8": (attention_shape(9, 6, 2, 40, 40, kv_dtype="int8", accumulators=16, queries=8), 37),
    "int8_in_a_window": (attention_shape(3, 4, 4, 112, kv_dtype="int8", window=21), 60),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_computes_its_reference(variant: str) -> None:
    shape, position = VARIANTS[variant]
    check_step(shape, position, HOST)


@pytest.mark.parametrize(
    "kv_dtype", ["int4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("float32", "int8"))]
)
@pytest.mark.parametrize(
    "variant", [EVERYTHING, ROUNDED, PROJECTED], ids=["everything", "rounded", "projected"]
)
def test_a_variant_has_the_same_bits_on_every_target(
    variant: AttentionShape, kv_dtype: str
) -> None:
    position, plain = 77, replace(variant, kv_dtype=kv_dtype)
    inputs = {**projections(plain), **parameters(plain), **cache(plain, position)}
    results = []
    for target in runnable_targets():
        shape = attention.suited(plain, isas.get(target.isa))
        results.append(run(attention.build_decode(shape), inputs, target, position=position))
    appended = {t.name: results[0][t.name] for t in plain.cache}
    wanted = ref.append(plain, inputs, position)
    want = ref.attend(plain, {**inputs, "q": wanted["q"], **appended}, position)
    np.testing.assert_allclose(results[0]["o"], want, atol=ABSOLUTE)
    for result in results[1:]:
        for name in ("o", *(t.name for t in shape.cache)):
            np.testing.assert_array_equal(bits(result[name]), bits(results[0][name]), err_msg=name)


def one_by_one(shape: AttentionShape, given: Arrays, position: int) -> Arrays:
    """The rows of ``given`` decoded one after the other."""
    kept, outputs = cache(shape, position), []
    one = replace(shape, m=1)
    for i in range(shape.m):
        row = {name: array[i : i + 1] for name, array in given.items()}
        inputs = {**row, **parameters(shape), **kept}
        made = run(attention.build_decode(one), inputs, HOST, position=position + i)
        kept = {t.name: made[t.name] for t in shape.cache}
        outputs.append(made["o"])
    return {**kept, "o": np.concatenate(outputs)}


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("accumulators", [1, 4, 16])
@pytest.mark.parametrize(
    "variant", [EVERYTHING, ROUNDED, PROJECTED], ids=["everything", "rounded", "projected"]
)
def test_chunks_of_a_variant_give_the_bits_of_single_rows(
    variant: AttentionShape, accumulators: int, kv_dtype: str
) -> None:
    position = 29  # the window leaves a block behind within the chunk
    shape = replace(variant, m=5, kv_dtype=kv_dtype)
    given = projections(shape)
    single = one_by_one(shape, given, position)
    wide = replace(shape, accumulators=accumulators, queries=min(accumulators, 8))
    chunk = step(wide, given, cache(shape, position), position, HOST)
    for name, value in single.items():
        np.testing.assert_array_equal(bits(chunk[name]), bits(value), err_msg=name)


def test_a_window_reads_nothing_of_the_blocks_before_it() -> None:
    position, window = 100, 20
    shape = attention_shape(1, 4, 2, 32, window=window)
    first = (position - window + 1) // LANES
    given, kept = projections(shape), cache(shape, position)
    inputs = {**given, **kept}
    clean = run(attention.build_decode(shape), inputs, HOST, position=position)
    kept["k_cache"][:, :first] = np.nan
    kept["v_cache"][:, : first * LANES] = np.nan
    poisoned = run(attention.build_decode(shape), inputs, HOST, position=position)
    np.testing.assert_array_equal(bits(poisoned["o"]), bits(clean["o"]))
    assert np.isfinite(clean["o"]).all()


def test_blocks_of_positions_have_the_bits_of_sequences_of_their_own() -> None:
    shape = attention_shape(32, 4, 2, 40, chunk=32)
    given = projections(shape)
    later = step(shape, given, cache(shape, 64), 64, HOST)
    alone = replace(shape, chunk=0)
    np.testing.assert_array_equal(
        bits(later["o"]), bits(step(alone, given, cache(alone, 0), 0, HOST)["o"])
    )


@pytest.mark.parametrize("chunk", [5, 20])
def test_bidirectional_blocks_see_each_other_alone(chunk: int) -> None:
    m, valid = 37, 29
    shape = attention_shape(m, 4, 2, 40, mask="bidirectional", capacity=48, chunk=chunk)
    appended = run(attention.build_append(shape), projections(shape), HOST)
    inputs = {name: appended[name] for name in ("q", "k_cache", "v_cache")}
    place = np.arange(48).reshape(1, -1, 1, LANES)
    inputs["k_cache"] = np.where(place < valid, inputs["k_cache"], np.float32(np.nan))
    inputs["v_cache"][:, valid:] = np.nan
    got = run(attention.build_attend(shape), inputs, HOST, valid=valid, cuts=(3,))["o"]
    assert np.isfinite(got).all()
    inputs = {**inputs, "k_cache": appended["k_cache"], "v_cache": appended["v_cache"]}
    want = ref.attend(shape, inputs, valid)[:valid]
    np.testing.assert_allclose(got[:valid], want, atol=ABSOLUTE)


def test_a_bidirectional_bias_is_by_distance_either_way() -> None:
    m, valid = 37, 30
    shape = with_bias(attention_shape(m, 4, 4, 40, mask="bidirectional", capacity=48, softcap=2.0))
    appended = run(attention.build_append(shape), projections(shape), HOST)
    inputs = {name: appended[name] for name in ("q", "k_cache", "v_cache")}
    place = np.arange(48).reshape(1, -1, 1, LANES)
    inputs["k_cache"] = np.where(place < valid, inputs["k_cache"], np.float32(np.nan))
    inputs["v_cache"][:, valid:] = np.nan
    inputs |= parameters(shape)
    got = run(attention.build_attend(shape), inputs, HOST, valid=valid, cuts=(3,))["o"]
    np.testing.assert_allclose(got, ref.attend(shape, inputs, valid), atol=ABSOLUTE)


@pytest.mark.parametrize("causal", [True, False])
def test_a_rotation_on_its_own_is_that_of_the_append_kernel(causal: bool) -> None:
    m, heads, position = 5, 3, 37 if causal else 0
    shape = attention_shape(m, heads, heads, 40, 20, interleaved=True)
    rotation = Rotation(40, 20, interleaved=True)
    kernel = attention.build_rope(m, heads, rotation, CAPACITY, causal=causal)
    x = random_floats(m, heads * 40, seed=8)
    got = run(kernel, {"x": x, **tables(shape)}, HOST, position=position, cuts=(2,))["y"]
    qkv = np.concatenate([x, x, x], axis=1)
    inputs = {"qkv": qkv, **tables(shape), **cache(shape, position)}
    want = run(attention.build_append(shape), inputs, HOST, position=position)["q"]
    np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("shape", "position"),
    [
        (attention_shape(1, 4, 1, 64, 64), 0),
        (attention_shape(1, 9, 1, 96, accumulators=16, queries=8), 127),
        (replace(EVERYTHING, num_kv_heads=1, q_eps=None), 77),
        (replace(ROUNDED, num_kv_heads=1), 77),
        (replace(attention_shape(1, 4, 1, 80, 64), head_dim=48, whole=80), 61),
        (attention_shape(1, 1, 1, 32, window=21), 70),
    ],
    ids=lambda v: str(getattr(v, "head_dim", v)),
)
def test_heads_divided_among_blocks_give_the_bits_of_whole_ones(
    shape: AttentionShape, position: int, kv_dtype: str
) -> None:
    shape = replace(shape, kv_dtype=kv_dtype)
    assert attention.parts_of(shape) > 1
    inputs = {**projections(shape), **parameters(shape), **cache(shape, position)}
    whole = run(attention.build_decode(shape), inputs, HOST, position=position)
    kernel = attention.build_divided_scores(shape)
    scored = run(kernel, inputs, HOST, position=position, cuts=(1,))
    values = {t.name: scored[t.name] for t in shape.cache if t.name.startswith("v_")}
    kernel = attention.build_divided_values(shape)
    sinks = {t.name: parameters(shape)[t.name] for t in shape.sinks}
    given = {"scores": scored["scores"], **values, **sinks, **constants(shape)}
    made = {**scored, **run(kernel, given, HOST, position=position, cuts=(1,))}
    for name in ("o", *(t.name for t in shape.cache)):
        np.testing.assert_array_equal(bits(made[name]), bits(whole[name]), err_msg=name)
